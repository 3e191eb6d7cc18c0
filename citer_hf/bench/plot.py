"""The speed-up over the LLM alone against the share of tokens that the LLM writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from citer_hf.runs import new_figure, save_figure

from .contenders import ASSISTED, CITER, FLOOR, LOCK_STEP, RELEASED
from .results import BenchReport, Measurement

__all__ = ["draw"]

# Okabe and Ito's colours, which people who are colour-blind tell apart; marks and dashes say it again.
STYLES = {
    CITER: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    LOCK_STEP: {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    FLOOR: {"color": "#009E73", "marker": "^", "linestyle": ":"},
    RELEASED: {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
}
LABELS = {FLOOR: "floor: hand-written loop", RELEASED: "released code's loop"}
INCHES = (7.5, 5.0)


def draw(report: BenchReport, path: Path) -> None:
    """Draw the results into a file, whole or not at all."""
    figure = new_figure(INCHES)
    if not any(row.speedup for row in report.rows):
        return
    fill(figure.add_subplot(), report)
    save_figure(figure, path)


def fill(axes: Any, report: BenchReport) -> None:
    """Put everything into the axes."""
    axes.axhline(1, color="#555555", linewidth=1.2)
    axes.annotate(
        "LLM alone",
        (1, 1),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color="#555555",
        fontsize=9,
    )
    for row in report.rows:
        if row.kind == ASSISTED and row.speedup is not None:
            axes.axhline(
                row.speedup.median,
                color="#555555",
                linewidth=1.2,
                linestyle=(0, (1, 2)),
                label="assisted generation, same pair",
            )
    for kind, style in STYLES.items():
        rows = [row for row in report.rows if row.kind == kind and row.speedup is not None]
        label = LABELS.get(kind, kind)
        series([row for row in rows if row.share is not None], axes, label, style)
        # A router's deferrals are not independent, so that its points lie on another line.
        own = style | {"linestyle": "none", "markerfacecolor": "white"}
        series([row for row in rows if row.threshold is not None], axes, f"{label}, own router", own)
    if report.break_even is not None and report.break_even.share is not None and report.curve is not None:
        label = "break-even by the costs of single passes" + (" (rows in step)" if report.curve.rows > 1 else "")
        axes.axvline(
            report.break_even.share,
            color="#555555",
            linewidth=1.2,
            linestyle="--",
            label=f"{label}: {report.break_even.share:.0%}",
        )
    axes.set(xlim=(-0.03, 1.03), xlabel="share of tokens that the LLM writes", ylabel="speed-up over the LLM alone")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title(report), loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def series(rows: Sequence[Measurement], axes: Any, label: str, style: dict[str, str]) -> None:
    """Draw one kind of contender, with its spread."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row.llm_share or 0.0)
    shares = [row.llm_share or 0.0 for row in rows]
    spreads = [row.speedup for row in rows if row.speedup is not None]
    axes.errorbar(
        shares,
        [spread.median for spread in spreads],
        yerr=[[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]],
        label=label,
        capsize=3,
        linewidth=1.6,
        elinewidth=0.8,
        markersize=6,
        **style,
    )


def title(report: BenchReport) -> str:
    """Say what was measured on what."""
    rows = report.options["batch_size"]
    where = "" if report.machine is None else f" on {report.machine.device}"
    stopped = "" if report.complete else " (incomplete)"
    return f"{report.model}{where}, {rows} row{'s' * (rows > 1)}{stopped}"
