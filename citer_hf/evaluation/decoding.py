"""Greedy decoding of many prompts: in batches of like lengths, by the pair or by one of its models alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.model.schedule import rows_to_wait_for

__all__ = [
    "BATCH_TOKENS",
    "Alone",
    "Decoded",
    "batches",
    "check_room",
    "cut",
    "decode",
    "evaluating",
    "greedy_view",
    "special_tokens",
    "steady_policy",
    "text_lengths",
    "with_router",
]

Alone = Literal["slm", "llm"]

# Prompt and new tokens of all rows of a batch: bounds the memory for keys and values.
BATCH_TOKENS = 1 << 14
# Time of an SLM step over that of an LLM call, from which follows how many rows wait for the LLM. A measured one would
# differ from run to run, and with it the shapes of the batches and the last bits of the scores.
STEP_RATIO = 0.3


@dataclass(frozen=True)
class Decoded:
    """Texts, in the order of the prompts."""

    tokens: list[list[int]]
    to_llm: list[list[bool]]
    scores: list[list[float]]
    seconds: float
    llm_calls: int


def decode(
    model: CiterForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    router_threshold: float | Iterable[float] | None = None,
    max_new_tokens: int,
    alone: Alone | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda texts: None,
) -> Decoded:
    """Write a text after every prompt, greedily, whatever the model's own generation settings are."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected a number of tokens from 1 up, got {value}.")
    limit = model.config.max_position_embeddings
    lengths = [len(prompt) for prompt in prompts]
    check_room(lengths, limit, "prompt number {}")
    thresholds: list[float] | None = None
    if not isinstance(router_threshold, int | float | None):
        thresholds = [float(threshold) for threshold in router_threshold]
    if thresholds is not None and len(thresholds) != len(prompts):
        raise ValueError(f"router_threshold: expected {len(prompts)}, one per prompt, got {len(thresholds)}.")

    writer = _Writer(model, alone)
    texts = Decoded([[]] * len(prompts), [[]] * len(prompts), [[]] * len(prompts), 0.0, 0)
    seconds, llm_calls = 0.0, 0
    for rows, new_tokens in batches(lengths, max_new_tokens, limit, batch_tokens):
        threshold: Any = router_threshold if thresholds is None else [thresholds[row] for row in rows]
        with evaluating(model.router):
            batch = writer.write([prompts[row] for row in rows], new_tokens, threshold)
        seconds += batch.seconds
        llm_calls += batch.llm_calls
        for row, tokens, to_llm, scores in zip(rows, batch.tokens, batch.to_llm, batch.scores, strict=True):
            texts.tokens[row], texts.to_llm[row], texts.scores[row] = tokens, to_llm, scores
        progress(len(rows))
    return Decoded(texts.tokens, texts.to_llm, texts.scores, seconds, llm_calls)


def check_room(lengths: Sequence[int], limit: int | None, name: str, numbers: Sequence[Any] | None = None) -> None:
    """Refuse prompts after which nothing can be written."""
    for index, length in enumerate(lengths):
        called = name.format(index if numbers is None else numbers[index])
        if length == 0:
            raise ValueError(f"{called} is empty: expected at least one token.")
        if limit is not None and length >= limit:
            raise ValueError(
                f"{called} has {length} tokens, which leaves no room for an answer: the pair reads texts of up to "
                f"{limit} tokens. Shorten the prompt or leave it out."
            )


def with_router(model: CiterForCausalLM, router: nn.Module) -> CiterForCausalLM:
    """Return the pair with another router; models and weights are shared, and the given pair stays as it is."""
    other = _view(model)
    other._modules = {**model._modules, "router": router}
    return other


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation for a while: no dropout, and batch norm as it was learnt."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _view(model: Any) -> Any:
    """Copy a model without its weights, so that an attribute can be changed for one use."""
    return copy.copy(model)


def batches(
    lengths: Sequence[int], max_new_tokens: int, limit: int | None, batch_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Group prompts of like lengths, the longest first, so that memory that is too small shows at once."""
    rows: list[int] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        own_room = max_new_tokens if limit is None else min(max_new_tokens, limit - lengths[row])
        if rows and (own_room != room or (len(rows) + 1) * (lengths[rows[0]] + room) > batch_tokens):
            yield rows, room
            rows = []
        rows.append(row)
        room = own_room
    if rows:
        yield rows, room


def steady_policy(unfinished: int, llm_share: float, step_ratio: float) -> int:
    """Choose how many rows wait for the LLM as `generate` does, but not by measured times."""
    return rows_to_wait_for(unfinished, llm_share, STEP_RATIO)


class _Writer:
    """Writes one batch after the other with one set of plain settings."""

    def __init__(self, model: CiterForCausalLM, alone: Alone | None):
        self.model, self.alone = model, alone
        self.end_tokens, self.padding = special_tokens(model)
        self.writer = greedy_view(model, alone)

    def write(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, threshold: float | Sequence[float] | None
    ) -> Decoded:
        """Write one batch."""
        device = self.model.slm.device if self.alone is None else self.writer.device
        width = max(map(len, prompts))
        padded = [[self.padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        options: dict[str, Any] = {}
        cache = CiterCache(self.model.config)
        if self.alone is None:
            given = isinstance(threshold, Sequence)
            options = {
                "router_threshold": torch.tensor(threshold, dtype=torch.float32, device=device)
                if given
                else threshold,
                "past_key_values": cache,
                "waiting_rows": steady_policy,
            }
        inputs = {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }
        began = time.perf_counter()
        output = self.writer.generate(**inputs, max_new_tokens=new_tokens, **options)
        lengths = text_lengths(output[:, width:], self.end_tokens)
        seconds = time.perf_counter() - began
        written = output[:, width:]
        tokens = cut(written, lengths)
        if self.alone is not None:
            by_llm = self.alone == "llm"
            passes = written.shape[1] if by_llm else 0
            return Decoded(tokens, [[by_llm] * length for length in lengths], [[] for _ in lengths], seconds, passes)
        routing = cache.routing
        to_llm, scores = cut(routing.to_llm, lengths), cut(routing.scores, lengths)
        return Decoded(tokens, to_llm, scores, seconds, routing.llm_calls)


def greedy_view(model: CiterForCausalLM, alone: Alone | None = None) -> Any:
    """Return the pair, or one of its models, with settings that decode greedily and do nothing else."""
    # Settings that are not given to `generate` are filled up from the model's own: a view of the model has none.
    view = _view(model if alone is None else getattr(model, alone))
    end_tokens, padding = special_tokens(model)
    view.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_tokens or None, pad_token_id=padding)
    return view


def special_tokens(model: CiterForCausalLM) -> tuple[list[int], int]:
    """Return what ends a text, and what pads: of the pair, so that every model ends alike."""
    config: Any = model.generation_config
    end = config.eos_token_id
    end_tokens = [] if end is None else [end] if isinstance(end, int) else list(end)
    padding = config.pad_token_id
    return end_tokens, int(padding if padding is not None else end_tokens[0] if end_tokens else 0)


def text_lengths(written: torch.Tensor, end_tokens: Sequence[int]) -> list[int]:
    """Return the length of each text, `[batch]`: up to its first end token and with it."""
    ends = torch.isin(written, torch.tensor(end_tokens, dtype=written.dtype, device=written.device))
    return ((ends.cumsum(dim=1) - ends.long()) == 0).sum(dim=1).tolist()


def cut(values: torch.Tensor, lengths: Sequence[int]) -> list[list[Any]]:
    """Return each row of a tensor up to its length."""
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
