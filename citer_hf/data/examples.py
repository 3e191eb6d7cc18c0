"""Examples of a task: prompts, reference texts and answers, from the formats that people have (`docs/data.md`)."""

import csv
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import Any

from ..runs import CommandOptions, import_extra, option

Messages = tuple[dict[str, str], ...]
Choices = tuple[tuple[str, str], ...]

# The columns that may hold a field.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "problem"),
    "messages": ("messages",),
    "response": ("response", "completion", "cot", "solution"),
    "answer": ("answer", "answerKey"),
    "choices": ("choices",),
    "id": ("id",),
}
PROMPTS = {"prompt", "messages"}


@dataclass(frozen=True)
class Example:
    """One example of a task: a text to continue, or a chat to answer."""

    id: str  # the row's own, or else its number
    row: int  # from 1: for messages
    prompt: str | None = None
    messages: Messages | None = None  # without the reference turn
    response: str | None = None  # the reference: what follows the prompt, or the content of the assistant's turn
    answer: str | None = None  # what a checker compares with
    choices: Choices | None = None  # label and text of each


@dataclass(frozen=True)
class DataOptions(CommandOptions):
    columns: Mapping[str, str] | None = option(
        None, "The column of a field. May be repeated.", metavar="FIELD=COLUMN", flag="--map"
    )
    split: str | None = option(None, "Which split of the data.", metavar="NAME")
    limit: int | None = option(None, "Use the first N examples only.", metavar="N", min=1)


def read_examples(
    data: Any,
    columns: Mapping[str, str] | None = None,
    *,
    split: str | None = None,
    needs: Collection[str] = (),
    limit: int | None = None,
) -> list[Example]:
    """Read the examples of a task.

    Args:
        data: Path of a .jsonl, .json, .csv or .parquet file, directory that `datasets` saved or can load, Hub dataset
            id such as `user/name`, `datasets.Dataset`, or list of dicts.
        columns: The column of a field (prompt, messages, response, answer, choices, id), where it has another name.
        split: Which split, where there are several.
        needs: The fields that every row must have besides its prompt: some of `response` and `answer`.
        limit: Read this many rows at most.

    Raises:
        OSError: when there is no such file, or a dataset cannot be reached.
        ValueError, TypeError: when the data cannot be read; the message names file, row and field.
        ImportError: when `datasets` is needed and not installed.
    """
    options = DataOptions(columns, split, limit)
    name, names, rows = _table(data, split)
    layout = _layout(name, names, options.columns or {})
    # A question comes with its choices, a prompt as it is.
    asks = layout.get("prompt") == "question" and "prompt" not in (options.columns or {})
    examples: list[Example] = []
    rows_of: dict[str, int] = {}
    for number, values in enumerate(islice(rows, limit), start=1):
        row = Row(f"{name}, row {number}", values, layout)
        example = row.example(number, asks)
        for field in needs:
            if not getattr(example, field):
                raise row.error(field, "is missing or empty.")
        if example.id in rows_of:
            raise row.error("id", f"is {example.id!r} as in row {rows_of[example.id]}; make ids unique.")
        rows_of[example.id] = number
        examples.append(example)
    return examples


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete `\boxed{}` or `\fbox{}` of a text holds, or None; braces in it are balanced."""
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        # A brace after a backslash is a character, and so is a backslash after one.
        for brace in re.finditer(r"\\.|[{}]", text[opening.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : opening.end() + brace.start()].strip()
    return None


# --- Tables ---------------------------------------------------------------------------------------------------------


def _table(data: Any, split: str | None) -> tuple[str, list[str], Any]:
    """Return the name of a table, its columns, and its rows."""
    name, found = "data", data
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        found = _load(name, Path(data).expanduser(), split)
    elif not isinstance(data, list) and type(data).__name__ != "Dataset":
        kind = type(data).__name__
        raise TypeError(f"data: expected a path, a Hub dataset id, a datasets.Dataset or a list of dicts, got {kind}.")
    if isinstance(found, Mapping):
        chosen = next(iter(found)) if split is None and len(found) == 1 else split
        if chosen not in found:
            raise ValueError(f"split: {name} has the splits {', '.join(found)}; expected one of them, got {split!r}.")
        found = found[chosen]
    elif split is not None:
        raise ValueError(f"split: {name} has no splits, got {split!r}.")
    if len(found) == 0:
        raise ValueError(f"{name}: there are no rows.")
    if not isinstance(found, list):
        return name, list(found.column_names), found.with_format(None)
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number}: expected an object with named fields, got {type(row).__name__}.")
    return name, list(dict.fromkeys(column for row in found for column in row)), found


def _load(name: str, path: Path, split: str | None) -> Any:
    """Return a file's rows, a `Dataset`, or the splits of one."""
    # `datasets` makes dates of text that looks like one, 7 of 007 and nothing of NA, and does not name the broken row.
    if path.suffix.lower() in (".jsonl", ".json", ".csv"):
        return _rows(path)
    datasets = import_extra("datasets", "train")
    try:
        if path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        # A split may be any expression that `datasets` knows.
        found = datasets.load_dataset(str(path) if path.exists() else name, split=split)
        return found if split is None else {split: found}
    except (RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"data: {name} cannot be loaded: {reason} Expected a file (.jsonl, .json, .csv, .parquet), a directory of "
            "`datasets`, or a Hub dataset id such as user/name."
        ) from error


