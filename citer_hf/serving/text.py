"""From tokens to what a client sees: text up to a stop string, reasoning, tool calls."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import ReasoningText, ToolCall, get_response_template, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser

from .grammar import forced_tools, wanted_form
from .schema import ChatRequest, Request

# The field of reasoning, as transformers names it: "thinking" ends when 5.18 is the oldest supported.
PROBE = [{"type": "region_chunk", "field": "reasoning_content", "text": "x"}]
REASONING = "reasoning_content" if response_events_to_chunks(PROBE) else "thinking"
# For models of which transformers knows no markup: thoughts at the beginning of an answer, and calls where the chat
# template asks for them in this form.
THOUGHTS = {"open_pattern": r"\A\s*<think>", "close": "</think>", "content": "text"}
CALLS = {
    "open_pattern": r"\s*<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}


# What stands around the values of a call that a grammar has formed.
BEFORE_NAME, BEFORE_ARGUMENTS = '{"name": ', ', "arguments": '


class StopText:
    """Passes text on as far as it can be no part of a stop string, which sees hidden text too."""

    def __init__(self, stops: Sequence[str] = ()):
        self.stops, self.met, self._held, self._shown = stops, False, "", list[bool]()

    def feed(self, text: str, shown: bool = True) -> str:
        """Take new text, and return what is now known to be part of the answer."""
        if self.met:
            return ""
        text, self._shown = self._held + text, self._shown + [shown] * len(text)
        found = [place for place in map(text.find, self.stops) if place >= 0]
        self.met = bool(found)
        # How much of the text's end may be the beginning of a stop string.
        begun = max((n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        return self._release(text, min(found) if found else len(text) - begun)

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        return "" if self.met else self._release(self._held, len(self._held))

    def _release(self, text: str, end: int) -> str:
        released = "".join(one for one, shown in zip(text[:end], self._shown, strict=False) if shown)
        self._held, self._shown = text[end:], self._shown[end:]
        return released


class Parser(ResponseParser):
    """transformers' parser of answers; a call that cannot be parsed stays the text that it is."""

    _start = 0

    def end(self) -> list[dict[str, Any]]:
        """Return the last events; an answer may lack any field."""
        events: list[dict[str, Any]] = []
        self._process(events, eos=True)
        return events

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
        self._start = m.start()
        super()._open_explicit(events, field, m)

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        field, before, end = self._current, len(events), self._pos
        try:
            super()._close_current(events)
            if field == "tool_calls" and len(events) > before:
                function = events[-1]["value"]["function"]
                if not (isinstance(function["name"], str) and function["name"]):
                    raise ValueError("a call without a name")
                arguments = function["arguments"]
                if not isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict):
                    raise ValueError("a call without arguments")
                # No JSON has such numbers, and no response such text.
                json.dumps(arguments, allow_nan=False)
                function["name"].encode()
        except Exception:
            # The text is a model's: it may break any rule.
            text = {"type": "region_chunk", "field": "content", "text": self._buffer[self._start : end]}
            events[before:] = [text]
            self._reset_to_implicit()


class ForcedCall:
    """Stands for a parser where the whole answer behind its thoughts is one call, in the form of a grammar."""

    def __init__(self, markup: "Markup"):
        self._markup, self._text, self.template = markup, "", markup.template

    def feed(self, text: str) -> list[Any]:
        return self._kept(self._markup.feed(text))

    def rest(self) -> list[Any]:
        thoughts = self._kept(self._markup.rest())
        try:
            name, end = json.JSONDecoder().raw_decode(self._text, len(BEFORE_NAME))
            arguments = self._text[end + len(BEFORE_ARGUMENTS) : -1]
            json.loads(arguments)
            return [*thoughts, ToolCall(name, arguments)]
        except (ValueError, RecursionError):
            # Cut off.
            return [*thoughts, self._text] if self._text else thoughts

    def _kept(self, parts: list[Any]) -> list[Any]:
        self._text += "".join(part for part in parts if not isinstance(part, ReasoningText))
        return [part for part in parts if isinstance(part, ReasoningText)]


class Markup:
    """Tells reasoning and tool calls from the answer, without the white space around thoughts.

    Args:
        template: How the model marks them, in transformers' form.
        tools: Of the request, which say what types arguments have.
        begun: The mark with which the prompt opens thoughts, or "".
    """

    def __init__(self, template: dict[str, Any], tools: Any, begun: str):
        self.template, self._parser = template, Parser(template, prefix="", tools=tools)
        self._parser.feed(begun)
        self._space, self._begun, self._thought = "", False, bool(begun)

    def feed(self, text: str) -> list[Any]:
        return self._trimmed(response_events_to_chunks(self._parser.feed(text)))

    def rest(self) -> list[Any]:
        return self._trimmed(response_events_to_chunks(self._parser.end()))

    def _trimmed(self, parts: list[Any]) -> list[Any]:
        found = []
        for part in parts:
            if isinstance(part, ReasoningText):
                # White space is held until more of the thought follows.
                held, self._space = (self._space + part, "") if part.strip() else ("", self._space + part)
                kept = held.rstrip()
                self._space += held[len(kept) :]
                self._thought, part = True, ReasoningText(kept if self._begun else kept.lstrip())
                self._begun = self._begun or bool(kept)
            elif isinstance(part, str) and self._thought:
                part = part.lstrip()
                self._thought = not part
            if part != "":
                found.append(part)
        return found


