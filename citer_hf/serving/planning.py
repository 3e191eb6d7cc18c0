"""From a request to its answers, which the inference thread writes."""

import copy
import re
import secrets
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import StopStringCriteria

from ..model.routers import as_threshold
from ..model.sampling import InexactError
from . import ServeOptions
from .answers import Answer
from .grammar import Grammars
from .requests import UsedTokens, answer_length, generation_settings, prompts_of
from .schema import ChatRequest, refusal
from .text import AnswerText, open_thought, parser_of


class Planner:
    """Knows the pair and the server's own settings."""

    def __init__(self, model: Any, tokenizer: Any, options: ServeOptions):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        threshold = options.router_threshold
        self.threshold = as_threshold(model.default_threshold if threshold is None else threshold)
        limits = [limit for limit in (model.config.max_position_embeddings, options.max_model_len) if limit]
        self.context = min(limits, default=None)
        settings = model.generation_config
        self.is_static = (options.cache_implementation or settings.cache_implementation) == "static"
        if self.is_static and self.context is None:
            raise ValueError("cache_implementation: static needs a fixed length. Give max_model_len too.")
        end: Any = settings.eos_token_id
        end_tokens = [] if end is None else [end] if isinstance(end, int) else list(end)
        self.grammars = Grammars(tokenizer, model.vocab_size, end_tokens)
        self.specials = {token: str(one) for token, one in tokenizer.added_tokens_decoder.items() if one.special}
        self.decoded = lru_cache(1 << 16)(partial(text_and_bytes, tokenizer))

    def answers(self, body: Any, arrived: float, tell: Callable[[Any], None]) -> list[Answer]:
        """Return the answers that a request asks for, those to one prompt side by side."""
        is_chat, begun_writing, cancelled = isinstance(body, ChatRequest), threading.Event(), threading.Event()
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        top, given = number_of_logprobs(body), [] if is_chat else body.prompt
        routes = bool(body.stream and body.stream_options and body.stream_options.include_routing)
        usual, most = self.model.generation_config.max_new_tokens, self.options.max_new_tokens
        planned = list[Answer]()
        for place, prompt in enumerate(prompts_of(self.tokenizer, body, self.model.vocab_size)):
            length, text = answer_length(body, len(prompt), usual, most, self.context), self.tokenizer.decode(prompt)
            begun, thinks = open_thought(self.tokenizer, self.model.llm, text) if is_chat else ("", "")
            echo = None
            if not is_chat and body.echo:
                texts = [given] if isinstance(given, str) else given
                echo = texts[place] if isinstance(texts[place], str) else text
            for number in range(body.n or 1):
                seed = secrets.randbits(63) if body.seed is None else (body.seed + number) % 2**63
                options = self._options(body, prompt, length, thinks)
                # What a request leaves out is not taken from the model's own settings again.
                model = copy.copy(self.model)
                model.generation_config = options["generation_config"]
                try:
                    sequence, alone = model.as_sequence(**options)
                except InexactError as error:
                    raise refusal("logprobs" if error.name == "output_logits" else error.name, error.reason) from None
                if alone:
                    if top is not None or body.llm_veto:
                        raise refusal("llm_veto" if top is None else "logprobs", f"not offered here, since {alone}.")
                    options.pop("llm_veto", None)
                if sequence.choice.generator is not None:
                    sequence.choice.generator.manual_seed(seed)
                parser = parser_of(self.tokenizer, self.model.llm, body, begun)
                planned.append(
                    Answer(
                        number=len(planned),
                        sequence=sequence,
                        alone=alone,
                        text=AnswerText(self.tokenizer, self.specials, stops, parser),
                        tell=tell,
                        begun=begun_writing,
                        cancelled=cancelled,
                        arrived=arrived,
                        deadline=arrived + self.options.timeout,
                        length=length,
                        decoded=self.decoded,
                        top=top,
                        wants_tokens=top is not None or routes,
                        streams=bool(body.stream),
                        echo=echo,
                        generate=partial(model.generate, **options),
                        seed=seed,
                    )
                )
        return planned

    def _options(self, body: Any, prompt: list[int], length: int, thinks: str) -> dict[str, Any]:
        """Return the keywords with which `generate` would write the answer."""
        input_ids = torch.tensor([prompt], device=self.model.device)
        processors = LogitsProcessorList(self.grammars.mask(body, len(prompt), thinks))
        if body.frequency_penalty or body.presence_penalty:
            processors.append(UsedTokens(body, len(prompt)))
        published = self.model.generation_config.stop_strings
        veto = self.options.llm_veto if body.llm_veto is None else body.llm_veto
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "generation_config": generation_settings(self.model, body, length),
            "logits_processor": processors,
            "stopping_criteria": StoppingCriteriaList(
                [] if published is None else [StopStringCriteria(self.tokenizer, published)]
            ),
            "router_threshold": self.threshold if body.router_threshold is None else body.router_threshold,
            **({} if veto is None else {"llm_veto": veto}),
        }


def number_of_logprobs(body: Any) -> int | None:
    """Return how many of the likeliest tokens a client wants to see; `None`: no probabilities at all."""
    if not isinstance(body, ChatRequest):
        return body.logprobs or None
    if not body.logprobs:
        if body.top_logprobs:
            raise refusal("top_logprobs", "expected logprobs to be true.")
        return None
    return body.top_logprobs or 0


def text_and_bytes(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """Return a token's text and bytes; a part of a character has no text, and is written as OpenAI writes it."""
    text, piece = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    data, alphabet = text.encode(), {character: byte for byte, character in bytes_to_unicode().items()}
    if "\ufffd" in text and all(character in alphabet for character in piece):
        data = bytes(alphabet[character] for character in piece)
    elif fallback := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        data = bytes.fromhex(fallback[1])
    return (text if text.encode() == data else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)), data
