"""How a bench's results are told: as tables with a few words, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .curve import BreakEven, CostCurve
from .results import BenchReport, Measurement, Spread

__all__ = ["break_even_text", "print_json", "print_report"]

GB = 1e9
WIDE = 140

Column = tuple[str, Callable[[Measurement], str]]


def print_json(report: BenchReport) -> None:
    """Print the results as one JSON object."""
    print(json.dumps(report.as_dict(), indent=2))


def print_report(report: BenchReport) -> None:
    """Print the results as tables, and what they mean."""
    console = Console(width=None if sys.stdout.isatty() else WIDE, soft_wrap=False)
    for line in opening(report):
        print(line)
    tables = [(SPEED, "")] if any(row.seconds for row in report.rows) else []
    tables += [(COST, "What it took, per position of the text")] if report.rows else []
    for number, (columns, title) in enumerate(tables):
        told = title if number else "\n".join(filter(None, (heading(report), title)))
        console.print(table(told, report.rows, columns))
    if report.curve is not None:
        console.print(curve_table(report.curve))
    if report.break_even is not None and report.curve is not None:
        say(console, break_even_text(report.break_even, report.curve.rows))
    for note in report.notes:
        say(console, f"Note: {note}")


def opening(report: BenchReport) -> Iterator[str]:
    """Say of a report that is not complete how much it is."""
    if report.complete:
        return
    ended = "Interrupted" if report.interrupted else "Ended by an error"
    if not (report.rows or report.curve):
        # The error follows, and says enough.
        if report.interrupted:
            yield f"{ended} before anything was measured."
    elif any(row.seconds for row in report.rows):
        yield f"{ended}: this is what was measured until then."
    else:
        yield f"{ended} before anything was timed: this is what was found out until then."


def say(console: Console, text: str) -> None:
    """Print a sentence as it is."""
    console.print(text, markup=False, highlight=False)


def heading(report: BenchReport) -> str:
    """Say what was measured on what."""
    options, machine = report.options, report.machine
    assert machine is not None
    rows = options["batch_size"]
    lengths = options["prompt_length"]
    prompts = f"{lengths[0]}" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    threads = f", threads: {machine.threads}" if machine.device == "cpu" else ""
    return (
        f"{report.model} on {machine.device} ({machine.name}{threads}, {machine.memory_bandwidth / GB:.1f} GB/s), "
        f"{options['dtype']['llm']}\n{rows} row{'s' * (rows > 1)}, prompts of {prompts} tokens, "
        f"{options['max_new_tokens']} new ones{repetitions(report.rows)}"
    )


def repetitions(rows: Sequence[Measurement]) -> str:
    """Say of how many repetitions the medians are; a run that did not come to its end has fewer than were wanted."""
    counts = sorted({len(row.seconds) for row in rows if row.seconds})
    if not counts:
        return ""
    told = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"; median of {told} (smallest–largest)"


def table(title: str, rows: Sequence[Measurement], columns: Sequence[Column]) -> Table:
    """Lay out measurements, one a row."""
    made = Table(title=title, box=SIMPLE, title_justify="left")
    made.add_column("", no_wrap=True)
    for header, _ in columns:
        made.add_column(header, justify="right")
    for row in rows:
        made.add_row(row.name, *(cell(row) for _, cell in columns))
    return made


def curve_table(curve: CostCurve) -> Table:
    """Lay out what single forward passes cost."""
    rows = f" in {curve.rows} rows" if curve.rows > 1 else ""
    title = f"Milliseconds of one forward pass behind {curve.prompt_length} tokens{rows}, by the tokens it reads"
    made = Table(title=title, box=SIMPLE, title_justify="left")
    made.add_column("")
    for tokens in curve.llm:
        made.add_column(str(tokens), justify="right")
    made.add_row("SLM", f"{curve.slm_step * 1000:.3g}", *[""] * (len(curve.llm) - 1))
    made.add_row("LLM", *(f"{seconds * 1000:.3g}" for seconds in curve.llm.values()))
    return made


def break_even_text(found: BreakEven, rows: int) -> str:
    """Say from which LLM share on the pair does not pay."""
    in_step = " when its rows move in step" if rows > 1 else ""
    if found.share is None:
        return f"Break-even{in_step}: {found.reason}."
    return (
        f"Break-even: up to an LLM share of {found.share:.1%} the pair takes less time than the LLM alone{in_step}, "
        "by the costs of single passes above and deferrals that are independent."
    )


def spread(value: Spread | None, scale: float = 1) -> str:
    """Write a median and its spread, to three digits."""
    if value is None:
        return ""
    median, low, high = (
        f"{part * scale:,.3g}" if part * scale < 1000 else f"{part * scale:,.0f}"
        for part in (value.median, value.low, value.high)
    )
    return f"{median} ({low}–{high})"


SPEED: tuple[Column, ...] = (
    ("tokens / s", lambda row: spread(row.tokens_per_second)),
    ("ms / position", lambda row: spread(row.ms_per_token)),
    ("first token, ms", lambda row: spread(row.first_token_seconds, 1000)),
    ("× LLM alone", lambda row: spread(row.speedup)),
    ("time / floor", lambda row: spread(row.relative_to_floor)),
)
COST: tuple[Column, ...] = (
    ("tokens from\nthe LLM", lambda row: "" if row.llm_share is None else f"{row.llm_share:.1%}"),
    ("LLM\npasses", lambda row: f"{row.llm_passes_per_position:.2f}"),
    ("SLM\npasses", lambda row: f"{row.slm_passes_per_position:.2f}"),
    ("MB moved", lambda row: f"{row.bytes_moved / row.positions / 1e6:,.4g}"),
    ("of memory\nbandwidth", lambda row: "" if row.bandwidth_fraction is None else f"{row.bandwidth_fraction:.0%}"),
    ("peak\nmemory, GB", lambda row: f"{row.peak_memory_bytes / GB:.2f}"),
)
