"""Examples of a task: prompts, reference texts and answers, from the formats that people have (`docs/data.md`)."""

import ast
import json
import os
import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import Any

from ..runs import CommandOptions, note, option
from .tables import read_table

Messages = tuple[dict[str, Any], ...]
Choices = tuple[tuple[str, str], ...]

# The columns that may hold a field; later names are looked for where none of the earlier ones is there.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "prompt": (("prompt", "question", "problem"), ("query", "instruction"), ("input",)),
    "messages": (("messages",), ("conversations", "conversation")),
    "response": (("response", "completion", "cot", "solution"), ("output",)),
    "answer": (("answer", "answerKey"),),
    "choices": (("choices",), ("options",)),
    "tools": (("tools",),),
    "id": (("id",),),
}
PROMPTS = {"prompt", "messages"}
# The roles of ShareGPT.
ROLES = {
    "human": "user",
    "observation": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
}
# What comes before the answer at the end of a solution, in GSM8K.
FINAL = "####"
QUESTION, CHOICES = "{question}", "{choices}"


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
    turn: dict[str, Any] | None = None  # the reference turn, where it has more than a content
    tools: tuple[dict[str, Any], ...] | None = None  # those of a chat
    is_text: bool = False  # the prompt stays a text, whatever chat template the pair has

    def as_chat(self) -> "Example":
        """Return the example with its prompt as the message of a user, and its response as the turn after it."""
        if self.prompt is None:
            return self
        user = {"role": "user", "content": self.prompt}
        return replace(self, prompt=None, messages=(user,), response=self.response and self.response.strip())


