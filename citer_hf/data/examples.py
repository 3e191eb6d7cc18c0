r"""Examples of a task: prompts, reference texts and answers, read from the formats that people have.

The formats, recognised by their columns (`docs/data.md`):

- text: `prompt`, and `response` or `completion`, `answer`. Text is joined as it is; or all of them are messages.
- chat: `messages`, and the same. A last turn of the assistant is the reference, if there is no column for it.
- router training: `prompt`, `cot`, `answerKey`, and `choices` for multiple choice.
- multiple choice: `question`, `choices`, `answerKey`. There is no reference text.
- math: `problem`, `solution`. The answer is what the last `\boxed{}` of the solution holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from typing import Any

from .boxes import last_boxed
from .layouts import Layout, find_layout, listed
from .tables import Data, read_table

__all__ = ["Choices", "Example", "Messages", "choice_prompt", "read_examples"]

Messages = tuple[dict[str, str], ...]
Choices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        id: The row's own id, or else its number.
        row: Number of the row in its file, from 1: for messages.
        prompt: The text to continue, or None for a chat.
        messages: The chat to answer, without the reference turn, or None for a text.
        response: The reference: exactly the text that follows the prompt, or the content of the assistant's turn.
        answer: What a checker compares with.
        choices: Label and text of every choice.
    """

    id: str
    row: int
    prompt: str | None = None
    messages: Messages | None = None
    response: str | None = None
    answer: str | None = None
    choices: Choices | None = None


def read_examples(
    data: Data,
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
        needs: What every row must have besides its prompt: some of `response` and `answer`.
        limit: Read this many rows at most.

    Raises:
        FileNotFoundError: when there is no such file.
        OSError: when a directory or a Hub dataset cannot be loaded.
        ValueError: when the file is broken or empty, its columns are of no known format, a field is missing or empty
            in a row, or two rows have the same id.
        TypeError: when the data is of no kind that can be read.
        ImportError: when `datasets` is needed and not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least one row, got {limit}.")
    table = read_table(data, split)
    layout = find_layout(table, columns or {})
    for field in needs:
        if field not in layout.columns and not _may_be_derived(field, layout):
            raise ValueError(
                f"{table.name}: every row needs {'an' if field == 'answer' else 'a'} {field}, and none of the columns "
                f"{listed(table.columns)} holds it. Name the column: columns={{'{field}': 'COLUMN'}} "
                f"(--map {field}=COLUMN)."
            )
    examples: list[Example] = []
    for row, values in table.rows:
        if len(examples) == limit:
            break
        reader = Reader(f"{table.name}, row {row}", values, layout, table.untyped)
        examples.append(reader.example(row))
    _refuse_gaps(examples, table.name, layout, ("prompt", *needs))
    _refuse_same_ids(examples, table.name)
    return examples


def choice_prompt(question: str, choices: Choices) -> str:
    """Lay out a multiple-choice question: the question, a line `LABEL. TEXT` for every choice, and `Answer:`."""
    return "\n".join([question, *(f"{label}. {text}" for label, text in choices), "Answer:"])


@dataclass(frozen=True)
class Reader:
    """Reads the fields of one row."""

    where: str
    row: Mapping[str, Any]
    layout: Layout
    untyped: bool

    def example(self, number: int) -> Example:
        """Read the row."""
        messages = prompt = None
        choices = self.choices()
        if self.layout.kind == "chat" or isinstance(self.value("prompt"), list):
            field = "messages" if self.layout.kind == "chat" else "prompt"
            messages, response = self.conversation(field)
        else:
            prompt, response = self.text("prompt"), self.response()
            if self.layout.kind == "choice" and prompt is not None:
                if choices is None:
                    raise ValueError(f"{self.where}: choices (column {self.layout.columns['choices']!r}) is missing.")
                prompt = choice_prompt(prompt, choices)
            # A chain of thought and a solution are texts of their own, which the other formats' responses are not.
            apart = self.layout.columns.get("response") in ("cot", self.layout.solution)
            if apart and prompt and response and not prompt[-1].isspace() and not response[0].isspace():
                response = " " + response
        answer = self.plain("answer")
        if answer is None and self.layout.solution is not None and "answer" not in self.layout.columns:
            answer = last_boxed(str(self.row.get(self.layout.solution) or "")) or None
        if choices is not None and answer is not None and answer not in dict(choices):
            raise ValueError(
                f"{self.where}: the answer {answer!r} is none of the labels {listed(label for label, _ in choices)}."
            )
        return Example(self.plain("id") or str(number), number, prompt, messages, response, answer, choices)

    def value(self, field: str) -> Any:
        """Return a field's value, or None when it is missing or empty."""
        value = self.row.get(self.layout.columns.get(field, ""))
        if isinstance(value, tuple):
            value = list(value)
        empty = isinstance(value, (str, list, Mapping)) and not (value.strip() if isinstance(value, str) else value)
        return None if empty or _is_nan(value) else value

    def text(self, field: str) -> str | None:
        """Return a field that is text, white space and all; a number becomes text."""
        value = self.value(field)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, float):
            return str(int(value)) if value.is_integer() else repr(float(value))
        if isinstance(value, (Number, Decimal)):
            return str(value)
        raise ValueError(
            f"{self.where}: {field} (column {self.layout.columns[field]!r}) must be text, got {type(value).__name__}."
        )

    def plain(self, field: str) -> str | None:
        """Return a field that is a short text, such as an answer or an id, without white space around it."""
        text = self.text(field)
        if text is not None and self.untyped and re.fullmatch(r"-?\d+\.0", text.strip()):
            # A column of whole numbers with a gap in it is written so by pandas.
            text = text.strip()[:-2]
        return None if text is None else text.strip()

    def response(self) -> str | None:
        """Return the reference: a text, or the content of the one message that a conversational completion is."""
        value = self.value("response")
        if not isinstance(value, list):
            return self.text("response")
        turns = self.messages("response")
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise ValueError(
                f"{self.where}: response (column {self.layout.columns['response']!r}) must be text or one message of "
                f"the assistant, got {len(turns)} messages of {listed(turn['role'] for turn in turns)}."
            )
        return turns[0]["content"]

    def conversation(self, field: str) -> tuple[Messages | None, str | None]:
        """Return the chat to answer, and the reference."""
        messages, response = self.messages(field), self.response()
        if not messages or messages[-1]["role"] != "assistant":
            return messages or None, response
        if response is not None:
            raise ValueError(
                f"{self.where}: {field} ends with a turn of the assistant, and the column "
                f"{self.layout.columns['response']!r} holds a response too. Leave one of them out."
            )
        return messages[:-1] or None, messages[-1]["content"] or None

    def messages(self, field: str) -> Messages:
        """Return a field that is a list of messages, without what tables add to make messages alike."""
        value = self._parsed(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        ):
            raise ValueError(
                f"{self.where}: {field} (column {self.layout.columns[field]!r}) must be a list of messages, each with "
                "a text `role` and a text `content`."
            )
        return tuple({key: part for key, part in turn.items() if part is not None} for turn in value)

    def choices(self) -> Choices | None:
        """Return label and text of every choice."""
        value = self._parsed("choices")
        if value is None:
            return None
        labels: Any = value.get("label") if isinstance(value, Mapping) else None
        texts: Any = value.get("text") if isinstance(value, Mapping) else None
        both_lists = isinstance(labels, Sequence) and isinstance(texts, Sequence)
        if not both_lists or not len(texts) == len(set(map(str, labels))) == len(labels) > 0:
            raise ValueError(
                f"{self.where}: choices (column {self.layout.columns['choices']!r}) must be "
                '{"text": [...], "label": [...]}, as many different labels as texts.'
            )
        return tuple((str(label), str(text)) for label, text in zip(labels, texts, strict=True))

    def _parsed(self, field: str) -> Any:
        """Return a field that has parts; in CSV they are written as JSON."""
        value = self.value(field)
        if not (self.untyped and isinstance(value, str)):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.where}: {field} (column {self.layout.columns[field]!r}) must be JSON: {error.msg}."
            ) from error


