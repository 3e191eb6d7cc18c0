"""What a step of each model costs, and from which LLM share on a pair no longer pays."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from citer_hf.model.compat import cache_argument

from .clock import Clock
from .loops import last_logits_only
from .prompts import synthetic_batch

__all__ = ["CATCH_UPS", "BreakEven", "CostCurve", "break_even", "measure_curve"]

CATCH_UPS = (1, 2, 3, 4, 8, 16, 32)
TRIALS = 5
# Shares are told to a tenth of a percent; between two steps the cost changes smoothly.
GRID = 1000


@dataclass(frozen=True)
class CostCurve:
    """Median times of single forward passes."""

    prompt_length: int
    rows: int
    slm_step: float
    llm: Mapping[int, float]

    def llm_seconds(self, tokens: float) -> float:
        """Seconds of a pass of the LLM, straight between what was measured and with the last slope beyond."""
        known = sorted(self.llm)
        if tokens <= known[0]:
            return self.llm[known[0]]
        right = next((size for size in known if size >= tokens), known[-1])
        left = known[max(known.index(right) - 1, 0)]
        if tokens > right:
            return self.llm[right] + self.last_slope * (tokens - right)
        return self.llm[left] + (self.llm[right] - self.llm[left]) * (tokens - left) / (right - left)

    @property
    def last_slope(self) -> float:
        """Seconds that each further token costs in a long pass; what noise makes negative counts as nothing."""
        if len(self.llm) == 1:
            return 0.0
        left, right = sorted(self.llm)[-2:]
        return max((self.llm[right] - self.llm[left]) / (right - left), 0.0)

    def seconds_per_token(self, share: float) -> float:
        """Expected time of CITER per position: a step of the SLM, and with some probability a catch-up of the LLM."""
        p = 1 - (1 - share) ** self.rows
        longest = max(self.llm)
        expected = sum(p * (1 - p) ** (tokens - 1) * self.llm_seconds(tokens) for tokens in range(1, longest + 1))
        # A catch-up that is longer than the longest measured one is longer by a number that is geometric again.
        expected += (1 - p) ** longest * (self.llm[longest] + self.last_slope / p)
        return self.slm_step + p * expected

    def as_dict(self) -> dict[str, Any]:
        """Return everything above in milliseconds, for JSON."""
        return {
            "prompt_length": self.prompt_length,
            "rows": self.rows,
            "slm_step_ms": self.slm_step * 1000,
            "llm_ms": {str(tokens): seconds * 1000 for tokens, seconds in self.llm.items()},
        }


@dataclass(frozen=True)
class BreakEven:
    """The LLM share at which a pair is as fast as the LLM alone."""

    share: float | None
    reason: str = ""


def break_even(curve: CostCurve) -> BreakEven:
    """Compute the share from which on a pair takes longer per token than the LLM alone."""
    alone = curve.llm[1]
    shares = [index / GRID for index in range(1, GRID + 1)]
    slower = [curve.seconds_per_token(share) >= alone for share in shares]
    if slower[0]:
        return BreakEven(
            None,
            f"the pair is slower than the LLM alone at every share: an SLM step takes {curve.slm_step * 1000:.3g} ms "
            f"and an LLM step {alone * 1000:.3g} ms",
        )
    if not any(slower):
        return BreakEven(
            None, "the pair is faster than the LLM alone at every share: an SLM step takes no measurable time"
        )
    high = shares[slower.index(True)]
    low = high - 1 / GRID
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if curve.seconds_per_token(middle) >= alone else (middle, high)
    return BreakEven(low)


@torch.no_grad()
def measure_curve(
    model: Any,
    prompt_length: int,
    rows: int,
    seed: int = 0,
    longest: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> CostCurve:
    """Time single forward passes of both bare models behind a cache of the prompt's length."""
    sizes = [size for size in CATCH_UPS if longest is None or size <= max(longest, 1)]
    slm = PassTimer(model.slm, model.vocab_size, prompt_length, rows, seed)
    llm = PassTimer(model.llm, model.vocab_size, prompt_length, rows, seed)
    slm_times: list[float] = []
    llm_times: dict[int, list[float]] = {size: [] for size in sizes}
    # All sizes in turn, so that whatever else the machine does meanwhile hits them all. The first turn warms up.
    for _ in range(TRIALS + 1):
        slm_times.append(slm.seconds(1))
        for size in sizes:
            llm_times[size].append(llm.seconds(size))
        progress()
    return CostCurve(
        prompt_length=prompt_length,
        rows=rows,
        slm_step=statistics.median(slm_times[1:]),
        llm={size: statistics.median(times[1:]) for size, times in llm_times.items()},
    )


class PassTimer:
    """Times passes of one model, each behind the same cache."""

    def __init__(self, model: Any, vocab_size: int, prompt_length: int, rows: int, seed: int):
        self.model, self.clock = model, Clock(model.device)
        self.tokens = synthetic_batch(vocab_size, prompt_length + max(CATCH_UPS), rows, seed).input_ids.to(
            model.device
        )
        self.length = prompt_length
        self.cache = DynamicCache(config=model.config)
        self.options = {"use_cache": True, **last_logits_only(model)}
        self.read(self.cache, self.tokens[:, :prompt_length])

    def seconds(self, size: int) -> float:
        """Time one pass, and take it back."""
        # Windows and states forget what a pass pushes out, so that it cannot be taken back.
        croppable = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        cache = self.cache if croppable else copy.deepcopy(self.cache)
        seconds = self.clock.seconds(lambda: self.read(cache, self.tokens[:, self.length : self.length + size]))
        if croppable:
            cache.crop(-size)
        return seconds

    def read(self, cache: Any, input_ids: torch.Tensor) -> None:
        """Run one pass."""
        self.model(input_ids=input_ids, **cache_argument(self.model, cache), **self.options)
