"""The plot of an evaluation: accuracy against cost."""

from pathlib import Path
from typing import Any

from citer_hf.runs import atomic_write, import_extra

from .results import Results

# Okabe and Ito's colours, which people who are colour-blind tell apart; marks carry the same information.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#000000", "#888888")
MARKS = "os^DvPX"
INCHES = (15.0, 6.0)
LEVEL = 0.95


def draw(results: Results, path: Path) -> None:
    """Draw accuracy against LLM tokens, LLM passes and bytes, into a file that is whole or not there."""
    # A figure that needs no display.
    figure = import_extra("matplotlib.figure", "plot").Figure(figsize=INCHES, layout="constrained")
    costs = {
        "llm_share": (0.01, "tokens that the LLM decides (%)"),
        "llm_calls": (1.0, "LLM passes per token"),
        "bytes": (1e6, "memory traffic per token, decoded alone (MB)"),
    }
    panels = figure.subplots(1, len(costs), sharey=True)
    panels[0].set(ylabel="problems answered right (%)")
    for axes, (cost, (size, label)) in zip(panels, costs.items(), strict=True):
        _draw_curves(axes, results, cost, size)
        axes.set(xlabel=label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    # Results of earlier versions call the pair `model`.
    origin = results.provenance
    name, problems = (origin.get("router") or origin.get("model") or {}).get("name"), origin.get("problems")
    title = "Accuracy and cost" + (f" of {name}" if name else "") + (f", {problems} problems" if problems else "")
    figure.suptitle(f"{title}; shaded: 95 % intervals", x=0.01, ha="left", fontsize=11)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def _draw_curves(axes: Any, results: Results, cost: str, scale: float) -> None:
    slm, llm = results.ends["slm"], results.ends["llm"]
    for index, (name, of_method) in enumerate(results.methods.items()):
        # A line from end to end with the interval shaded; marks are where something was measured.
        points, colour, mark = [slm, *of_method, llm], COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        costs = [getattr(point, cost) / scale for point in points]
        low, high = ([point.accuracy_ci[side] * 100 for point in points] for side in (0, 1))
        axes.fill_between(costs, low, high, color=colour, alpha=0.13, linewidth=0)
        style = "--" if of_method and of_method[0].veto else "-"
        marks: dict[str, Any] = {"marker": mark, "markersize": 5.5, "markevery": [*range(1, len(points) - 1)]}
        axes.plot(costs, [point.accuracy * 100 for point in points], color=colour, ls=style, label=name, **marks)
    for end, name, place in ((slm, "SLM alone", (9, -14)), (llm, "LLM alone", (-9, 9))):
        x, y = getattr(end, cost) / scale, end.accuracy * 100
        errors = [[y - end.accuracy_ci[0] * 100], [end.accuracy_ci[1] * 100 - y]]
        axes.errorbar([x], [y], yerr=errors, color="black", capsize=3, marker="h", markersize=9, zorder=5, ls="")
        side = "left" if end is slm else "right"
        axes.annotate(name, (x, y), xytext=place, textcoords="offset points", ha=side, weight="bold")
    label = f"{LEVEL * 100:.0f} % of the LLM's accuracy"
    axes.axhline(LEVEL * llm.accuracy * 100, color="#555555", linewidth=1, linestyle=(0, (6, 4)), label=label)
    bottom = min(point.accuracy_ci[0] for point in (slm, llm)) * 100
    axes.set_ylim(max(bottom - 8, 0), min(llm.accuracy_ci[1] * 100 + 6, 106))
    axes.set_xlim(left=-0.02 * getattr(llm, cost) / scale)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
