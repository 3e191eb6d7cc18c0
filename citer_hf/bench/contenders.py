"""The contenders of the bench: every way to decode the same number of tokens after the same prompts."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from citer_hf import CiterForCausalLM
from citer_hf.model.compat import cache_argument
from citer_hf.model.configuration import table_size
from citer_hf.model.modeling import SlmOutput, keep
from citer_hf.model.schedule import Pace

ALONE, SLM, ASSISTED, ENSEMBLE = "LLM alone", "SLM alone", "assisted generation", "assisted, ensemble"
LOSSLESS, CITER, PLAIN, FLOOR = "CITER, lossless", "CITER", "CITER, max_drafts 0", "floor"
# Weight of the SLM in the distribution that transformers' lossy assisted generation verifies with.
ENSEMBLE_WEIGHT = 0.5


@dataclass(frozen=True)
class Setting:
    """How the pair decides: by a forced LLM share, or by its own router at a threshold, and with which veto."""

    label: str
    router_threshold: float
    share: float | None = None
    veto: float | None = None


def settings_of(shares: Sequence[float], thresholds: Sequence[float], veto: float | None = None) -> list[Setting]:
    """Return each setting once, in the order given; without a veto, the pair's own one is for thresholds alone."""
    dial = {0.0: 0.0, 1.0: 2.0}
    forced = [Setting(f"share {one:g}", dial.get(one, 0.5), one, veto or 0.0) for one in shares]
    return list(dict.fromkeys([*forced, *(Setting(f"threshold {one:g}", one, None, veto) for one in thresholds)]))


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together, padded on the left: `[sequences, length]`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    number: int = 0

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]


