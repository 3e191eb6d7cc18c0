"""What a curve says in few numbers, how two curves compare, and the mean of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .points import Point

__all__ = ["Comparison", "accuracy_at", "average_curves", "compare", "cost_at", "summarize"]

Cost = Literal["llm_share", "bytes"]
Ends = Mapping[str, Point]

LEVELS = (0.90, 0.92, 0.95, 0.98)
MATCHED_SHARES = (0.05, 0.1, 0.2, 0.3)
GRID = tuple(step / 100 for step in range(1, 100))


def _curve(ends: Ends, points: Sequence[Point], cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    """Return costs in ascending order and accuracies, from the SLM alone to the LLM alone."""
    dearest = getattr(ends["llm"], cost)
    between = [(getattr(one, cost), one.accuracy) for one in points if getattr(one, cost) < dearest]
    curve = sorted([(getattr(ends["slm"], cost), ends["slm"].accuracy), *between])
    curve.append((dearest, ends["llm"].accuracy))
    costs, accuracies = zip(*curve, strict=True)
    return np.array(costs, dtype=np.float64), np.array(accuracies, dtype=np.float64)


def accuracy_at(ends: Ends, points: Sequence[Point], value: float, cost: Cost = "llm_share") -> float:
    """Return the accuracy at a cost, on straight lines between the points."""
    return float(np.interp(value, *_curve(ends, points, cost)))


def cost_at(ends: Ends, points: Sequence[Point], fraction: float, cost: Cost = "llm_share") -> float | None:
    """Return the least cost at which a method reaches a fraction of the LLM's accuracy, or `None` if it never does."""
    wanted = fraction * ends["llm"].accuracy
    costs, accuracies = _curve(ends, points, cost)
    reached = np.flatnonzero(accuracies >= wanted)
    if len(reached) == 0:
        return None
    first = int(reached[0])
    if first == 0:
        return float(costs[0])
    before, after = accuracies[first - 1], accuracies[first]
    return float(costs[first - 1] + (wanted - before) / (after - before) * (costs[first] - costs[first - 1]))


def area(ends: Ends, points: Sequence[Point], cost: Cost) -> float | None:
    """Return the area under accuracy against cost, both 0 for the SLM alone and 1 for the LLM alone."""
    slm, llm = ends["slm"], ends["llm"]
    if llm.accuracy == slm.accuracy or getattr(llm, cost) <= getattr(slm, cost):
        return None
    costs, accuracies = _curve(ends, points, cost)
    costs = (costs - getattr(slm, cost)) / (getattr(llm, cost) - getattr(slm, cost))
    accuracies = (accuracies - slm.accuracy) / (llm.accuracy - slm.accuracy)
    heights = (accuracies[1:] + accuracies[:-1]) / 2
    return float((np.diff(costs) * heights)[costs[:-1] >= 0].sum())


def summarize(ends: Ends, points: Sequence[Point]) -> dict[str, Any]:
    """Return the figures of one method."""
    summary: dict[str, Any] = {"auc": area(ends, points, "llm_share"), "auc_bytes": area(ends, points, "bytes")}
    for name, cost in (("share", "llm_share"), ("bytes", "bytes")):
        for percent in (95, 98):
            summary[f"{name}_at_{percent}"] = cost_at(ends, points, percent / 100, cost)  # type: ignore[arg-type]
    return summary | {"accuracy_at": {str(share): accuracy_at(ends, points, share) for share in MATCHED_SHARES}}


@dataclass(frozen=True)
class Comparison:
    """How one method stands against another."""

    share_saving: dict[float, float | None]
    bytes_saving: dict[float, float | None]
    gain: float
    gain_at_share: float
    gain_at_bytes: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return asdict(self)


def compare(ends: Ends, points: Sequence[Point], other: Sequence[Point]) -> Comparison:
    """Compare two methods at equal accuracy, from 90 to 98 % of the LLM's, and at equal cost."""

    def saving(fraction: float, cost: Cost) -> float | None:
        own, others = (cost_at(ends, curve, fraction, cost) for curve in (points, other))
        return None if own is None or not others else 1 - own / others

    def lead(value: float, cost: Cost) -> float:
        return accuracy_at(ends, points, value, cost) - accuracy_at(ends, other, value, cost)

    least, most = ends["slm"].bytes, ends["llm"].bytes
    leads = {share: lead(share, "llm_share") for share in GRID}
    best = max(leads, key=lambda share: leads[share])
    return Comparison(
        share_saving={level: saving(level, "llm_share") for level in LEVELS},
        bytes_saving={level: saving(level, "bytes") for level in LEVELS},
        gain=leads[best],
        gain_at_share=best,
        gain_at_bytes=max(lead(least + step * (most - least), "bytes") for step in GRID),
    )


def average_curves(ends: Ends, curves: Sequence[Sequence[Point]], shares: Sequence[float]) -> list[Point]:
    """Return the mean of several curves at the same LLM shares, such as those of routers of several seeds."""

    def value(curve: Sequence[Point], share: float) -> np.ndarray:
        ordered = sorted([ends["slm"], *curve, ends["llm"]], key=lambda point: point.llm_share)
        places = [point.llm_share for point in ordered]
        return np.array([np.interp(share, places, column) for column in zip(*map(_numbers, ordered), strict=True)])

    return [_from_numbers(np.mean([value(curve, share) for curve in curves], axis=0)) for share in shares]


def _numbers(point: Point) -> list[float]:
    numbers = [point.accuracy, *point.accuracy_ci, point.llm_share, point.llm_calls, point.bytes]
    return [*numbers, point.flops, point.seconds, point.extracted]


def _from_numbers(numbers: np.ndarray) -> Point:
    accuracy, low, high, *others = numbers.tolist()
    return Point(None, accuracy, (low, high), *others)
