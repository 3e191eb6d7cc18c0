"""Everything that writes the same number of tokens after the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from .forced import ForcedRouter, decides_by, forced_numbers, replayed_numbers
from .loops import floor_loop, released_loop
from .options import BenchOptions, Setting
from .prompts import Batch

__all__ = ["ALONE", "ASSISTED", "CITER", "FLOOR", "LOCK_STEP", "RELEASED", "SLM", "Contender", "Text", "contenders"]

ALONE, SLM, ASSISTED = "LLM alone", "SLM alone", "assisted generation"
CITER, LOCK_STEP, FLOOR, RELEASED = "CITER", "CITER in lock-step", "floor", "released loop"


@dataclass(frozen=True)
class Text:
    """What one contender wrote after one batch of prompts."""

    tokens: torch.Tensor
    to_llm: torch.Tensor | None = None


# Takes a batch, its number, and whether to stop after the first step.
Decode = Callable[[Batch, int, bool], Text]


@dataclass(frozen=True)
class Contender:
    """One way to decode."""

    kind: str
    decode: Decode
    setting: Setting | None = None
    required: bool = True

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.kind if self.setting is None else f"{self.kind}, {self.setting.label}"


class Decisions:
    """Who wrote each token of a setting's texts, for everything that follows the same decisions."""

    def __init__(self) -> None:
        self._known: dict[tuple[Setting, int], torch.Tensor] = {}

    def note(self, contender: Contender, number: int, text: Text) -> None:
        """Keep what a pair has decided."""
        if contender.setting is not None and contender.kind == CITER and text.to_llm is not None:
            self._known[contender.setting, number] = text.to_llm

    def of(self, setting: Setting, number: int) -> torch.Tensor:
        """Return the decisions of a setting, bool `[rows, new_tokens]`."""
        return self._known[setting, number]


def contenders(model: Any, options: BenchOptions, decisions: Decisions) -> list[Contender]:
    """Return everything that is to be compared, in an order in which each finds the decisions that it follows."""
    every = [
        Contender(ALONE, generates(model.llm, options)),
        Contender(SLM, generates(model.slm, options)),
    ]
    if options.assisted:
        # transformers refuses static caches there.
        dynamic = replace(options, cache_implementation=None) if options.static else options
        every.append(Contender(ASSISTED, generates(model.llm, dynamic, assistant_model=model.slm), required=False))
    floor = partial(floor_loop, static=options.static)
    for setting in options.settings:
        every.append(Contender(CITER, routes(model, options, setting), setting))
        if options.batch_size > 1:
            repeats = routes(model, options, setting, decisions, waiting_rows=1)
            every.append(Contender(LOCK_STEP, repeats, setting, False))
        every.append(Contender(FLOOR, follows(floor, model, options, setting, decisions), setting))
        if options.released_loop:
            every.append(Contender(RELEASED, follows(released_loop, model, options, setting, decisions), setting))
    return every


def generates(model: Any, options: BenchOptions, **keywords: Any) -> Decode:
    """Decode with `generate` of one model."""

    def decode(batch: Batch, number: int, first_only: bool) -> Text:
        device = model.device
        output = model.generate(
            batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            **limits(options, first_only),
            **keywords,
        )
        return Text(output[:, batch.length :])

    return decode


def routes(
    model: Any, options: BenchOptions, setting: Setting, decisions: Decisions | None = None, **keywords: Any
) -> Decode:
    """Decode with `generate` of the pair."""
    # Of each batch, made when it is decoded for the first time, which nobody times.
    routers: dict[int, ForcedRouter] = {}

    def router_of(batch: Batch, number: int) -> ForcedRouter | None:
        if setting.share is None:
            return None
        if number not in routers:
            tokens = batch.rows * options.max_new_tokens
            routers[number] = ForcedRouter(
                forced_numbers(tokens, options.seed, number)
                if decisions is None
                else replayed_numbers(decisions.of(setting, number))
            )
        routers[number].reset()
        return routers[number]

    def decode(batch: Batch, number: int, first_only: bool) -> Text:
        with decides_by(model, router_of(batch, number)):
            output = model.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                router_threshold=setting.router_threshold,
                return_dict_in_generate=True,
                **limits(options, first_only),
                **keywords,
            )
        return Text(output.sequences[:, batch.length :], output.past_key_values.routing.to_llm)

    return decode


def follows(
    loop: Callable[[Any, Batch, torch.Tensor, int], torch.Tensor],
    model: Any,
    options: BenchOptions,
    setting: Setting,
    decisions: Decisions,
) -> Decode:
    """Decode with a loop that follows what the pair has decided before."""

    def decode(batch: Batch, number: int, first_only: bool) -> Text:
        to_llm = decisions.of(setting, number)
        return Text(loop(model, batch, to_llm, 1 if first_only else options.max_new_tokens), to_llm)

    return decode


def limits(options: BenchOptions, first_only: bool) -> dict[str, Any]:
    """Return the keywords of `generate` that say how long the text is."""
    if first_only and options.static:
        # A criterion of one's own would keep the pair from its static path; the first token needs no other pass.
        return {"max_new_tokens": 1, "cache_implementation": options.cache_implementation}
    keywords: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    if options.cache_implementation is not None:
        keywords["cache_implementation"] = options.cache_implementation
    if first_only:
        keywords["stopping_criteria"] = StoppingCriteriaList([stop_at_once])
    return keywords


def stop_at_once(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    """Stop every row; a stopping criterion."""
    return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def greedy_without_end(model: Any) -> Iterator[None]:
    """Let the pair and both models decode greedily to the last token: all texts are of equal length."""
    parts = (model, model.slm, model.llm)
    before = [part.generation_config for part in parts]
    for part in parts:
        pad = part.generation_config.pad_token_id
        part.generation_config = GenerationConfig(do_sample=False, pad_token_id=0 if pad is None else pad)
    try:
        yield
    finally:
        for part, config in zip(parts, before, strict=True):
            part.generation_config = config