def random_prompts(vocab_size: int, length: int, sequences: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    return torch.randint(0, vocab_size, (sequences, length), generator=generator).tolist()


def padded_batches(token_ids: list[list[int]], sequences: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Return full batches; the last one is filled up with prompts from the beginning."""
    batches: list[Batch] = []
    for start in range(0, len(token_ids), sequences):
        prompts = [token_ids[index % len(token_ids)] for index in range(start, start + sequences)]
        width = max(map(len, prompts))
        padded = torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        batches.append(Batch(padded, mask, len(batches)))
    return batches


@dataclass(frozen=True)
class Plan:
    """What is known beforehand, `[sequences, new_tokens]`: flagged places, and with an agreement all tokens."""

    prompts: torch.Tensor  # numbers of tokens, [sequences, 1]
    flagged: torch.Tensor
    tokens: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls, batch: Batch, new_tokens: int, share: float, agreement: float | None, vocab_size: int, seed: int
    ) -> "Plan":
        """Return a plan with this share of flagged tokens and this agreement, as exactly as the length allows."""
        # Batch 1 of seed 0 differs from batch 0 of seed 1.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + batch.number) % (1 << 63))
        shape = len(batch.input_ids), new_tokens
        count = shape[0] * shape[1]
        rank = ((torch.rand(count, generator=generator).argsort() + 0.5) / count).view(shape)
        slm = torch.randint(vocab_size, shape, generator=generator)
        llm = (slm + (rank < share * (1 - (agreement or 0)))) % vocab_size
        device = batch.input_ids.device
        tokens = {} if agreement is None else {"slm": slm.to(device), "llm": llm.to(device)}
        return cls(batch.attention_mask.sum(1, keepdim=True), (rank < share).to(device), tokens)


class ForcedRouter(nn.Module):
    """The router of a forced pair, whose hidden states are the scores."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return hidden[..., 0]


class ForcedPair(CiterForCausalLM):
    """A pair that follows a plan: a decision is that of a place of a sequence, however often it is made."""

    plan: Plan

    def run_slm(
        self, input_ids: torch.Tensor, cache: Any = None, logits_to_keep: int | torch.Tensor = 0, **inputs: Any
    ) -> SlmOutput:
        slm = super().run_slm(input_ids, cache, logits_to_keep, **inputs)
        flagged = self._force("slm", slm.logits, cache, keep(inputs["position_ids"], logits_to_keep))
        return slm._replace(hidden=(~flagged).float()[..., None])

    def run_llm(
        self, input_ids: torch.Tensor, cache: Any = None, logits_to_keep: int | torch.Tensor = 0, **inputs: Any
    ) -> torch.Tensor:
        logits = super().run_llm(input_ids, cache, logits_to_keep, **inputs)
        self._force("llm", logits, cache, keep(inputs["position_ids"], logits_to_keep))
        return logits

    def _force(self, role: str, logits: torch.Tensor, cache: Any, positions: torch.Tensor) -> torch.Tensor:
        """Make the planned tokens behind these positions the likeliest, and return whether they are flagged."""
        slots = getattr(getattr(cache, "at", None), "slots", None)
        slots = slice(None) if slots is None else slots
        flagged = self.plan.flagged[slots]
        number = (positions + 1 - self.plan.prompts[slots]).clamp(0, flagged.shape[1] - 1)
        if self.plan.tokens:
            tokens = self.plan.tokens[role][slots].gather(1, number)
            logits.scatter_(-1, tokens[..., None], torch.finfo(logits.dtype).max / 2)
        return flagged.gather(1, number)


@contextmanager
def greedy_without_end(model: CiterForCausalLM, disable_compile: bool = False) -> Iterator[None]:
    """Let the pair and both models decode greedily without end tokens, so that all outputs are of equal length."""
    parts = (model, model.slm, model.llm)
    before = [part.generation_config for part in parts]
    for part in parts:
        wanted = {"do_sample": False, "pad_token_id": part.generation_config.pad_token_id or 0}
        part.generation_config = GenerationConfig(**wanted, disable_compile=disable_compile)
    try:
        yield
    finally:
        for part, config in zip(parts, before, strict=True):
            part.generation_config = config


# New tokens `[sequences, new_tokens]`, and which of them the LLM decided.
Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Contender:
    """One way to decode after a batch of prompts, and its measurements."""

    kind: str
    decode: Callable[[Batch], Output]
    setting: Setting | None = None
    # From one run that is not timed.
    counts: dict[str, Any] = field(default_factory=dict)
    # Of each timed repetition.
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        return self.kind if self.setting is None else f"{self.kind}, {self.setting.label}"

    def run(self, batches: Sequence[Batch]) -> list[Output]:
        return [self.decode(batch) for batch in batches]


@dataclass
class Decoders:
    """All ways to decode with a pair. The floor repeats the decisions that the pair made in its first run."""

    model: CiterForCausalLM
    new_tokens: int
    cache_implementation: str | None = None
    seed: int = 0
    agreement: float | None = None
    decisions: dict[tuple[Setting, int], torch.Tensor] = field(default_factory=dict)
    # What is measured with one setting does not decide in another.
    paces: dict[Any, Pace] = field(default_factory=dict)

    def contenders(self, settings: Sequence[Setting], assisted: bool = False) -> list[Contender]:
        slm, llm = self.model.slm, self.model.llm
        found = [Contender(ALONE, partial(self.alone, llm)), Contender(SLM, partial(self.alone, slm))]
        if assisted:
            by_slm = partial(self.alone, llm, cache_implementation=None, **self.assistance())
            found.append(Contender(ASSISTED, by_slm))
            if hasattr(llm.generation_config, "assistant_ensemble_weight"):
                found.append(Contender(ENSEMBLE, partial(by_slm, assistant_ensemble_weight=ENSEMBLE_WEIGHT)))
        found.append(Contender(LOSSLESS, partial(self.citer, Setting(LOSSLESS, 2.0))))
        for setting in settings:
            found.append(Contender(CITER, partial(self.citer, setting), setting))
            found.append(Contender(PLAIN, partial(self.citer, setting, max_drafts=0), setting))
            found.append(Contender(FLOOR, partial(self.floor, setting), setting))
        return found

    @cached_property
    def forced(self) -> ForcedPair:
        return ForcedPair(copy.deepcopy(self.model.config), self.model.slm, self.model.llm, ForcedRouter()).eval()

    def assistance(self) -> dict[str, Any]:
        """Return the keywords with which the SLM assists the LLM in transformers' `generate`."""
        model = self.model
        # transformers takes tables of different sizes for those of different tokenizers.
        same = table_size(model.slm.config) == table_size(model.llm.config)
        both = () if same else ("tokenizer", "assistant_tokenizer")
        return {"assistant_model": model.slm, **dict.fromkeys(both, model.load_tokenizer())}

    def alone(self, model: PreTrainedModel, batch: Batch, **keywords: Any) -> Output:
        prompt, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
        keywords = {"cache_implementation": self.cache_implementation, **keywords}
        output = model.generate(prompt, attention_mask=mask, max_new_tokens=self.new_tokens, **keywords)
        return output[:, batch.length :], None

    def citer(self, setting: Setting, batch: Batch, **keywords: Any) -> Output:
        """Decode with `generate` of the pair."""
        model = self.model
        if setting.share is not None:
            model = self.forced
            model.generation_config = self.model.generation_config
            size = model.vocab_size
            model.plan = Plan.of(batch, self.new_tokens, setting.share, self.agreement, size, self.seed)
        model.pace = self.paces.setdefault((setting, *keywords), Pace())
        output: Any = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=self.new_tokens,
            cache_implementation=self.cache_implementation,
            router_threshold=setting.router_threshold,
            llm_veto=setting.veto,
            return_dict_in_generate=True,
            **keywords,
        )
        to_llm = output.past_key_values.routing.to_llm
        self.decisions.setdefault((setting, batch.number), to_llm)
        return output.sequences[:, batch.length :], to_llm

    @torch.no_grad()
    def floor(self, setting: Setting, batch: Batch) -> Output:
        """Decode greedily with the two bare models and known decisions: no router, no processors, no checks."""
        if (setting, batch.number) not in self.decisions:
            raise ValueError(f"it repeats the decisions of {CITER}, {setting.label}, which failed.")
        to_llm, new_tokens = self.decisions[setting, batch.number], self.new_tokens
        text = nn.functional.pad(batch.input_ids, (0, new_tokens))
        by_llm = to_llm.to(text.device)
        some, every = by_llm.any(0).tolist(), by_llm.all(0).tolist()
        static, size = self.cache_implementation == "static", self.model.vocab_size
        slm, llm = (BareModel(one, batch, new_tokens, static) for one in (self.model.slm, self.model.llm))
        for step in range(new_tokens):
            end = batch.length + step
            tokens = slm.next_tokens(text, end, size)
            if some[step]:
                from_llm = llm.next_tokens(text, end, size)
                tokens = from_llm if every[step] else torch.where(by_llm[:, step], from_llm, tokens)
            text[:, end] = tokens
        return text[:, batch.length :], to_llm


class BareModel:
    """One model and its cache, without `generate`."""

    def __init__(self, model: PreTrainedModel, batch: Batch, new_tokens: int, static: bool = False):
        self.model, self.static, self.seen, longest = model, static, 0, batch.length + new_tokens
        cache = StaticCache(model.config, max_cache_len=longest) if static else DynamicCache(config=model.config)
        compiles = static and model.device.type == "cuda" and not model.generation_config.disable_compile
        self.step = model.get_compiled_call(None) if compiles else model
        self.keywords = {**cache_argument(model, cache), "use_cache": True}
        if model._supports_logits_to_keep():
            self.keywords["logits_to_keep"] = 1
        # Without padding the models count positions by themselves.
        self.mask = self.positions = None
        if not bool(batch.attention_mask.all()):
            self.mask = nn.functional.pad(batch.attention_mask, (0, new_tokens), value=1).to(model.device)
            if "position_ids" in inspect.signature(model.forward).parameters:
                self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)

    def next_tokens(self, text: torch.Tensor, end: int, vocab_size: int) -> torch.Tensor:
        """Run over the unseen tokens of `text[:, :end]`, and return each sequence's most likely next token."""
        keywords: dict[str, Any] = dict(self.keywords)
        if self.mask is not None:
            # The causal mask hides empty places of a static cache: the mask keeps its shape.
            keywords["attention_mask"] = self.mask if self.static else self.mask[:, :end]
        if self.positions is not None:
            keywords["position_ids"] = self.positions[:, self.seen : end]
        run = self.step if self.seen else self.model
        logits = run(input_ids=text[:, self.seen : end].to(self.model.device), **keywords).logits
        self.seen = end
        return logits[:, -1, :vocab_size].argmax(-1).to(text.device)


@contextmanager
def count_passes(model: CiterForCausalLM) -> Iterator[tuple[list[tuple[int, int, int]], ...]]:
    """Collect the passes of the SLM and of the LLM as (sequences, tokens, cached tokens). Hooks cost time."""
    passes: tuple[list[tuple[int, int, int]], ...] = ([], [])

    def note(found: list[tuple[int, int, int]], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        found.append((*input_ids.shape, 0 if cache is None else int(cache.get_seq_length())))

    parts = zip((model.slm, model.llm), passes, strict=True)
    handles = [part.register_forward_pre_hook(partial(note, found), with_kwargs=True) for part, found in parts]
    # A compiled pass calls no hooks.
    with greedy_without_end(model, disable_compile=True):
        try:
            yield passes
        finally:
            for handle in handles:
                handle.remove()
