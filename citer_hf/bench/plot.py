"""The plot of the bench: the speed-up over the LLM alone against the share of tokens that the LLM decides."""

from pathlib import Path
from typing import Any

from citer_hf.runs import import_extra, new_figure, save_figure

from .contenders import ALONE, ASSISTED, CITER, FLOOR, LOCK_STEP, RELEASED

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind people tell apart, with a marker and a dash for each kind.
STYLES = {
    CITER: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    LOCK_STEP: {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    FLOOR: {"color": "#009E73", "marker": "^", "linestyle": ":"},
    RELEASED: {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
}


def check_plot(path: Path) -> None:
    """Raise an error when a plot cannot be written to a file; for use before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot: expected a file name that ends in {', '.join(SUFFIXES)}, got {path.name!r}.")
    if not path.parent.is_dir() or path.is_dir():
        raise FileNotFoundError(f"--plot: expected the name of a file in a directory that exists, got {path}.")
    import_extra("matplotlib", "plot")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report, as its JSON has it, into a `.png`, `.svg` or `.pdf` file; without times nothing is written."""
    rows = [row for row in report["rows"] if row["speedup"]]
    if not rows:
        return
    figure = new_figure((7.5, 5.0))
    axes = figure.add_subplot()
    for kind, dash in ((ALONE, "-"), (ASSISTED, ":")):
        for row in (row for row in rows if row["kind"] == kind):
            axes.axhline(row["speedup"]["median"], color="#555555", linestyle=dash, label=kind)
    for kind, style in STYLES.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        _points(axes, [row for row in of_kind if row["share"] is not None], label=kind, **style)
        # A router's decisions are not independent: these points lie on another line.
        own = {**style, "linestyle": "none", "markerfacecolor": "white"}
        _points(axes, [row for row in of_kind if row["threshold"] is not None], label=f"{kind}, own router", **own)
    if (share := report["break_even_llm_share"]) is not None:
        axes.axvline(share, color="#555555", linestyle="--", label=f"break-even by single passes: {share:.0%}")
    axes.set(xlabel="share of tokens that the LLM decides", ylabel="speed-up over the LLM alone", xlim=(-0.03, 1.03))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    incomplete = "" if report["complete"] else " (incomplete)"
    axes.set_title(f"{report['model']}, batch size {report['options']['batch_size']}{incomplete}", loc="left")
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _points(axes: Any, rows: list[dict[str, Any]], **style: Any) -> None:
    """Draw one kind of contender, each point from the smallest to the largest of its repetitions."""
    if rows:
        rows = sorted(rows, key=lambda row: float(row["llm_share"]))
        median, low, high = ([row["speedup"][name] for row in rows] for name in ("median", "low", "high"))
        below, above = ([abs(one - other) for one, other in zip(median, ends, strict=True)] for ends in (low, high))
        axes.errorbar([row["llm_share"] for row in rows], median, yerr=[below, above], capsize=3, **style)
