"""How the measurements of `citer demo` are told: as a table with a few words, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .measuring import BATCH_SIZE, Measurement

__all__ = ["print_json", "print_table", "row_label"]


def row_label(name: str, threshold: float | None) -> str:
    """Name a row of the table."""
    return name if threshold is None else f"{name} at {threshold:.3g}"


def print_json(done: Sequence[Measurement], seed: int, count: int, complete: bool) -> None:
    """Print the measurements as one JSON object."""
    rows = [measurement.as_dict() for measurement in done]
    print(
        json.dumps(
            {"seed": seed, "problems": count, "batch_size": BATCH_SIZE, "complete": complete, "rows": rows}, indent=2
        )
    )


def print_table(done: Sequence[Measurement], seed: int, count: int, interrupted: bool) -> None:
    """Print the measurements as a table, and what they mean."""
    if interrupted:
        print("\nStopped." if done else "\nStopped before anything was measured.")
    if not done:
        return
    title = f"{count} held-out problems (seed {seed}), solved in batches of {min(BATCH_SIZE, count)}"
    table = Table(title=title, box=SIMPLE, title_justify="left")
    table.add_column("")
    for header in ("accuracy", "tokens from\nthe LLM", "LLM forward\npasses / token", "tokens / s"):
        table.add_column(header, justify="right")
    for row in done:
        cells = (f"{row.accuracy:.1%}", f"{row.llm_share:.1%}", f"{row.llm_passes_per_token:.2f}")
        table.add_row(row_label(row.name, row.router_threshold), *cells, f"{row.tokens_per_second:,.0f}")
    Console().print(table)
    if not interrupted:
        Console().print(meaning(done), markup=False, highlight=False)


def meaning(done: Sequence[Measurement]) -> str:
    """Say in plain words what the measurements show."""
    slm, llm, *pairs = done
    best = max(pairs, key=lambda row: (row.accuracy, -row.llm_share))
    speed = best.tokens_per_second / llm.tokens_per_second
    return (
        f"At threshold {best.router_threshold:.3g} the pair solves {best.accuracy:.0%} of the problems with "
        f"{best.llm_share:.0%} of the tokens from the LLM; the SLM alone solves {slm.accuracy:.0%}, the LLM alone "
        f"{llm.accuracy:.0%}. It writes {speed:.2f} times as fast as the LLM alone here: texts that need the "
        f"LLM wait for each other, so that it runs {best.llm_passes_per_token:.2f} times per token. With models this "
        "small Python takes most of the time."
    )
