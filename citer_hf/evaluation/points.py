"""A point of an accuracy-cost curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .costs import TextCost

__all__ = ["Point", "TextResult", "bootstrap_interval", "make_point"]

RESAMPLES = 2000
# Numbers drawn at a time: bounds the memory.
CHUNK = 1 << 22


@dataclass(frozen=True)
class TextResult:
    """What became of one problem."""

    correct: bool
    extracted: bool
    tokens: int
    llm_tokens: int
    cost: TextCost


@dataclass(frozen=True)
class Point:
    """What one way to decode achieves and costs; costs are per new token of all texts together."""

    threshold: float | None
    accuracy: float
    accuracy_ci: tuple[float, float]
    llm_share: float
    llm_calls: float
    bytes: float
    flops: float
    seconds: float
    extracted: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return asdict(self) | {"accuracy_ci": list(self.accuracy_ci)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Point:
        """Make a point from its JSON form."""
        return cls(**{**values, "accuracy_ci": tuple(values["accuracy_ci"])})


def make_point(results: Sequence[TextResult], threshold: float, seconds: float, seed: int) -> Point:
    """Add up what became of all problems."""
    tokens = sum(one.tokens for one in results)
    correct = [float(one.correct) for one in results]
    return Point(
        threshold=threshold,
        accuracy=sum(correct) / len(results),
        accuracy_ci=bootstrap_interval(correct, seed=seed),
        llm_share=sum(one.llm_tokens for one in results) / tokens,
        llm_calls=sum(one.cost.llm_passes for one in results) / tokens,
        bytes=sum(one.cost.bytes for one in results) / tokens,
        flops=sum(one.cost.flops for one in results) / tokens,
        seconds=seconds / tokens,
        extracted=sum(one.extracted for one in results) / len(results),
    )


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean over problems, or of a ratio of two sums."""
    generator = np.random.default_rng(seed)
    above = np.asarray(values, dtype=np.float64)
    below = np.ones_like(above) if weights is None else np.asarray(weights, dtype=np.float64)
    ratios: list[float] = []
    while len(ratios) < resamples:
        draws = min(max(CHUNK // len(above), 1), resamples - len(ratios))
        chosen = generator.integers(0, len(above), (draws, len(above)))
        ratios += (above[chosen].sum(axis=1) / below[chosen].sum(axis=1)).tolist()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