def _rows(path: Path) -> list[Any]:
    """Return the rows of CSV, or of JSON: one array of objects, or one object a line."""
    rows: list[Any] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                csv.field_size_limit(2**31 - 1)
                for row in csv.DictReader(file, strict=True):
                    if None in row or None in row.values():
                        raise ValueError("a row without one value for each column; values with commas need quotes")
                    rows.append(row)
                return rows
            text = file.read()
        if text.lstrip().startswith("["):
            return json.loads(text)
        # Not splitlines: it also ends a line at characters that JSON allows in a string.
        for line in text.split("\n"):
            rows += [json.loads(line)] if line.strip() else []
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{path}, row {len(rows) + 1}: {error}. Expected UTF-8: CSV, a JSON object a line, or one JSON array."
        ) from error
    return rows


# --- Fields ---------------------------------------------------------------------------------------------------------


def _layout(name: str, columns: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str]:
    """Find the column of each field."""
    # A prompt that is mapped is the only one.
    known = {field: names for field, names in COLUMNS.items() if not (field in PROMPTS and PROMPTS & mapped.keys())}
    found = {field: [column for column in names if column in columns] for field, names in known.items()}
    found |= {field: [column] for field, column in mapped.items()}
    found = {field: some for field, some in found.items() if some}
    wrong = [field for field, some in found.items() if field not in COLUMNS or len(some) > 1 or some[0] not in columns]
    if wrong or len(PROMPTS & found.keys()) != 1:
        raise ValueError(
            f"columns: expected one column of {name} for each field ({', '.join(COLUMNS)}), and either a prompt or "
            f"messages; got {found} of {', '.join(columns)}. Name them: columns={{'prompt': 'COLUMN'}} (--map "
            "prompt=COLUMN)."
        )
    return {field: some[0] for field, some in found.items()}


@dataclass(frozen=True)
class Row:
    """One row of a table, and how its fields are read."""

    where: str
    values: Mapping[str, Any]
    layout: Mapping[str, str]

    def example(self, number: int, asks: bool) -> Example:
        prompt = messages = None
        has_turns = isinstance(self.value("response"), list)
        response = None if has_turns else self.text("response")
        choices, answer = self.choices(), self.text("answer", short=True)
        field = "messages" if "messages" in self.layout else "prompt"
        if field == "messages" or isinstance(self.value("prompt"), list):
            turns = self.messages(field) + (self.messages("response") if has_turns else ())
            if turns and turns[-1]["role"] == "assistant":
                if response is not None:
                    raise self.error(field, f"ends with a reference, and so does {self.layout['response']!r}.")
                turns, response = turns[:-1], turns[-1]["content"] or None
            messages = turns or None
        else:
            prompt = self.text("prompt")
            if asks and prompt and choices:
                prompt = "\n".join([prompt, *(f"{label}. {text}" for label, text in choices), "Answer:"])
            # A chain of thought and a solution are texts of their own, which the other columns' texts are not.
            apart = self.layout.get("response") in ("cot", "solution")
            if apart and prompt and response and not prompt[-1].isspace() and not response[0].isspace():
                response = " " + response
        if not (prompt or messages):
            raise self.error(field, "is missing or empty.")
        if "answer" not in self.layout:
            answer = last_boxed(response or "") or None
        if choices is not None and answer is not None and answer not in dict(choices):
            raise self.error("answer", f"must be one of the labels {', '.join(dict(choices))}, got {answer!r}.")
        return Example(self.text("id", short=True) or str(number), number, prompt, messages, response, answer, choices)

    def error(self, field: str, problem: str) -> ValueError:
        column = f"column {self.layout[field]!r}" if field in self.layout else f"name it with --map {field}=COLUMN"
        return ValueError(f"{self.where}: {field} ({column}) {problem}")

    def value(self, field: str) -> Any:
        """Return a field's value, or None when it is missing or empty."""
        value = self.values.get(self.layout.get(field, ""))
        inside = value.strip() if isinstance(value, str) else value
        # A gap in a column of numbers is NaN, which differs from itself.
        return None if inside in (None, "", [], {}) or inside != inside else value

    def text(self, field: str, short: bool = False) -> str | None:
        """Return a field that is text, white space and all unless it is a short one; a number becomes text."""
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, (str, Number)):
            raise self.error(field, f"must be text, got {type(value).__name__}.")
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
        return text.strip() if short else text

    def messages(self, field: str) -> Messages:
        """Return a field that is a list of messages, without what tables add to make messages alike."""
        value = self.value(field) or []
        if not isinstance(value, list) or not all(
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        ):
            raise self.error(field, "must be a list of messages, each with a text `role` and a text `content`.")
        return tuple({key: part for key, part in turn.items() if part is not None} for turn in value)

    def choices(self) -> Choices | None:
        value = self.value("choices")
        if value is None:
            return None
        try:
            found = {str(label): str(text) for label, text in zip(value["label"], value["text"], strict=True)}
            if 0 < len(found) == len(value["text"]):
                return tuple(found.items())
        except (KeyError, TypeError, ValueError):
            pass
        raise self.error("choices", 'must be {"text": [...], "label": [...]}, as many different labels as texts.')
