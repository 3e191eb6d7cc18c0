"""Results of an evaluation: costs of outputs, points of accuracy against cost, figures of curves, and tables."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from citer_hf.costs import cost_of_model, flops
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.runs import read_json, write_json

Cost = Literal["llm_share", "bytes"]

RESAMPLES = 2000
# Numbers that the bootstrap draws at a time: bounds the memory.
CHUNK = 1 << 22
# Fractions of the LLM's accuracy, and LLM shares, at which methods are compared.
LEVELS = (0.90, 0.92, 0.95, 0.98)
MATCHED_SHARES = (0.05, 0.1, 0.2, 0.3)
GRID = tuple(step / 100 for step in range(1, 100))
WIDE = 140
ENDS = {"slm": "SLM alone", "llm": "LLM alone"}

# --- Costs of outputs (CITER, section 4.1: bytes moved), as each is decoded alone with a cache for each model --------


class PairCosts:
    """Costs of outputs, each an array `[bytes moved, operations, LLM passes]`."""

    def __init__(self, model: CiterForCausalLM):
        self._models = {False: cost_of_model(model.slm), True: cost_of_model(model.llm)}
        self._steps = {by_llm: [np.zeros(3)] for by_llm in self._models}
        self.one_pass = cache(self._one_pass)

    def _one_pass(self, by_llm: bool, tokens: int, context: int) -> np.ndarray:
        """Cost of a pass over some tokens behind others in the cache; logits of the last one are computed."""
        cost = self._models[by_llm]
        return np.array([cost.bytes_moved(1, tokens, context), flops(cost, tokens, context), by_llm])

    def alone(self, by_llm: bool, prompt: int, tokens: int) -> np.ndarray:
        """Cost of an output of one model alone: a pass over the prompt, and over each new token but the last."""
        steps = self._steps[by_llm]  # the sum of all passes over one token behind fewer tokens
        while len(steps) < prompt + tokens:
            steps.append(steps[-1] + self.one_pass(by_llm, 1, len(steps) - 1))
        return self.one_pass(by_llm, prompt, 0) + steps[prompt + tokens - 1] - steps[prompt]

    def routed(self, scoring: np.ndarray, prompt: int, to_llm: Sequence[bool]) -> np.ndarray:
        """Cost of an output that is routed token by token; the LLM catches up with all tokens since its last pass."""
        cost = self.alone(False, prompt, len(to_llm)) + scoring * len(to_llm)
        seen = 0
        for place, by_llm in enumerate(to_llm, prompt):
            if by_llm:
                cost, seen = cost + self.one_pass(True, place - seen, seen), place
        return cost

    def routed_by_query(self, scoring: np.ndarray, prompt: int, tokens: int, by_llm: bool) -> np.ndarray:
        """Cost of an output whose model is chosen once, after the SLM's pass over the prompt."""
        cost = self.alone(by_llm, prompt, tokens) + scoring
        return cost + self.one_pass(False, prompt, 0) if by_llm else cost


def scoring_cost(router: nn.Module) -> np.ndarray:
    """Return the cost of one score: every weight is read, multiplied and added; embeddings are looked up."""
    tables = {id(module.weight) for module in router.modules() if isinstance(module, nn.Embedding)}
    weights = [one for one in router.parameters() if id(one) not in tables]
    return np.array([sum(one.nbytes for one in weights), 2 * sum(one.numel() for one in weights), 0])


# --- Points and curves ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Accuracy and cost of one way to decode; costs are per new token of all outputs together."""

    threshold: float | None
    accuracy: float
    accuracy_ci: tuple[float, float]
    llm_share: float
    llm_calls: float
    bytes: float
    flops: float
    seconds: float
    extracted: float


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


Ends = Mapping[str, Point]


