"""One answer in the making, and the JSON of the answers to a request, whole and in pieces."""

import codecs
import random
import string
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cli.serving.utils import ReasoningText, ToolCall

from ..model.sequence import Sequence, Settled
from .text import AnswerText

# What OpenAI gives for a token that cannot come.
NEVER = -9999.0


class Token(NamedTuple):
    """A token of a prompt or an answer, and what was thought of it; `settled` is `None` in a prompt."""

    text: str
    data: bytes
    offset: int  # of its characters, in the text of the answer
    logprob: float | None
    top: list[tuple[str, bytes, float]]
    settled: Settled | None


class Finished(NamedTuple):
    """The end of an answer."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    llm_tokens: int
    llm_calls: int
    first_token_seconds: float


class Piece(NamedTuple):
    """What is new of an answer: text, reasoning and calls, tokens where they are asked for, and perhaps the end."""

    number: int
    parts: list[Any]
    tokens: list[Token]
    finished: Finished | None = None


@dataclass(eq=False)
class Answer:
    """What an answer is generated from, who is told of it, and what has come of it so far.

    Args:
        number: Of the answer among those to its request.
        sequence: What the engine decodes.
        alone: Why only transformers' loop can decode it; "" where the engine can.
        text: Makes parts from tokens.
        tell: Takes an item for the client, on any thread.
        begun: Set when an answer to its request is written.
        cancelled: Set when nobody wants it any more.
        arrived, deadline: Of the request, on the monotonic clock.
        length: Most new tokens.
        decoded: The text of a token, and its bytes.
        top: Number of likeliest tokens to tell of; `None`: no logarithms of probabilities.
        wants_tokens: Whether tokens are told at all.
        streams: Whether the client sees pieces before the end.
        echo: The prompt, where it is told first.
        generate: Generates it with transformers' loop.
        seed: Of what is sampled.
    """

    number: int
    sequence: Sequence
    alone: str
    text: AnswerText
    tell: Callable[[Any], None]
    begun: threading.Event
    cancelled: threading.Event
    arrived: float
    deadline: float
    length: int
    decoded: Callable[[int], tuple[str, bytes]]
    top: int | None
    wants_tokens: bool
    streams: bool
    echo: str | None
    generate: partial[Any]
    seed: int
    parts: list[Any] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    first_token: float = 0.0
    # Counts characters, of which a token may be a part.
    characters: Any = field(default_factory=partial(codecs.getincrementaldecoder("utf-8"), "ignore"))
    place: int = 0

    def take(self, one: Sequence) -> bool:
        """Take a token that was settled, on the inference thread; return True if the answer ends there."""
        self.first_token = self.first_token or time.monotonic()
        token, settled = one.last, one.record[-1]
        if self.wants_tokens:
            self.tokens.append(self.described(token, settled.kept[1] if settled.kept else None, settled))
            # The logits of a whole answer would fill the memory.
            one.record[-1] = settled._replace(kept=())
        self.parts += self.text.feed(token, ends=token in one.stops.end_tokens)
        return self.text.stopped

    def described(self, token: int, logits: torch.Tensor | None, settled: Settled | None) -> Token:
        """Return a token with its probability under these logits `[vocabulary]`."""
        offset, logprob, top = self.place, None, []
        text, data = self.decoded(token)
        self.place += len(self.characters.decode(data))
        if logits is not None and self.top is not None:
            logprobs = logits.float().log_softmax(-1).clamp(min=NEVER)
            values, ids = logprobs.topk(min(self.top, len(logprobs)))
            logprob = float(logprobs[token])
            top = [(*self.decoded(one), value) for one, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return Token(text, data, offset, logprob, top, settled)

    def tell_new(self) -> None:
        """Tell the client what is new, if it sees pieces."""
        if self.streams and (self.parts or self.tokens):
            self.tell(self.piece())

    def piece(self, finished: Finished | None = None) -> Piece:
        """Return what is new."""
        parts, tokens, self.parts, self.tokens = self.parts, self.tokens, [], []
        return Piece(self.number, parts, tokens, finished)

    def finish(self, cut: bool) -> Piece:
        """Return what is left of a sequence that has ended, which was cut off or not."""
        one, ends = self.sequence, not cut
        tokens = one.generated
        if tokens and not self.text.stopped and tokens[-1] not in one.stops.end_tokens:
            ends = ends and len(tokens) < self.length
        self.parts += self.text.rest()
        return self.piece(
            Finished(
                reason="stop" if ends and tokens else "length",
                prompt_tokens=one.begin,
                cached_tokens=one.shared,
                tokens=len(tokens),
                llm_tokens=sum(step.to_llm for step in one.record),
                llm_calls=len(one.passes["llm"]),
                first_token_seconds=(self.first_token or time.monotonic()) - self.arrived,
            )
        )


class Reply:
    """The JSON of the answers to one request, whole and as the pieces of a stream."""

    def __init__(self, model: str, is_chat: bool, choices: int, choices_of_a_prompt: int, logprobs: bool):
        self.is_chat, self.choices_of_a_prompt, self.has_logprobs = is_chat, choices_of_a_prompt, logprobs
        prefix, self.object = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.messages: list[dict[str, Any]] = [{} for _ in range(choices)]
        self.tokens: list[list[Token]] = [[] for _ in range(choices)]
        self.reasons: list[str | None] = [None] * choices
        self.finished: dict[int, Finished] = {}

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add a piece to an answer, and return its choices in the events of a stream."""
        index, message, events = piece.number, self.messages[piece.number], []
        begins, delta, called = not message, dict[str, Any](), []
        if begins:
            message.update(role="assistant", content="")
            delta["role"] = "assistant"
        for part in piece.parts:
            if isinstance(part, ToolCall):
                calls = message.setdefault("tool_calls", [])
                function = {"name": part.name, "arguments": part.arguments}
                calls.append({"id": call_id(), "type": "function", "function": function})
                called.append({"index": len(calls) - 1, **calls[-1]})
            else:
                name = "reasoning_content" if isinstance(part, ReasoningText) else "content"
                message[name] = message.get(name, "") + part
                delta[name] = delta.get(name, "") + part
        if called:
            delta["tool_calls"] = called
        if delta or piece.tokens:
            events.append(self._choice(index, "delta", delta, piece.tokens))
        self.tokens[index] += piece.tokens
        if piece.finished is not None:
            self.finished[index] = piece.finished
            has_called = piece.finished.reason == "stop" and "tool_calls" in message
            self.reasons[index] = "tool_calls" if has_called else piece.finished.reason
            events.append(self._choice(index, "delta", {}, []))
        return events

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        return {**self.head, "object": self.object + ".chunk" * self.is_chat, "choices": choices, **usage}

    def whole(self) -> dict[str, Any]:
        for message in self.messages:
            message["content"] = message["content"] or (None if "tool_calls" in message else "")
        choices = [
            self._choice(index, "message", message, self.tokens[index]) for index, message in enumerate(self.messages)
        ]
        return {**self.head, "object": self.object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return what the request took: OpenAI's counts, and who wrote how much."""
        ends = [self.finished[index] for index in sorted(self.finished)]
        tokens, llm_tokens = sum(one.tokens for one in ends), sum(one.llm_tokens for one in ends)
        prompts = ends[:: self.choices_of_a_prompt]
        prompt_tokens = sum(one.prompt_tokens for one in prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
            "slm_tokens": tokens - llm_tokens,
            "llm_tokens": llm_tokens,
            "llm_share": llm_tokens / tokens if tokens else 0.0,
            "llm_calls": sum(one.llm_calls for one in ends),
        }

    def _choice(self, index: int, name: str, message: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
        content = {name: message} if self.is_chat else {"text": message.get("content") or ""}
        logprobs: Any = None
        if self.has_logprobs and tokens:
            logprobs = chat_logprobs(tokens) if self.is_chat else completion_logprobs(tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": self.reasons[index]}


def call_id() -> str:
    """Return an id that every chat template takes."""
    return "".join(random.SystemRandom().choices(string.ascii_letters + string.digits, k=9))


def chat_logprobs(tokens: list[Token]) -> dict[str, Any]:
    def entry(text: str, data: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    told = [
        {**entry(one.text, one.data, one.logprob), "top_logprobs": [entry(*top) for top in one.top]} for one in tokens
    ]
    return {"content": told, "refusal": None}


def completion_logprobs(tokens: list[Token]) -> dict[str, Any]:
    # The chosen token is among the likeliest, as with OpenAI.
    tops = [{one.text: one.logprob, **{text: value for text, _, value in reversed(one.top)}} for one in tokens]
    return {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [None if one.logprob is None else top for one, top in zip(tokens, tops, strict=True)],
        "text_offset": [one.offset for one in tokens],
    }


def routing_of(tokens: list[Token]) -> list[dict[str, Any]]:
    """Return who decided each token of an answer: the SLM or the LLM, which was asked, or vetoed the SLM's."""
    return [
        {
            "token": one.text,
            "decided_by": "llm" if one.settled.to_llm else "slm",
            "vetoed": one.settled.vetoed,
            "accepted": one.settled.agreed,
            "score": one.settled.score,
        }
        for one in tokens
        if one.settled is not None
    ]