@dataclass(frozen=True)
class DataOptions(CommandOptions):
    columns: Mapping[str, str] | None = option(
        None, "The columns of fields. May be repeated.", metavar="FIELD=COLUMN,...", flag="--map"
    )
    split: str | None = option(None, "Which split of the data.", metavar="NAME")
    limit: int | None = option(None, "Use the first N examples only.", metavar="N", min=1)
    prompt_template: str | None = option(
        None, "What a prompt is: a text with {question}, and perhaps {choices}, or a file with one.", metavar="TEXT"
    )
    chat: bool = option(False, "Make a chat of every prompt. [default: where the pair has a chat template]")
    system_prompt: str | None = option(None, "The system turn of chats that have none.", metavar="TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.template()

    def template(self) -> str | None:
        """Return the text of the prompt template, without the line end with which a file ends."""
        given = self.prompt_template
        if given is None or QUESTION in given:
            return given
        path = Path(given).expanduser()
        text = path.read_text(encoding="utf-8-sig").removesuffix("\n") if os.path.isfile(path) else ""
        if QUESTION not in text:
            raise ValueError(f"prompt_template: expected a text with {QUESTION}, or a file with one, got {given!r}.")
        return text


def read_examples(
    data: Any,
    columns: Mapping[str, str] | None = None,
    *,
    split: str | None = None,
    needs: Collection[str] = (),
    limit: int | None = None,
    **form: Any,
) -> list[Example]:
    """Read the examples of a task, and write a line on stderr about what each column was taken for.

    Args:
        data: Path of a .jsonl, .json or .csv file, perhaps with .gz, or of a .parquet file; directory that `datasets`
            saved or can load, Hub dataset id such as `user/name`, `datasets.Dataset`, or list of dicts.
        columns: The column of a field (prompt, messages, response, answer, choices, tools, id) with another name.
        split: Which split, where there are several.
        needs: The fields that every row must have besides its prompt: some of `response` and `answer`.
        limit: Read this many rows at most.
        form: How a question becomes a prompt: `prompt_template`, `chat` and `system_prompt` of `DataOptions`.

    Raises:
        OSError: when there is no such file, or a dataset cannot be reached.
        ValueError, TypeError: when the data cannot be read; the message names file, row and field.
        ImportError: when `datasets` is needed and not installed.
    """
    options = DataOptions(columns, split, limit, **form)
    name, names, rows = read_table(data, split)
    layout, template = _layout(name, names, options.columns or {}), options.template()
    examples: list[Example] = []
    rows_of: dict[str, int] = {}
    for number, values in enumerate(islice(rows, limit), start=1):
        row = Row(f"{name}, row {number}", values, layout, template)
        example = row.example(number)
        if "response" in needs and example.choices and example.answer and not example.response:
            # The reference of a question with choices is the label.
            space = "" if (example.prompt or " ")[-1].isspace() else " "
            example = replace(example, response=space + example.answer)
        for field in needs:
            if not getattr(example, field) and not (field == "response" and example.turn):
                raise row.error(field, "is missing or empty.")
        if example.id in rows_of:
            raise row.error("id", f"is {example.id!r} as in row {rows_of[example.id]}; make ids unique.")
        rows_of[example.id] = number
        examples.append(example)
    note(f"{name}: {len(examples)} examples; {_taken(names, layout, examples)}.")
    return [_in_form(one, options) for one in examples]


def _in_form(example: Example, options: DataOptions) -> Example:
    """Return an example as the text or as the chat that the options ask for."""
    if options.chat or options.system_prompt:
        example = example.as_chat()
    if options.system_prompt and example.messages and example.messages[0]["role"] != "system":
        system = {"role": "system", "content": options.system_prompt}
        return replace(example, messages=(system, *example.messages))
    return replace(example, is_text=example.prompt is not None and options.prompt_template is not None)


def _taken(names: Iterable[str], layout: Mapping[str, str], examples: Sequence[Example]) -> str:
    """Return which column each field was taken from."""
    taken, used = {field: repr(column) for field, column in layout.items()}, {*layout.values(), ""}
    if joins_input(layout, names):
        taken["prompt"] += " and 'input'"
        used.add("input")
    if any(one.response or one.turn for one in examples):
        taken.setdefault("response", "the last turn" if examples[0].messages else repr(layout.get("answer")))
    if any(one.answer for one in examples):
        taken.setdefault("answer", "the end of the response")
    if "answer" in taken and taken["answer"] == taken.get("response") and "choices" not in taken:
        taken["answer"] += f" after {FINAL}"
    fields = ", ".join(f"{field} from {taken[field]}" for field in COLUMNS if field in taken)
    unused = ", ".join(str(one) for one in names if one not in used)
    return f"{fields}; not used: {unused}" if unused else fields


def joins_input(layout: Mapping[str, str], names: Iterable[str]) -> bool:
    """Return True where an instruction has its input in a column of its own, as in Alpaca."""
    return layout.get("prompt") == "instruction" and "input" in names and "input" not in layout.values()


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


def final_of(text: str) -> str | None:
    """Return the line after the last `####`, if there is one."""
    return text.rpartition(FINAL)[2].strip().partition("\n")[0].strip() or None if FINAL in text else None


# --- Fields ---------------------------------------------------------------------------------------------------------


def _layout(name: str, columns: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str]:
    """Find the column of each field."""
    # A prompt that is mapped is the only one.
    known = {field: names for field, names in COLUMNS.items() if not (field in PROMPTS and PROMPTS & mapped.keys())}
    found = {
        field: next((some for some in ([one for one in tier if one in columns] for tier in tiers) if some), [])
        for field, tiers in known.items()
    }
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
    template: str | None

    def example(self, number: int) -> Example:
        choices, answer = self.choices(), self.text("answer", short=True)
        response = None if isinstance(self.value("response"), list) else self.text("response")
        if answer is not None and FINAL in answer:
            if "response" not in self.layout and not answer.startswith(FINAL):
                response = self.text("answer")
            answer = final_of(answer)
        field = "messages" if "messages" in self.layout else "prompt"
        is_chat = field == "messages" or isinstance(self.value("prompt"), list)
        found = self.chat(field, response) if is_chat else self.texts(response, choices)
        if not (found.get("prompt") or found.get("messages")):
            raise self.error(field, "is missing or empty.")
        if "answer" not in self.layout:
            answer = last_boxed(found["response"] or "") or final_of(found["response"] or "")
        if choices is not None and answer is not None:
            answer = self.label(answer, choices)
        identity = self.text("id", short=True) or str(number)
        return Example(identity, number, answer=answer, choices=choices, **found)

    def chat(self, field: str, response: str | None) -> dict[str, Any]:
        """Return messages, reference and tools of a chat; the last turn is the reference if it is the assistant's."""
        if self.template is not None:
            raise self.error(field, "is a chat, which takes no prompt template. Leave --prompt-template out.")
        has_turns, turn = isinstance(self.value("response"), list), None
        turns = self.messages(field) + (self.messages("response") if has_turns else ())
        if turns and turns[-1]["role"] == "assistant":
            if response is not None:
                raise self.error(field, f"ends with a reference, and so does {self.layout['response']!r}.")
            turns, last = turns[:-1], turns[-1]
            turn = last if last.keys() > {"role", "content"} else None
            response = last["content"] or ("" if turn else None)
        return {"messages": turns or None, "response": response, "turn": turn, "tools": self.tools()}

    def texts(self, response: str | None, choices: Choices | None) -> dict[str, Any]:
        """Return prompt and reference that are texts."""
        prompt = self.prompt(choices)
        # A prompt and its response are texts as they are; other columns' texts are texts of their own.
        as_they_are = self.layout.get("prompt") == "prompt" and self.template is None
        apart = not (as_they_are and self.layout.get("response") in ("response", "completion"))
        if apart and prompt and response and not prompt[-1].isspace() and not response[0].isspace():
            response = " " + response
        return {"prompt": prompt, "response": response}

    def error(self, field: str, problem: str) -> ValueError:
        column = f"column {self.layout[field]!r}" if field in self.layout else f"name it with --map {field}=COLUMN"
        return ValueError(f"{self.where}: {field} ({column}) {problem}")

    def value(self, field: str) -> Any:
        """Return a field's value, or None when it is missing or empty."""
        value = self.values.get(self.layout[field]) if field in self.layout else None
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

    def structure(self, field: str) -> Any:
        """Return a field that is a list or an object, perhaps as the text that a table of texts has for one."""
        value = self.value(field)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            try:
                return ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                return value

    def prompt(self, choices: Choices | None) -> str | None:
        """Return the prompt: a text as it is, or a question with its choices, in the form of the template."""
        text = self.text("prompt")
        if text is None:
            return None
        if joins_input(self.layout, self.values) and str(self.values["input"] or "").strip():
            text = f"{text}\n\n{self.values['input']}"
        listed = "\n".join(f"{label}. {choice}" for label, choice in choices or ())
        asks = bool(listed) and self.layout["prompt"] != "prompt"
        if self.template is None:
            return f"{text}\n{listed}\nAnswer:" if asks else text
        if asks and CHOICES not in self.template:
            text = f"{text}\n{listed}"
        filled = {QUESTION: text, CHOICES: listed}
        return re.sub("|".join(map(re.escape, filled)), lambda found: filled[found[0]], self.template)

    def messages(self, field: str) -> Messages:
        """Return a field that is a list of messages."""
        value = self.structure(field) or []
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of messages, got {type(value).__name__}.")
        found = tuple(map(as_message, value))
        if None in found:
            form = "a text role (or from) and a content (or value): text, parts of text, or null beside tool_calls"
            wrong = value[found.index(None)]
            raise self.error(field, f"must be a list of messages, each with {form}; got {wrong!r:.80}.")
        return tuple(message for message in found if message is not None)

    def tools(self) -> tuple[dict[str, Any], ...] | None:
        value = self.structure("tools")
        if value is not None and not (isinstance(value, list) and all(isinstance(one, Mapping) for one in value)):
            raise self.error("tools", f"must be a list of tools, or JSON of one, got {value!r:.80}.")
        return tuple(value) if value else None

    def choices(self) -> Choices | None:
        value: Any = self.structure("choices")
        if value is None:
            return None
        try:
            if isinstance(value, Mapping):
                pairs = list(zip(value["label"], value["text"], strict=True) if "text" in value else value.items())
            elif isinstance(value[0], Mapping):
                pairs = [(one["label"], one["text"]) for one in value]
            else:
                letters = string.ascii_uppercase[: len(value)]
                pairs = list(zip(letters, value, strict=True)) if isinstance(value, list) else []
            found = {str(label): str(text) for label, text in pairs}
            if 0 < len(found) == len(pairs):
                return tuple(found.items())
        except (KeyError, TypeError, ValueError):
            pass
        form = '{"text": [...], "label": [...]}, as many different labels as texts'
        raise self.error("choices", f"must be a list of at most 26 texts, or {form}.")

    def label(self, answer: str, choices: Choices) -> str:
        """Return the label that an answer is, or whose place from 0 or whose text it is."""
        by_name = {label.casefold(): label for label, _ in choices} | {label: label for label, _ in choices}
        by_place = {str(place): label for place, (label, _) in enumerate(choices)}
        by_text = {text.strip(): label for label, text in choices}
        bare = answer.strip("(). ")
        names = (by_name.get(answer), by_name.get(bare.casefold()), by_place.get(answer), by_text.get(answer))
        found = next(filter(None, names), None)
        if found is None:
            labels = ", ".join(label for label, _ in choices)
            raise self.error("answer", f"must be one of the labels {labels}, got {answer!r}. A number counts from 0.")
        return found


def as_message(given: Any) -> dict[str, Any] | None:
    """Return a message as `citer serve` gives it to a chat template, or None for what is no message."""
    if not isinstance(given, Mapping):
        return None
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and isinstance(speaker := message.pop("from", None), str):
        message = {"role": ROLES.get(speaker, speaker), "content": message.pop("value", None), **message}
    calls, content = message.get("tool_calls"), message.get("content")
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    elif content is None and calls:
        content = ""
    if not (isinstance(message.get("role"), str) and isinstance(content, str)):
        return None
    for name in {"reasoning", "thinking"} & message.keys():
        message.setdefault("reasoning_content", message[name])
    if calls:
        message["tool_calls"] = list(map(as_call, calls))
    return {**message, "content": content}


def as_call(call: Any) -> Any:
    """Return a tool call with arguments that are a mapping, unless their JSON is broken."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"].strip() or "null")
    except (ValueError, RecursionError):
        return call
    arguments = {} if arguments is None else arguments
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
