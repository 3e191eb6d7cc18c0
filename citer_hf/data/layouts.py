"""The formats of tasks, and how a table's columns tell which one it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import Table

__all__ = ["Layout", "find_layout", "listed"]

FIELDS = ("prompt", "messages", "response", "answer", "choices", "id")
FORMATS = (
    "prompt or messages, with response or completion, answer, choices",
    "prompt, cot, answerKey (router training)",
    "question, choices, answerKey (multiple choice)",
    "problem, solution (math)",
)
# What may stand for a field when the prompt is a text or a chat.
COLUMNS = {"response": ("response", "completion", "cot"), "answer": ("answer", "answerKey")}


@dataclass(frozen=True)
class Layout:
    """Where the fields of a table are."""

    kind: str
    columns: Mapping[str, str]
    solution: str | None = None


def find_layout(table: Table, mapped: Mapping[str, str]) -> Layout:
    """Recognise the format of a table by its columns."""
    for field, column in mapped.items():
        if field not in FIELDS:
            raise ValueError(f"columns: there is no field {field!r}; the fields are {', '.join(FIELDS)}.")
        if column not in table.columns:
            raise ValueError(
                f"columns: {table.name} has no column {column!r} for {field}; its columns: {listed(table.columns)}."
            )
    found = set(table.columns)
    prompted = _column_of("prompt", ("prompt", "messages"), found, mapped, ("prompt", "messages"))
    if prompted is not None:
        field = "messages" if "messages" in mapped or prompted == "messages" else "prompt"
        columns = {field: prompted}
        for other in ("response", "answer"):
            columns[other] = _column_of(other, COLUMNS[other], found, mapped) or ""
        columns["choices"] = _column_of("choices", ("choices",), found, mapped) or ""
        kind, solution = ("chat" if field == "messages" else "text"), None
    elif {"question", mapped.get("choices", "choices")} <= found:
        columns = {"prompt": "question", "choices": "choices", "answer": "answerKey" if "answerKey" in found else ""}
        kind, solution = "choice", None
    elif {"problem", mapped.get("response", "solution")} <= found:
        columns = {"prompt": "problem", "response": "solution", "answer": "answer" if "answer" in found else ""}
        kind, solution = "math", mapped.get("response", "solution")
    else:
        raise ValueError(
            f"{table.name}: the columns {listed(table.columns)} are of no known format. Known: {'; '.join(FORMATS)}. "
            "Or name the columns: columns={'prompt': 'COLUMN', 'response': 'COLUMN', 'answer': 'COLUMN'} "
            "(--map prompt=COLUMN, ...)."
        )
    columns |= {"id": "id" if "id" in found else ""} | dict(mapped)
    return Layout(kind, {field: column for field, column in columns.items() if column}, solution)


def listed(names: Iterable[Any]) -> str:
    """Quote names and join them for a message."""
    return ", ".join(map(repr, names))


def _column_of(
    field: str,
    candidates: Sequence[str],
    found: Collection[str],
    mapped: Mapping[str, str],
    mappable: Sequence[str] = (),
) -> str | None:
    """Return the column of a field: the mapped one, or the only candidate that the table has."""
    named = [mapped[name] for name in mappable or (field,) if name in mapped]
    there = named or [column for column in candidates if column in found]
    if len(there) > 1:
        raise ValueError(
            f"columns: {listed(there)} could each be the {field}; say which: columns={{'{field}': '{there[0]}'}}."
        )
    return there[0] if there else None
