"""The plot of an evaluation: accuracy against cost."""

from itertools import cycle
from pathlib import Path
from typing import Any

from citer_hf.runs import atomic_write, import_extra

from .results import Results

# Okabe and Ito's colours, which people who are colour-blind tell apart; marks carry the same information.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#000000", "#888888")
MARKS = "os^DvPX"
# Of each cost: its unit, and its name.
AXES = {
    "llm_share": (0.01, "tokens that the LLM decides (%)"),
    "llm_calls": (1.0, "LLM passes per token"),
    "bytes": (1e6, "memory traffic per token, decoded alone (MB)"),
}
LEVEL = 0.95


def draw(results: Results, path: Path) -> None:
    """Draw accuracy against LLM tokens, LLM passes and bytes, into a file that is whole or not there."""
    # A figure that needs no display.
    figure = import_extra("matplotlib.figure", "plot").Figure(figsize=(15, 6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    panels[0].set(ylabel="problems answered right (%)")
    for axes, (cost, (unit, name)) in zip(panels, AXES.items(), strict=True):
        _draw_curves(axes, results, cost, unit)
        axes.set(xlabel=name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    # Results of earlier versions call the pair `model`.
    origin = results.provenance
    name = (origin.get("router") or origin.get("model") or {}).get("name") or "the pair"
    told = "shaded: 95 % intervals; dotted: nothing measured in between"
    figure.suptitle(f"Accuracy and cost of {name}, {origin.get('problems')} problems; {told}")
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def _draw_curves(axes: Any, results: Results, cost: str, unit: float) -> None:
    slm, llm = results.ends["slm"], results.ends["llm"]
    for (name, of_method), colour, mark in zip(results.methods.items(), cycle(COLOURS), cycle(MARKS), strict=False):
        # The interval is shaded from end to end; marks are of what was measured; dotted lines lead to the ends.
        points = [slm, *of_method, llm]
        costs = [getattr(point, cost) / unit for point in points]
        low, high = ([point.accuracy_ci[side] * 100 for point in points] for side in (0, 1))
        axes.fill_between(costs, low, high, color=colour, alpha=0.13, linewidth=0)
        style = "--" if of_method and of_method[0].veto else "-"
        accuracies = [point.accuracy * 100 for point in points]
        axes.plot(costs, accuracies, color=colour, ls=":", linewidth=0.9)
        axes.plot(costs[1:-1], accuracies[1:-1], color=colour, ls=style, label=name, marker=mark)
    for end, name, mark in ((slm, "SLM alone", "kh"), (llm, "LLM alone", "k*")):
        axes.plot(getattr(end, cost) / unit, end.accuracy * 100, mark, markersize=10, label=name)
    label = f"{LEVEL:.0%} of the LLM's accuracy"
    axes.axhline(LEVEL * llm.accuracy * 100, color="#555555", linewidth=1, linestyle="--", label=label)
    axes.grid(alpha=0.25)
