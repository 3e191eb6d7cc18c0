"""The results as a table: for the terminal, and as a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from citer_hf.runs import atomic_write

from .points import Point
from .results import Results
from .summary import LEVELS

__all__ = ["markdown", "print_tables", "write_markdown"]

WIDE = 140
ENDS = {"slm": "SLM alone", "llm": "LLM alone"}
# Lines of a heading; in Markdown they are one.
POINTS = (
    "method",
    "threshold",
    "accuracy, %\n(95 % interval)",
    "LLM\ntokens",
    "LLM passes\n/ token",
    "MB\n/ token",
    "MFLOP\n/ token",
    "ms\n/ token",
)
SUMMARY = (
    "method",
    "area\nunder it",
    "LLM tokens for\n95 / 98 %",
    "MB / token for\n95 / 98 %",
    "right\nat {}",
)
COMPARED = "at {:.0f} %"
GAIN = "largest lead,\npoints"


def print_tables(results: Results, console: Console | None = None) -> None:
    """Print all points, and the summary last, where it is read first."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDE)
    for title, header, rows in reversed(list(_tables(results))):
        table = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_markdown(results: Results, path: Path) -> None:
    """Write the tables into a file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(markdown(results).encode())


def markdown(results: Results) -> str:
    """Return the tables as Markdown."""
    parts = []
    for title, header, rows in _tables(results):
        ruler = ["---", *["---:"] * (len(header) - 1)]
        heading = [name.replace("\n", " ") for name in header]
        lines = ["| " + " | ".join(cells) + " |" for cells in (heading, ruler, *rows)]
        parts.append("\n".join([f"**{title}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _tables(results: Results) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    problems = results.provenance.get("problems")
    of = f" ({problems} problems)" if problems else ""
    yield (
        f"The curves{of}: cost of 95 and 98 % of the LLM's accuracy, answers right at shares of LLM tokens",
        _summary_header(results),
        _summary_rows(results),
    )
    others = [name for name in results.methods if name != results.shipped]
    if results.shipped is not None and others:
        rows = [_comparison(results, name) for name in others]
        header = ["against", *(COMPARED.format(level * 100) for level in LEVELS), GAIN]
        yield (
            f"LLM tokens / bytes saved by {results.shipped} at fractions of the LLM's accuracy; lead at equal cost",
            header,
            rows,
        )
    rows = [_row(name, point) for name, point in _points(results)]
    yield f"All points{of}; bytes and operations as each text decodes alone", POINTS, rows


def _summary_header(results: Results) -> list[str]:
    *header, at_share = SUMMARY
    shares: Iterable[str] = next((one["accuracy_at"] for one in results.summary.values()), ())
    return [*header, *(at_share.format(f"{float(share):.0%}") for share in shares)]


def _summary_rows(results: Results) -> list[list[str]]:
    return [
        [
            name,
            "" if one["auc"] is None else f"{one['auc']:.3f}",
            " / ".join(_percent(one[f"share_at_{level}"]) for level in (95, 98)),
            " / ".join(_mega(one[f"bytes_at_{level}"]) for level in (95, 98)),
            *(f"{accuracy:.1%}" for accuracy in one["accuracy_at"].values()),
        ]
        for name, one in results.summary.items()
    ]


def _comparison(results: Results, other: str) -> list[str]:
    compared = results.compare(str(results.shipped), other)
    savings = [(compared.share_saving[level], compared.bytes_saving[level]) for level in LEVELS]
    gains = f"{compared.gain * 100:+.1f} / {compared.gain_at_bytes * 100:+.1f}"
    return [other, *(" / ".join(map(_percent, saving)) for saving in savings), gains]


def _points(results: Results) -> Iterator[tuple[str, Point]]:
    yield ENDS["slm"], results.ends["slm"]
    for name, points in results.methods.items():
        for point in points:
            yield name, point
    yield ENDS["llm"], results.ends["llm"]


def _row(name: str, point: Point) -> list[str]:
    low, high = point.accuracy_ci
    alone = name in ENDS.values() or point.threshold is None
    return [
        name,
        "" if alone else f"{point.threshold:.5g}",
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
