"""Examples of a task: prompts, reference texts and answers, from the formats that people have (`docs/data.md`)."""

import csv
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import Any

from ..runs import CommandOptions, import_extra, option

Messages = tuple[dict[str, str], ...]
Choices = tuple[tuple[str, str], ...]
Rows = Iterable[tuple[int, Mapping[str, Any]]]

FIELDS = ("prompt", "messages", "response", "answer", "choices", "id")
# The columns that may hold a field, by format. The format is known by the columns of its prompt.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {
        "response": ("response", "completion", "cot"),
        "answer": ("answer", "answerKey"),
        "choices": ("choices",),
    },
    "choice": {"prompt": ("question",), "choices": ("choices",), "answer": ("answerKey",)},
    "math": {"prompt": ("problem",), "response": ("solution",), "answer": ("answer",)},
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        id: The row's own id, or else its number.
        row: Number of the row in its file, from 1: for messages.
        prompt: The text to continue, or None for a chat.
        messages: The chat to answer, without the reference turn, or None for a text.
        response: The reference: exactly the text that follows the prompt, or the content of the assistant's turn.
        answer: The answer that a checker compares with.
        choices: Label and text of every choice.
    """

    id: str
    row: int
    prompt: str | None = None
    messages: Messages | None = None
    response: str | None = None
    answer: str | None = None
    choices: Choices | None = None


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
        ValueError: when the data is broken or empty, its columns are of no known format, a field is missing or
            malformed in a row, or two rows have the same id.
        TypeError: when the data is of a kind that cannot be read.
        ImportError: when `datasets` is needed and not installed.
    """
    options = DataOptions(columns, split, limit)
    name, names, rows = _table(data, split)
    kind, layout = _layout(name, names, options.columns or {})
    examples: list[Example] = []
    rows_of: dict[str, int] = {}
    for number, values in islice(rows, limit):
        row = Row(f"{name}, row {number}", values, kind, layout, name.lower().endswith(".csv"))
        example = row.example(number)
        if not (example.prompt or example.messages):
            raise row.missing("messages" if "messages" in layout else "prompt")
        for field in needs:
            if not getattr(example, field):
                raise row.missing(field)
        if example.id in rows_of:
            raise ValueError(
                f"{row.where}: row {rows_of[example.id]} has the same id {example.id!r}; make ids unique."
            )
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


def _table(data: Any, split: str | None) -> tuple[str, list[str], Rows]:
    """Return the name of a table, its columns, and its rows with their numbers."""
    name, found = "data", data
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        found = _load(name, Path(data).expanduser(), split)
    elif isinstance(data, (list, tuple)) and all(isinstance(row, Mapping) for row in data):
        found = list(enumerate(data, start=1))
    elif type(data).__name__ not in ("Dataset", "DatasetDict"):
        raise TypeError(
            "data: expected the path of a file, a Hub dataset id, a datasets.Dataset (without streaming) or a list of "
            f"dicts, got {type(data).__name__}."
        )
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
        return name, list(found.column_names), enumerate(found.with_format(None), start=1)
    for number, row in found:
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number}: expected an object with named fields, got {type(row).__name__}.")
    return name, list(dict.fromkeys(column for _, row in found for column in row)), found


def _load(name: str, path: Path, split: str | None) -> Any:
    """Return a file's rows with their numbers, a `Dataset`, or the splits of one."""
    suffix, is_file = path.suffix.lower(), path.is_file()
    if is_file and suffix not in SUFFIXES:
        raise ValueError(f"data: {path} ends in {suffix or 'nothing'!r}; expected {', '.join(SUFFIXES)}.")
    if not path.exists() and (suffix in SUFFIXES or name.startswith(".") or not HUB_ID.fullmatch(name)):
        raise FileNotFoundError(
            f"data: {name} does not exist. Give a file ({', '.join(SUFFIXES)}), a directory that `datasets` saved, "
            "or a Hub dataset id such as user/name."
        )
    # `datasets` makes dates of text that looks like one, 7 of 007 and nothing of NA, and does not name the broken row.
    if is_file and suffix != ".parquet":
        return _csv_rows(path) if suffix == ".csv" else _json_rows(path)
    datasets = import_extra("datasets", "train")
    try:
        if is_file:
            return datasets.Dataset.from_parquet(str(path))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        # A split may be any expression that `datasets` knows.
        found = datasets.load_dataset(str(path) if path.exists() else name, split=split)
        return found if split is None else {split: found}
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        kind = OSError if isinstance(cause, OSError) else ValueError
        raise kind(f"data: {name} cannot be loaded as a dataset: {type(cause).__name__}: {cause}") from error


