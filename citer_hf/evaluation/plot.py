"""Accuracy against cost, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from citer_hf.runs import new_figure, save_figure

from .points import Point
from .results import Results

__all__ = ["draw"]

# Okabe and Ito's colours, which people who are colour-blind tell apart; marks and dashes say it again.
STYLES: dict[str, dict[str, Any]] = {
    "citer-plus": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "citer": {"color": "#E69F00", "marker": "s", "linestyle": "-"},
    "citer-s": {"color": "#56B4E9", "marker": "^", "linestyle": (0, (5, 2))},
    "co-llm": {"color": "#D55E00", "marker": "D", "linestyle": (0, (5, 2))},
    "query": {"color": "#009E73", "marker": "v", "linestyle": "-."},
    "entropy": {"color": "#CC79A7", "marker": "P", "linestyle": ":"},
    "confidence": {"color": "#000000", "marker": "X", "linestyle": ":"},
    "random": {"color": "#888888", "marker": "*", "linestyle": (0, (1, 3))},
}
LABELS = {
    "citer-plus": "CITER-plus",
    "citer": "CITER",
    "citer-s": "CITER-S (no long-term effect)",
    "co-llm": "Co-LLM",
    "query": "one decision per prompt (RouteLLM's setting)",
    "entropy": "SLM entropy",
    "confidence": "SLM confidence",
    "random": "random tokens",
}
# For methods of other names.
MORE = [{"color": color, "marker": mark, "linestyle": "--"} for color, mark in (("#8C6D00", "<"), ("#4B0082", ">"))]
INCHES = (11.5, 6.0)
LEVEL = 0.95


def draw(results: Results, path: Path) -> None:
    """Draw accuracy against LLM share and against bytes per token, into a file that is whole or not there."""
    figure = new_figure(INCHES)
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = _unit(results.ends["llm"].bytes)
    _fill(left, results, "llm_share", 0.01)
    _fill(right, results, "bytes", scale)
    left.set(xlabel="tokens that the LLM writes (%)", ylabel="problems answered rightly (%)")
    right.set(xlabel=f"memory traffic per token, decoded alone ({unit})")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(_title(results), x=0.01, ha="left", fontsize=11)
    save_figure(figure, path)


def _unit(largest: float) -> tuple[float, str]:
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if largest >= size), (1e3, "kB"))


def _title(results: Results) -> str:
    problems = results.provenance.get("problems")
    name = (results.provenance.get("model") or {}).get("name")
    where = f" of {name}" if name else ""
    return f"Accuracy and cost{where}" + (f", {problems} problems" if problems else "") + "; shaded: 95 % intervals"


def _fill(axes: Any, results: Results, cost: str, scale: float) -> None:
    slm, llm = results.ends["slm"], results.ends["llm"]
    for index, (name, points) in enumerate(results.methods.items()):
        style = STYLES.get(name, MORE[index % len(MORE)])
        _curve(axes, [slm, *points, llm], cost, scale, LABELS.get(name, name), style)
    for end, name, place in ((slm, "SLM alone", (9, -14)), (llm, "LLM alone", (-9, 9))):
        x, y = getattr(end, cost) / scale, end.accuracy * 100
        errors = [[y - end.accuracy_ci[0] * 100], [end.accuracy_ci[1] * 100 - y]]
        axes.errorbar(
            [x], [y], yerr=errors, color="black", capsize=3, marker="h", markersize=9, zorder=5, linestyle=""
        )
        axes.annotate(
            name, (x, y), xytext=place, textcoords="offset points", ha="left" if end is slm else "right", weight="bold"
        )
    level = LEVEL * llm.accuracy * 100
    axes.axhline(
        level, color="#555555", linewidth=1, linestyle=(0, (6, 4)), label=f"{LEVEL * 100:.0f} % of the LLM's accuracy"
    )
    bottom = min(point.accuracy_ci[0] for point in (slm, llm)) * 100
    axes.set_ylim(max(bottom - 8, 0), min(llm.accuracy_ci[1] * 100 + 6, 106))
    axes.set_xlim(left=-0.02 * getattr(llm, cost) / scale)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Any, points: Sequence[Point], cost: str, scale: float, label: str, style: dict[str, Any]) -> None:
    """Draw a line from end to end with the interval shaded; marks are where something was measured."""
    costs = [getattr(point, cost) / scale for point in points]
    axes.fill_between(
        costs,
        [point.accuracy_ci[0] * 100 for point in points],
        [point.accuracy_ci[1] * 100 for point in points],
        color=style["color"],
        alpha=0.13,
        linewidth=0,
    )
    marks = range(1, len(points) - 1)
    accuracies = [point.accuracy * 100 for point in points]
    axes.plot(costs, accuracies, label=label, linewidth=1.7, markersize=5.5, markevery=list(marks), **style)