def _curve(ends: Ends, points: Sequence[Point], cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    """Return costs in ascending order and accuracies, from the SLM alone to the LLM alone."""
    dearest = getattr(ends["llm"], cost)
    between = [(getattr(one, cost), one.accuracy) for one in points if getattr(one, cost) < dearest]
    curve = sorted([(getattr(ends["slm"], cost), ends["slm"].accuracy), *between])
    costs, accuracies = zip(*curve, (dearest, ends["llm"].accuracy), strict=True)
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


def _area(ends: Ends, points: Sequence[Point], cost: Cost) -> float | None:
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
    return {
        "auc": _area(ends, points, "llm_share"),
        "auc_bytes": _area(ends, points, "bytes"),
        "share_at_95": cost_at(ends, points, 0.95),
        "share_at_98": cost_at(ends, points, 0.98),
        "bytes_at_95": cost_at(ends, points, 0.95, "bytes"),
        "bytes_at_98": cost_at(ends, points, 0.98, "bytes"),
        "accuracy_at": {str(share): accuracy_at(ends, points, share) for share in MATCHED_SHARES},
    }


@dataclass(frozen=True)
class Comparison:
    """One method against another: savings at fractions of the LLM's accuracy, and the largest lead at equal cost."""

    share_saving: dict[float, float | None]
    bytes_saving: dict[float, float | None]
    gain: float
    gain_at_share: float
    gain_at_bytes: float


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


# --- All methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Accuracy and cost of several methods on the same problems, as `results.json` holds them.

    Args:
        ends: The points of the SLM alone (`slm`) and of the LLM alone (`llm`).
        methods: The points of every method, from few to many LLM tokens.
        summary: The figures of every method: areas, costs of an accuracy, accuracies at a cost.
        provenance: The router (`router_sha256`), base models with their commits, versions, machine, options, data.
        shipped: The method that the others are compared with in the tables, if any.
    """

    ends: dict[str, Point]
    methods: dict[str, list[Point]]
    summary: dict[str, dict[str, Any]]
    provenance: dict[str, Any]
    shipped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def write(self, path: str | Path) -> None:
        """Write `results.json`, whole or not at all.

        Args:
            path: The file.
        """
        write_json(Path(path), self.as_dict())

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Load a `results.json`, also of earlier versions, whose provenance has other keys.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file holds something else.
        """
        values = read_json(Path(path))
        try:
            ends = {name: _point(point) for name, point in values["ends"].items()}
            methods = {name: [_point(one) for one in points] for name, points in values["methods"].items()}
            return cls(ends, methods, values["summary"], values["provenance"], values.get("shipped"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected the results of `citer evaluate`, got a file without {error}."
            ) from error

    def compare(self, name: str, other: str) -> Comparison:
        """Return the comparison of two methods at equal accuracy and at equal cost.

        Args:
            name: The method that may save something.
            other: The method that it is compared with.
        """
        return compare(self.ends, self.methods[name], self.methods[other])

    def table(self, width: int = WIDE) -> str:
        """Return the tables as text for a terminal: all points, and the summary last, where it is read first.

        Args:
            width: Columns of the terminal.
        """
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        text = io.StringIO()
        console = Console(file=text, width=width)
        for title, header, rows in reversed(list(_tables(self))):
            table = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
            for index, name in enumerate(header):
                table.add_column(name, justify="right" if index else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        return text.getvalue().rstrip("\n")

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        parts = []
        for title, header, rows in _tables(self):
            ruler = ["---", *["---:"] * (len(header) - 1)]
            heading = [name.replace("\n", " ") for name in header]
            lines = ["| " + " | ".join(cells) + " |" for cells in (heading, ruler, *rows)]
            parts.append("\n".join([f"**{title}**", "", *lines]))
        return "\n\n".join(parts) + "\n"


def _point(values: Mapping[str, Any]) -> Point:
    return Point(**{**values, "accuracy_ci": tuple(values["accuracy_ci"])})


def make_results(
    ends: Ends, methods: Mapping[str, Sequence[Point]], provenance: Mapping[str, Any], shipped: str | None = None
) -> Results:
    """Put points in order and add the summary."""
    ordered = {name: sorted(points, key=lambda point: point.llm_share) for name, points in methods.items()}
    summary = {name: summarize(ends, points) for name, points in ordered.items()}
    return Results(dict(ends), ordered, summary, dict(provenance), shipped)


# --- Tables ---------------------------------------------------------------------------------------------------------

# A title, the cells of the header (their lines are one in Markdown), and the rows.
Tables = Iterator[tuple[str, list[str], list[list[str]]]]


def _tables(results: Results) -> Tables:
    problems = results.provenance.get("problems")
    of = f" ({problems} problems)" if problems else ""
    shares = next((list(one["accuracy_at"]) for one in results.summary.values()), [])
    header = ["method", "area\nunder it", "LLM tokens for\n95 / 98 %", "MB / token for\n95 / 98 %"]
    yield (
        f"The curves{of}: cost of 95 and 98 % of the LLM's accuracy, answers right at shares of LLM tokens",
        [*header, *(f"right\nat {float(share):.0%}" for share in shares)],
        [_summary_row(name, one) for name, one in results.summary.items()],
    )
    others = [name for name in results.methods if name != results.shipped]
    if results.shipped is not None and others:
        yield (
            f"LLM tokens / bytes saved by {results.shipped} at fractions of the LLM's accuracy; lead at equal cost",
            ["against", *(f"at {level * 100:.0f} %" for level in LEVELS), "largest lead,\npoints"],
            [_comparison_row(name, results.compare(results.shipped, name)) for name in others],
        )
    points = [(name, point) for name, of_method in results.methods.items() for point in of_method]
    points = [(ENDS["slm"], results.ends["slm"]), *points, (ENDS["llm"], results.ends["llm"])]
    header = ["method", "threshold", "accuracy, %\n(95 % interval)", "LLM\ntokens", "LLM passes\n/ token"]
    yield (
        f"All points{of}; bytes and operations as each text decodes alone",
        [*header, "MB\n/ token", "MFLOP\n/ token", "ms\n/ token"],
        [_point_row(name, point) for name, point in points],
    )


def _summary_row(name: str, one: Mapping[str, Any]) -> list[str]:
    return [
        name,
        "" if one["auc"] is None else f"{one['auc']:.3f}",
        " / ".join(_percent(one[f"share_at_{level}"]) for level in (95, 98)),
        " / ".join(_mega(one[f"bytes_at_{level}"]) for level in (95, 98)),
        *(f"{accuracy:.1%}" for accuracy in one["accuracy_at"].values()),
    ]


def _comparison_row(name: str, compared: Comparison) -> list[str]:
    savings = [(compared.share_saving[level], compared.bytes_saving[level]) for level in LEVELS]
    gains = f"{compared.gain * 100:+.1f} / {compared.gain_at_bytes * 100:+.1f}"
    return [name, *(" / ".join(map(_percent, saving)) for saving in savings), gains]


def _point_row(name: str, point: Point) -> list[str]:
    low, high = point.accuracy_ci
    return [
        name,
        "" if name in ENDS.values() or point.threshold is None else f"{point.threshold:.5g}",
        f"{point.accuracy * 100:.1f} ({low * 100:.1f}–{high * 100:.1f})",
        f"{point.llm_share:.1%}",
        f"{point.llm_calls:.3f}",
        _mega(point.bytes),
        _mega(point.flops),
        f"{point.seconds * 1000:.3g}",
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _mega(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.4g}"
