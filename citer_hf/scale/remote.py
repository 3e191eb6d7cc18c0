"""An LLM on a server: vLLM or SGLang has its weights and its keys and values; a pair asks it for verdicts."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..model.compat import CACHE, given_cache
from ..model.references import HUB_KEYWORDS, base_config, load_tokenizer
from ..model.sampling import Choice, InexactError
from ..model.slots import SlotCache
from ..runs import is_address
from .endpoint import API_KEY, Ask, Asks, Endpoint, Found, Request, checked, server_of

logger = logging.get_logger(__name__)

# Text that two tokenizers hardly ever divide alike.
PROBE = "Zoë's 3 quick-brown foxes paid $1,250.75 (tax included)!\n\tdef f(x): return x**2  # naïve"
# What only takes tokens away, by their order or by name, leaves the others as likely as they were to each other.
BY_ORDER = re.compile(r"(Epsilon|Eta|MinP|Temperature|TopK|TopP|Typical)LogitsWarper|LogitNormalization")
NEEDS_LOGITS = re.compile(r"(Encoder)?RepetitionPenaltyLogitsProcessor|ExponentialDecayLengthPenalty")
TAKES_AWAY = re.compile(
    r"(Forced[BE]OSToken|InfNanRemove|Min(NewTokens)?Length|NoBadWords|NoRepeatNGram|SuppressTokens(AtBegin)?)"
    r"LogitsProcessor"
)


@dataclass
class RemoteOutput(CausalLMOutputWithPast):
    """What a remote LLM tells: `least` `[asked]` is the smallest log-probability of those that came unasked."""

    least: Any = None
    errors: Any = None  # by number of the question


class RemoteLM(PreTrainedModel, GenerationMixin):
    """An LLM on a server of vLLM or SGLang, which takes the place of the LLM in `CiterForCausalLM.from_pair`.

    Args:
        url: Address of the server's OpenAI API, such as `http://host:8000/v1`.
        model: Name of the model there. Default: the only one that the server has.
        api_key: Key of the server. Default: the environment variable `CITER_LLM_API_KEY`.
        config: Name or path of the model's configuration and tokenizer. Default: `model`.
        logprobs: How many log-probabilities of a position the server is asked for. Sampling needs a `top_k` of at most
            as many; vLLM gives 20 unless it is started with `--max-logprobs`.
        timeout: Seconds that a request may take, with all tries.
        max_connections: Requests in flight at most.
        kwargs: Where the configuration is: `revision`, `token`, `cache_dir` and others of `from_pretrained`.

    Raises:
        ValueError: for an address that is none, a model that the server does not have, or another one behind its name.
        ConnectionError: when the server cannot be reached, refuses the key, or gives fewer log-probabilities.
        OSError: when there is no configuration of the model.
    """

    # What the rest of the package asks before it treats an LLM as one that is here.
    is_remote = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        config: str | os.PathLike[str] | None = None,
        logprobs: int = 20,
        timeout: float = 60.0,
        max_connections: int = 64,
        **kwargs: Any,
    ):
        arguments: dict[str, Any] = {
            "url": url,
            "model": model,
            "api_key": api_key,
            "config": config,
            "logprobs": logprobs,
        }
        arguments |= {"timeout": timeout, "max_connections": max_connections, **kwargs}
        unknown = kwargs.keys() - {*HUB_KEYWORDS, "revision", "subfolder", "trust_remote_code"}
        if unknown:
            raise ValueError(f"llm: {', '.join(sorted(unknown))}: expected none of these, the LLM is not loaded here.")
        is_number = isinstance(timeout, int | float) and 0 < timeout < 1e9
        if not (is_number and all(isinstance(one, int) and one >= 1 for one in (logprobs, max_connections))):
            raise ValueError(
                "logprobs, timeout, max_connections: expected at least 1, seconds above 0 and at least 1, "
                f"got {logprobs!r}, {timeout!r} and {max_connections!r}."
            )
        # 1. The server, and the model there.
        endpoint = Endpoint(url, os.environ.get(API_KEY) if api_key is None else api_key, timeout, max_connections)
        entry, protocol = server_of(endpoint, model)
        # 2. What the model is: its own configuration, tokenizer and generation settings.
        name = os.fspath(config or entry["id"])
        try:
            of_model = copy.deepcopy(base_config("llm", name, kwargs))
        except OSError as error:
            raise OSError(
                f"config: no configuration of a model could be loaded from {name}. Pass config=..., the name or path "
                f"of the model that {url} has as {entry['id']}."
            ) from error
        of_model.is_remote = True
        limit = entry.get("max_model_len")
        if limit:
            text = of_model.get_text_config()
            text.max_position_embeddings = min(getattr(text, "max_position_embeddings", None) or limit, limit)
        super().__init__(of_model)
        self.name_or_path = name
        self.endpoint, self.limit = endpoint, limit
        self.size = int(of_model.get_text_config().vocab_size)
        self.logprobs = min(logprobs, self.size)
        self.protocol = protocol(endpoint, entry["id"], self.logprobs)
        self.head, self.arguments = torch.nn.Identity(), arguments
        # 3. Whether it is that model.
        check_same_model(self, load_tokenizer(name, **kwargs))
        with suppress(OSError):
            self.generation_config = GenerationConfig.from_pretrained(name, **kwargs)
        self.make_exact(self.generation_config)
        self.eval()

    def make_exact(self, settings: GenerationConfig) -> None:
        """Leave out or lower what generation settings of a model say that is not exact here, with a warning."""
        name, penalty, top_k = self.name_or_path, settings.repetition_penalty, settings.top_k
        if penalty not in (None, 1.0):
            logger.warning(f"repetition_penalty={penalty} of {name} is left out: the LLM is remote.")
            settings.repetition_penalty = None
        if settings.do_sample and not self.is_complete and not 0 < (top_k or 0) <= self.logprobs:
            logger.warning(f"top_k={top_k} of {name} is now {self.logprobs}: the server tells of so many tokens.")
            settings.top_k = self.logprobs

    def __reduce__(self) -> Any:
        return remade, (self.arguments,)

    def __deepcopy__(self, memo: Any) -> "RemoteLM":
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def is_complete(self) -> bool:
        """Whether the server gives the log-probabilities of all tokens."""
        return self.logprobs >= self.size

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: the tables are on the server."""
        raise ValueError(f"llm: the vocabulary table of {self.name_or_path} is on a server, and keeps its size.")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error: there are no weights here."""
        raise ValueError(f"the weights of {self.name_or_path} are on a server")

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """Return the number of parameters that the configuration tells."""
        with torch.device("meta"):
            one = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False, attn_implementation="eager")
        return one.num_parameters()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        asked: Mapping[tuple[int, int], int | None] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return log-probabilities as logits, -inf for all tokens of which the server gives none.

        Args:
            input_ids: New tokens `[batch, tokens]`.
            attention_mask: `[batch, cached + tokens]`, or one that is added to scores, `[batch, 1, tokens, visible]`.
            position_ids: Not needed.
            past_key_values: A cache whose first layer keeps the text: token ids in the place of keys and values.
            use_cache: Not needed.
            logits_to_keep: As in transformers.
            asked: (sequence, kept position) of which logits are needed, each with a token whose log-probability is
                needed even if it is small: logits are then `[1, asked, vocabulary]`. Default: the only kept position.
            cache: Another name of `past_key_values`.
            kwargs: Not needed.
        """
        past, width = given_cache(past_key_values, cache), input_ids.shape[1]
        # 1. The texts: the cache's memory is the text, and the server's is found by it.
        ids = input_ids
        if past is not None:
            if len(past.layers) and getattr(past.layers[0], "is_sliding", False):
                raise ValueError("cache: the text of a remote LLM needs a layer that keeps all of it. Use CiterCache.")
            states = input_ids[:, None, :, None]
            ids = past.update(states, states, 0)[0][:, 0, :, 0]
        kept = list(range(width))[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep.tolist()
        places, shape = list(asked or ()), (1, len(asked or ()))
        if asked is None:
            if len(kept) > 1 and not self.is_complete:
                raise ValueError(f"llm: a likelihood, or another model's draft, needs all tokens, and {self.why}")
            places, shape = [(row, column) for row in range(len(ids)) for column in range(len(kept))], (len(ids), -1)
        # 2. What each position that is asked about sees: a text of each sequence, and lengths of it.
        texts, order = dict[int, Asks](), list[int]()
        for number in sorted(range(len(places)), key=lambda number: (places[number][0], kept[places[number][1]])):
            row, column = places[number]
            last = ids.shape[1] - width + kept[column] + 1
            seen = ids[row, :last]
            if attention_mask is not None and attention_mask.dim() == 4:
                seen = ids[row][attention_mask[row, 0, kept[column]] == 0]
            elif attention_mask is not None:
                seen = seen[attention_mask[row, :last].bool()]
            asks = texts[row][1] if row in texts else []
            asks.append(Ask(len(seen), (asked or {}).get((row, column))))
            texts[row] = seen.tolist(), asks
            order.append(number)
        # 3. The server's answers, where they belong.
        logits, least = torch.full((len(places), self.size), -torch.inf), torch.zeros(len(places))
        answers = self.protocol.judge(list(texts.values())) if texts else []
        errors = dict[int, BaseException]()
        for number, found in zip(order, (one for of_text in answers for one in of_text), strict=True):
            if isinstance(found, BaseException):
                errors[number] = found
                continue
            logits[number, self._checked(found)] = torch.tensor(list(found.values()))
            # One that was asked about may lie below those of which the server tells by itself.
            known = sorted(found.values(), reverse=True)
            least[number] = -torch.inf if self.is_complete else known[self.logprobs - 1]
        if asked is None:
            checked(list(errors.values()))
        return RemoteOutput(logits=logits.view(*shape, self.size), **{CACHE: past}, least=least, errors=errors)

    def needed(self, choice: Choice) -> int:
        """Return of how many tokens the server must tell for a sequence that chooses like this."""
        if choice.generator is None or self.is_complete:
            return 1
        top_k = [one.top_k for one in choice.processors if type(one).__name__ == "TopKLogitsWarper"]
        taken = [tokens_taken(one) for one in choice.processors if TAKES_AWAY.fullmatch(type(one).__name__)]
        return min(top_k, default=self.logprobs) + sum(taken)

    def read(self, texts: Sequence[tuple[list[int], int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for the last places of each text the likeliest tokens and the log-probabilities of its own."""
        found = []
        for (ids, count), places in zip(texts, self.protocol.read(texts), strict=True):
            likeliest = [max(self._checked(one), key=one.__getitem__) for one in places]
            own = [one[token] for one, token in zip(places, ids[-count:], strict=True)]
            found.append((torch.tensor(likeliest), torch.tensor(own)))
        return found

    def complete(self, texts: Sequence[list[int]], lengths: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
        """Return the greedy continuation of each text, of at most so many tokens, up to an end token."""
        return self.protocol.complete(texts, lengths, ends)

    def _checked(self, found: Found) -> list[int]:
        wrong = [token for token in found if not 0 <= token < self.size]
        if wrong:
            raise ValueError(
                f"llm: {self.endpoint.url} answers with the token id {wrong[0]}, but {self.name_or_path} has "
                f"{self.size} tokens. Pass config=..., the name or path of the model that the server has."
            )
        return list(found)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Begin the text of a generation without the pair."""
        model_kwargs.setdefault(CACHE, SlotCache(self.config))

    @property
    def why(self) -> str:
        """What is missing, and what to do."""
        return (
            f"the LLM's server is asked for {self.logprobs} of {self.size} log-probabilities. Load the LLM here, or "
            "raise the server's limit (vLLM: --max-logprobs) and RemoteLM(logprobs=...)."
        )

    def check_call(self, processors: Any, settings: GenerationConfig) -> None:
        """Raise an error for what the server cannot do, or not exactly."""
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if self.limit and longest and settings.max_length and settings.max_length > longest:
            raise ValueError(
                f"max_new_tokens: prompt and output may have {settings.max_length} tokens here, but the LLM's server "
                f"takes {longest}. Ask for fewer."
            )
        if settings.num_beams and settings.num_beams > 1 and not self.is_complete:
            raise InexactError("num_beams", f"beams need all tokens, and {self.why}")
        if settings.return_dict_in_generate and (settings.output_logits or settings.output_scores):
            raise InexactError(
                "output_logits", "a remote LLM gives log-probabilities, and no logits. Load the LLM here."
            )
        removed = 0
        for one in processors:
            kind = type(one).__name__
            if NEEDS_LOGITS.fullmatch(kind):
                raise InexactError(field_of(one), "it needs logits, and a remote LLM gives log-probabilities.")
            if not (self.is_complete or BY_ORDER.fullmatch(kind) or TAKES_AWAY.fullmatch(kind)):
                raise InexactError(field_of(one), f"it may promote tokens beyond the likeliest, and {self.why}")
            removed += tokens_taken(one) if TAKES_AWAY.fullmatch(kind) else 0
        most = settings.top_k or self.size
        if settings.do_sample and most + removed > self.logprobs and not self.is_complete:
            lost = " while others are taken away" if removed else ""
            raise InexactError(
                "top_k", f"a draw from {most} tokens{lost} is not exact, since {self.why} Or lower top_k."
            )


def field_of(processor: Any) -> str:
    """Return the name of the setting that stands behind a processor, as far as it is known."""
    name = re.sub("Logits(Processor|Warper)", "", type(processor).__name__)
    return getattr(processor, "field", re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower())


def remote_llm(llm: Any, keywords: dict[str, Any]) -> Any:
    """Return the LLM behind `http://host:8000/v1#NAME`, which takes the LLM's keywords; any other LLM as it is."""
    if not is_address(llm):
        return llm
    own = {key[4:]: keywords.pop(key) for key in list(keywords) if key.startswith("llm_")}
    url, _, name = llm.partition("#")
    return RemoteLM(url, name or None, **own)


def tokens_taken(processor: Any) -> int:
    """Return how many tokens a processor may take away at most."""
    known = [getattr(processor, name, None) for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")]
    counts = [torch.as_tensor(one).numel() for one in known if one is not None]
    return max(counts) if counts else 1 << 30


def remade(arguments: dict[str, Any]) -> RemoteLM:
    """Return the same remote LLM in another process."""
    return RemoteLM(**arguments)


def check_same_model(llm: RemoteLM, tokenizer: Any) -> None:
    """Raise an error where the server's model has another vocabulary or another tokenizer."""
    url, name = llm.endpoint.url, llm.name_or_path
    another = f"another model than {name} is behind {url}. Pass model=... and config=... that belong together."
    (first,), (last,) = llm.protocol.judge([([0], [Ask(1)]), ([llm.size - 1], [Ask(1)])])
    llm._checked(checked([first])[0])
    if isinstance(last, BaseException):
        raise ValueError(f"llm: it refuses the token id {llm.size - 1}: {another} ({last})") from last
    beyond = max(llm.size, 0 if tokenizer is None else len(tokenizer))
    if llm.protocol.takes(beyond):
        raise ValueError(f"llm: it has a token id {beyond}, beyond the table of {llm.size} rows: {another}")
    if tokenizer is None:
        return
    own = tokenizer(PROBE, add_special_tokens=False).input_ids
    body = {"model": llm.protocol.model, "prompt": PROBE, "add_special_tokens": False}
    answer = llm.endpoint.try_asking(Request("tokenize", body, at_root=True))
    theirs = answer.get("tokens") if isinstance(answer, dict) else None
    if theirs is None:
        # The server has no such address: how many tokens it counts has to do.
        own, theirs = len(tokenizer(PROBE).input_ids), llm.protocol.count(PROBE)
    if theirs is not None and theirs != own:
        raise ValueError(f"llm: the server divides a text into other tokens: {another}")