def _may_be_derived(field: str, layout: Layout) -> bool:
    """Tell whether a field without a column can be found in another one."""
    if field == "response":
        return layout.kind == "chat"
    return field == "answer" and layout.solution is not None


def _refuse_gaps(examples: Iterable[Example], name: str, layout: Layout, fields: Sequence[str]) -> None:
    """Refuse rows that lack a field, naming the first and counting the others."""
    examples = list(examples)
    for field in fields:
        gaps = [example.row for example in examples if not _has(example, field)]
        if gaps:
            column = layout.columns.get("messages" if field == "prompt" and layout.kind == "chat" else field)
            source = (
                f" (column {column!r})"
                if column
                else r" (no \boxed{} in the solution)"
                if layout.solution and field == "answer"
                else ""
            )
            others = f" So it is in {len(gaps) - 1} more of {len(examples)} rows." if len(gaps) > 1 else ""
            raise ValueError(f"{name}, row {gaps[0]}: {field}{source} is missing or empty.{others}")


def _has(example: Example, field: str) -> bool:
    if field == "prompt":
        return bool(example.prompt or example.messages)
    return bool(getattr(example, field))


def _refuse_same_ids(examples: Iterable[Example], name: str) -> None:
    rows: dict[str, int] = {}
    for example in examples:
        if example.id in rows:
            raise ValueError(
                f"{name}: rows {rows[example.id]} and {example.row} have the same id {example.id!r}. Ids must differ."
            )
        rows[example.id] = example.row


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