def _json_rows(path: Path) -> list[tuple[int, Any]]:
    """Return one array of objects, or one object a line; either may be in a file with either name."""
    where, rows = str(path), []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), start=1))
        # Not splitlines: it also ends a line at characters that JSON allows in a string.
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}, row {number}"
            if line.strip():
                rows.append((number, json.loads(line)))
    except ValueError as error:
        raise ValueError(f"{where}: broken JSON: {error}. Expected UTF-8, an object a line or one array.") from error
    return rows


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in row or None in row.values():
                    raise ValueError("expected one value for each column; values with commas need quotes")
                rows.append((number, row))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, row {len(rows) + 1}: broken CSV: {error}.") from error
    return rows


# --- Formats --------------------------------------------------------------------------------------------------------


def _layout(name: str, columns: Collection[str], mapped: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Recognise the format of a table (text, chat, choice or math), and find the column of each field."""
    for field, column in mapped.items():
        if field not in FIELDS:
            raise ValueError(f"columns: there is no field {field!r}; the fields are {', '.join(FIELDS)}.")
        if column not in columns:
            raise ValueError(f"columns: {name} has no column {column!r} for {field}; its columns: {_listed(columns)}.")
    prompts = [mapped[field] for field in ("prompt", "messages") if field in mapped]
    prompts = prompts or [column for column in ("prompt", "messages") if column in columns]
    if prompts:
        kind = "chat" if "messages" in mapped or "messages" in prompts else "text"
        candidates = {"messages" if kind == "chat" else "prompt": tuple(prompts), **COLUMNS["text"]}
    elif {"question", mapped.get("choices", "choices")} <= set(columns):
        kind, candidates = "choice", COLUMNS["choice"]
    elif {"problem", mapped.get("response", "solution")} <= set(columns):
        kind, candidates = "math", COLUMNS["math"]
    else:
        raise ValueError(
            f"{name}: the columns {_listed(columns)} are of no known format. Expected prompt, messages, question with "
            "choices, or problem with solution. Or name the columns: columns={'prompt': 'COLUMN', 'response': "
            "'COLUMN', 'answer': 'COLUMN'} (--map prompt=COLUMN, ...)."
        )
    layout = dict(mapped)
    for field, names in {**candidates, "id": ("id",)}.items():
        found = [column for column in names if column in columns]
        if len(found) > 1 and (field not in mapped or found == prompts):
            raise ValueError(
                f"columns: {_listed(found)} could each be the {field}; name one: columns={{'{field}': '{found[0]}'}}."
            )
        if found:
            layout.setdefault(field, found[0])
    return kind, layout


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))


@dataclass(frozen=True)
class Row:
    """One row of a table, and how its fields are read."""

    where: str
    values: Mapping[str, Any]
    kind: str
    layout: Mapping[str, str]
    untyped: bool

    def example(self, number: int) -> Example:
        messages = prompt = None
        choices, response, answer = self.choices(), self.response(), self.text("answer", short=True)
        field = "messages" if self.kind == "chat" else "prompt"
        if self.kind == "chat" or isinstance(self.value("prompt"), list):
            turns = self.messages(field)
            if turns and turns[-1]["role"] == "assistant":
                if response is not None:
                    raise self.error(field, f"ends with a reference, and so does {self.layout['response']!r}.")
                turns, response = turns[:-1], turns[-1]["content"] or None
            messages = turns or None
        else:
            prompt = self.text("prompt")
            if self.kind == "choice" and prompt is not None:
                if choices is None:
                    raise self.missing("choices")
                prompt = "\n".join([prompt, *(f"{label}. {text}" for label, text in choices), "Answer:"])
            # A chain of thought and a solution are texts of their own, which the other formats' responses are not.
            apart = self.kind == "math" or self.layout.get("response") == "cot"
            if apart and prompt and response and not prompt[-1].isspace() and not response[0].isspace():
                response = " " + response
        if self.kind == "math" and "answer" not in self.layout:
            answer = last_boxed(response or "") or None
        if choices is not None and answer is not None and answer not in dict(choices):
            labels = _listed(label for label, _ in choices)
            raise self.error("answer", f"must be one of the labels {labels}, got {answer!r}.")
        return Example(self.text("id", short=True) or str(number), number, prompt, messages, response, answer, choices)

    def error(self, field: str, problem: str) -> ValueError:
        column = self.layout.get(field)
        return ValueError(f"{self.where}: {field}{f' (column {column!r})' if column else ''} {problem}")

    def missing(self, field: str) -> ValueError:
        if field in self.layout or (field == "response" and self.kind == "chat"):
            return self.error(field, "is missing or empty.")
        boxed = r" (no \boxed{} in the solution)" if (self.kind, field) == ("math", "answer") else ""
        named = f"columns={{'{field}': 'COLUMN'}} (--map {field}=COLUMN)"
        return self.error(field, f"is missing{boxed}. If a column of {_listed(self.values)} holds it: {named}.")

    def value(self, field: str) -> Any:
        """Return a field's value, or None when it is missing or empty."""
        value = self.values.get(self.layout.get(field, ""))
        if isinstance(value, tuple):
            value = list(value)
        empty = isinstance(value, (str, list, Mapping)) and not (value.strip() if isinstance(value, str) else value)
        return None if empty or (isinstance(value, float) and math.isnan(value)) else value

    def text(self, field: str, short: bool = False) -> str | None:
        """Return a field that is text, white space and all unless it is a short one; a number becomes text."""
        value = self.value(field)
        if value is None:
            return None
        if not isinstance(value, (str, Number)):
            raise self.error(field, f"must be text, got {type(value).__name__}.")
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
        text = text.strip() if short else text
        # A column of whole numbers with a gap in it is written so by pandas.
        return text[:-2] if short and self.untyped and re.fullmatch(r"-?\d+\.0", text) else text

    def response(self) -> str | None:
        """Return the reference: a text, or the content of the one message that a conversational completion is."""
        if not isinstance(self.value("response"), list):
            return self.text("response")
        turns = self.messages("response")
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = _listed(turn["role"] for turn in turns)
            raise self.error("response", f"must be text or one message of the assistant, got messages of {roles}.")
        return turns[0]["content"]

    def messages(self, field: str) -> Messages:
        """Return a field that is a list of messages, without what tables add to make messages alike."""
        value = self.parsed(field) or []
        if not isinstance(value, list) or not all(
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        ):
            raise self.error(field, "must be a list of messages, each with a text `role` and a text `content`.")
        return tuple({key: part for key, part in turn.items() if part is not None} for turn in value)

    def choices(self) -> Choices | None:
        value = self.parsed("choices")
        if value is None:
            return None
        try:
            found = {str(label): str(text) for label, text in zip(value["label"], value["text"], strict=True)}
            if 0 < len(found) == len(value["text"]):
                return tuple(found.items())
        except (KeyError, TypeError, ValueError):
            pass
        raise self.error("choices", 'must be {"text": [...], "label": [...]}, as many different labels as texts.')

    def parsed(self, field: str) -> Any:
        """Return a field that has parts; in CSV they are written as JSON."""
        value = self.value(field)
        if not (self.untyped and isinstance(value, str)):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise self.error(field, f"must be JSON: {error.msg}.") from error