def template_of(tokenizer: Any, llm: Any) -> dict[str, Any]:
    """Return how a model marks reasoning and calls, in transformers' form."""
    calls = {"tool_calls": CALLS} if "<tool_call>" in str(tokenizer.chat_template) else {}
    return get_response_template(tokenizer, llm) or template_with(calls)


def template_with(calls: dict[str, Any], thoughts: dict[str, Any] = THOUGHTS) -> dict[str, Any]:
    fields = {REASONING: thoughts, **calls, "content": {"content": "text"}}
    return {"start_anchor": "\0", "fields": fields}


def open_thought(tokenizer: Any, llm: Any, prompt: str) -> tuple[str, str]:
    """Return the mark with which a prompt leaves thoughts open and the one that ends them; "" twice if it does not."""
    field = template_of(tokenizer, llm)["fields"].get(REASONING, {})
    begin, end = (one if isinstance(one, str) else "" for one in (field.get("open", "<think>"), field.get("close")))
    return (begin, end) if begin and end and prompt.rstrip().endswith(begin.rstrip()) else ("", "")


class AnswerText:
    """Turns the tokens of an answer into parts: text, reasoning and tool calls.

    Args:
        tokenizer: Of the pair.
        specials: The texts of its special tokens, which are not shown.
        stops: Strings before which the answer ends.
        parser: A `Markup` or `ForcedCall`; `None`: all is text.
    """

    def __init__(self, tokenizer: Any, specials: dict[int, str], stops: Sequence[str], parser: Any):
        self._tokenizer, self._specials, self._parser = tokenizer._tokenizer, specials, parser
        self._stream, self._stop = DecodeStream(skip_special_tokens=True), StopText(stops)
        # Tokens since the stream began, how much text they have given, and whether the last has given none yet.
        self._plain, self._given, self._waits = list[int](), 0, False
        # Special tokens that mark reasoning or calls are for the parser.
        self._marks = str(getattr(parser, "template", ""))

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.met

    def feed(self, token: int, ends: bool = False) -> list[Any]:
        """Take a token, with which the answer may end, and return the parts that are known now."""
        special = self._specials.get(token)
        if special is None:
            text = self._stream.step(self._tokenizer, token) or ""
            self._plain.append(token)
            self._given, self._waits = self._given + len(text), not text
            return self._parsed(self._stop.feed(text))
        shown = special in self._marks
        # A special token that is not shown may stand between the bytes of a character.
        parts = self._flushed() if ends or shown else []
        return parts if ends else parts + self._parsed(self._stop.feed(special, shown))

    def rest(self) -> list[Any]:
        """Return what was held back, when no more tokens come."""
        parts = self._flushed() + self._parsed(self._stop.rest())
        return parts if self._parser is None else parts + self._parser.rest()

    def _flushed(self) -> list[Any]:
        """Return the text of tokens that have begun a character which does not come."""
        if not self._waits:
            return []
        text = self._tokenizer.decode(self._plain, skip_special_tokens=True)[self._given :]
        self._stream, self._plain, self._given, self._waits = DecodeStream(skip_special_tokens=True), [], 0, False
        return self._parsed(self._stop.feed(text))

    def _parsed(self, text: str) -> list[Any]:
        if self._parser is None or not text:
            return [text] if text else []
        found: list[Any] = self._parser.feed(text)
        return found


def parser_of(tokenizer: Any, llm: Any, request: Request, begun: str) -> Any:
    """Return what finds tool calls and reasoning in an answer, or `None` where its text is all there is."""
    if not isinstance(request, ChatRequest):
        return None
    if wanted_form(request)[1] is not None:
        # Thoughts come before a form. What is marked within it is a part of its strings.
        known = template_of(tokenizer, llm)["fields"].get(REASONING, {})
        first = {"open_pattern": rf"\A\s*{re.escape(begun)}", "close": known.get("close"), "content": "text"}
        markup = Markup(template_with({}, first if begun else THOUGHTS), None, begun)
        return ForcedCall(markup) if forced_tools(request) else markup
    return Markup(
        template_of(tokenizer, llm), [tool.model_dump(exclude_none=True) for tool in request.tools or []], begun
    )
