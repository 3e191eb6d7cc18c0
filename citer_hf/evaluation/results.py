"""Results of an evaluation: costs of outputs, points of accuracy against cost, figures of curves, and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from citer_hf.costs import ModelCost
from citer_hf.runs import read_json
from citer_hf.terminal import table

Cost = Literal["llm_share", "llm_calls", "bytes"]

# What the figures of a cost are called.
COSTS: dict[Cost, str] = {"llm_share": "share", "llm_calls": "calls", "bytes": "bytes"}

# LLM shares at which accuracies are compared.
MATCHED_SHARES = (0.05, 0.1, 0.2, 0.3)
MARKED = (
    "A figure with * was not measured: it is on the line between a point and a model alone, as the ends of areas are."
)
# Percentages of the LLM's accuracy whose costs are compared.
LEVELS = (95, 98)

# --- Bytes moved -----------------------------------------------------------------------------------------------------
#
# Those of the passes in which an output took part, as if no other took part in them; each model has a cache.


@cache
def pass_cost(model: ModelCost, start: int, end: int) -> float:
    """Return the bytes that a pass over the tokens at some places moves."""
    return model.bytes_moved(1, end - start, start)


def cost_of_passes(model: ModelCost, passes: Sequence[tuple[int, int]]) -> float:
    """Return the bytes of passes; the first counts from the first token on, which another output may have shared."""
    return sum(pass_cost(model, start if number else 0, end) for number, (start, end) in enumerate(passes))


def scoring_cost(router: nn.Module) -> int:
    """Return the bytes of one score: every weight is read; embeddings are looked up."""
    tables = {id(module.weight) for module in router.modules() if isinstance(module, nn.Embedding)}
    return sum(one.nbytes for one in router.parameters() if id(one) not in tables)


@dataclass(frozen=True)
class Point:
    """Accuracy and cost of one way to decode; costs are per new token of all outputs together."""

    threshold: float | None
    accuracy: float
    accuracy_ci: tuple[float, float]
    llm_share: float
    llm_calls: float
    bytes: float
    seconds: float
    veto: float = 0.0


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean over problems, or of a ratio of two sums."""
    generator = np.random.default_rng(seed)
    above = np.asarray(values, dtype=np.float64)
    below = np.ones_like(above) if weights is None else np.asarray(weights, dtype=np.float64)
    ratios = []
    for _ in range(resamples):
        chosen = generator.integers(0, len(above), len(above))
        if below[chosen].any():
            ratios.append(above[chosen].sum() / below[chosen].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def _curve(ends: Mapping[str, Point], points: Sequence[Point], cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    """Return costs in ascending order and accuracies, from the SLM alone to the LLM alone."""
    dearest = getattr(ends["llm"], cost)
    between = [(getattr(one, cost), one.accuracy) for one in points if getattr(one, cost) < dearest]
    curve = sorted([(getattr(ends["slm"], cost), ends["slm"].accuracy), *between])
    costs, accuracies = zip(*curve, (dearest, ends["llm"].accuracy), strict=True)
    return np.array(costs, dtype=np.float64), np.array(accuracies, dtype=np.float64)


def accuracy_at(ends: Mapping[str, Point], points: Sequence[Point], value: float, cost: Cost = "llm_share") -> float:
    """Return the accuracy at a cost, on straight lines between the points."""
    return float(np.interp(value, *_curve(ends, points, cost)))


def cost_at(
    ends: Mapping[str, Point], points: Sequence[Point], fraction: float, cost: Cost = "llm_share"
) -> float | None:
    """Return the least cost at which a method reaches a fraction of the LLM's accuracy, or `None` if it never does."""
    wanted = fraction * ends["llm"].accuracy
    costs, accuracies = _curve(ends, points, cost)
    reached = np.flatnonzero(accuracies >= wanted)
    if len(reached) == 0:
        return None
    first = int(reached[0])
    crossing = slice(max(first - 1, 0), first + 1)
    return float(np.interp(wanted, accuracies[crossing], costs[crossing]))


def rests_on_end(ends: Mapping[str, Point], points: Sequence[Point], value: float | None, cost: Cost) -> bool:
    """Return True where a place of a curve is between an end and the method's points, not at or between these."""
    costs = _curve(ends, points, cost)[0]
    return value is not None and not costs[1] <= value <= costs[-2] and value not in (costs[0], costs[-1])


def summarize(ends: Mapping[str, Point], points: Sequence[Point]) -> dict[str, Any]:
    # The area under accuracy, 0 for the SLM alone and 1 for the LLM alone, against the LLM share.
    slm, llm = ends["slm"].accuracy, ends["llm"].accuracy
    shares, accuracies = _curve(ends, points, "llm_share")
    area = (np.diff(shares) * ((accuracies[1:] + accuracies[:-1]) / 2 - slm)).sum()
    figures: dict[str, Any] = {"auc": None if llm == slm else float(area / (llm - slm))}
    places: list[tuple[str, float | None, Cost]] = [(str(share), share, "llm_share") for share in MATCHED_SHARES]
    for cost, name in COSTS.items():
        found = {f"{name}_at_{level}": cost_at(ends, points, level / 100, cost) for level in LEVELS}
        figures, places = figures | found, places + [(figure, value, cost) for figure, value in found.items()]
    figures["accuracy_at"] = {str(share): accuracy_at(ends, points, share) for share in MATCHED_SHARES}
    marked = [name for name, value, cost in places if rests_on_end(ends, points, value, cost)]
    return figures | {"rests_on_end": marked}


@dataclass(frozen=True)
class Results:
    """Accuracy and cost of several methods on the same problems, as `results.json` holds them."""

    ends: dict[str, Point]  # the SLM alone (`slm`) and the LLM alone (`llm`)
    methods: dict[str, list[Point]]  # from few to many LLM tokens
    summary: dict[str, dict[str, Any]]  # areas, costs of an accuracy, accuracies at a cost
    provenance: dict[str, Any]  # router, base models, versions, machine, options, data

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """Load a `results.json`, also of earlier versions; a `ValueError` tells of a file with something else."""
        values = read_json(Path(path))
        try:
            ends = {name: _point(point) for name, point in values["ends"].items()}
            methods = {name: [_point(one) for one in points] for name, points in values["methods"].items()}
            return cls(ends, methods, values["summary"], values["provenance"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected the results of `citer evaluate`, got {error!r}.") from error

    def table(self) -> str:
        """Return all points, and the figures of every curve, as Markdown that is aligned for a terminal."""
        every = {"SLM alone": [self.ends["slm"]], **self.methods, "LLM alone": [self.ends["llm"]]}
        problems = self.provenance.get("problems", "several")
        parts = {
            f"Points of {problems} problems; MB as if each output were decoded alone": [
                _point_row(name, point) for name, points in every.items() for point in points
            ],
            "LLM tokens, passes and MB for 95 / 98 % of the LLM's accuracy, and accuracy at shares of LLM tokens": [
                _curve_row(name, figures) for name, figures in self.summary.items()
            ],
        }
        text = "\n\n".join(f"**{title}**\n\n{table(rows)}" for title, rows in parts.items() if rows)
        is_marked = any(figures.get("rests_on_end") for figures in self.summary.values())
        return f"{text}\n\n{MARKED}" if is_marked else text


def _point(values: Mapping[str, Any]) -> Point:
    # Earlier versions counted operations and outputs with an answer too.
    known = {key: value for key, value in values.items() if key not in ("flops", "extracted")}
    return Point(**{**known, "accuracy_ci": tuple(values["accuracy_ci"])})


def make_results(
    ends: Mapping[str, Point], methods: Mapping[str, Sequence[Point]], provenance: Mapping[str, Any]
) -> Results:
    ordered = {name: sorted(points, key=lambda point: point.llm_share) for name, points in methods.items()}
    summary = {name: summarize(ends, points) for name, points in ordered.items()}
    return Results(dict(ends), ordered, summary, dict(provenance))


def _point_row(name: str, point: Point) -> dict[str, str]:
    low, high = point.accuracy_ci
    return {
        "method": name,
        "threshold": "" if point.threshold is None else f"{point.threshold:.5g}",
        "veto": f"{point.veto:g}",
        "accuracy": f"{point.accuracy:.1%}",
        "95 % interval": f"{low:.1%}–{high:.1%}",
        "LLM tokens": f"{point.llm_share:.1%}",
        "LLM passes / token": f"{point.llm_calls:.3f}",
        "MB / token": f"{point.bytes / 1e6:.4g}",
        "ms / token": f"{point.seconds * 1e3:.3g}",
    }


def _curve_row(name: str, figures: Mapping[str, Any]) -> dict[str, str]:
    # Results of earlier versions have no figures of passes.
    shares, calls, megabytes = ([f"{name}_at_{level}" for level in LEVELS] for name in COSTS.values())
    marked = figures.get("rests_on_end", ())

    def shown(keys: Sequence[str], form: str, unit: float = 1.0) -> str:
        values = {key: figures.get(key) for key in keys}
        cells = ["–" if one is None else f"{one / unit:{form}}{'*' * (key in marked)}" for key, one in values.items()]
        return " / ".join(cells)

    return {
        "method": name,
        "area": "–" if figures["auc"] is None else f"{figures['auc']:.3f}",
        "LLM tokens": shown(shares, ".1%"),
        "passes / token": shown(calls, ".3f"),
        "MB / token": shown(megabytes, ".4g", 1e6),
        **{
            f"at {float(one):.0%}": f"{value:.1%}{'*' * (one in marked)}"
            for one, value in figures["accuracy_at"].items()
        },
    }
