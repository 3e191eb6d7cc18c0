"""The JSON of answers, whole and in pieces, as OpenAI's API gives it."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from transformers.cli.serving.utils import ReasoningText, ToolCall

from .answers import Finished

__all__ = ["ChatReply", "CompletionReply", "Reply", "event", "usage"]


def usage(finished: list[Finished], prompts: int) -> dict[str, Any]:
    """Return what a request took: OpenAI's counts, and who wrote how much."""
    tokens = sum(one.tokens for one in finished)
    llm_tokens = sum(one.llm_tokens for one in finished)
    prompt_tokens = sum(one.prompt_tokens for one in finished[:: max(len(finished) // prompts, 1)])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "slm_tokens": tokens - llm_tokens,
        "llm_tokens": llm_tokens,
        "llm_share": llm_tokens / tokens if tokens else 0.0,
        "llm_calls": sum(one.llm_calls for one in finished),
    }


def event(content: Any) -> str:
    """Return one event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class Reply:
    """The answers to one request, as they are written."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, choices: int):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.pieces: list[list[Any]] = [[] for _ in range(choices)]
        self.reasons: list[str | None] = [None] * choices

    def add(self, index: int, piece: Any) -> dict[str, Any]:
        """Note a piece, and return the choice that tells it in a stream."""
        if isinstance(piece, Finished):
            called = any(isinstance(one, ToolCall) for one in self.pieces[index])
            self.reasons[index] = "tool_calls" if called and piece.reason == "stop" else piece.reason
            return self._told(index, None)
        choice = self._told(index, piece)
        self.pieces[index].append(piece)
        return choice

    def chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return one piece of a stream."""
        tail = {} if used is None else {"usage": used}
        return {**self.head, "object": self.chunk_object, "choices": choices, **tail}

    def whole(self, used: dict[str, Any]) -> dict[str, Any]:
        """Return all answers."""
        choices = [self._choice(index) for index in range(len(self.pieces))]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": used}

    def text(self, index: int) -> str:
        """Return the text of an answer, without reasoning."""
        return "".join(one for one in self.pieces[index] if is_content(one))

    def _told(self, index: int, piece: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


def is_content(piece: Any) -> bool:
    """Say whether a piece is text of the answer itself."""
    return isinstance(piece, str) and not isinstance(piece, ReasoningText)


class CompletionReply(Reply):
    """The answers of `/v1/completions`."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _told(self, index: int, piece: Any) -> dict[str, Any]:
        return {"index": index, "text": piece or "", "logprobs": None, "finish_reason": self.reasons[index]}

    def _choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": self.text(index), "logprobs": None, "finish_reason": self.reasons[index]}


class ChatReply(Reply):
    """The answers of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _told(self, index: int, piece: Any) -> dict[str, Any]:
        delta: dict[str, Any] = {} if self.pieces[index] else {"role": "assistant"}
        if isinstance(piece, ToolCall):
            number = sum(isinstance(one, ToolCall) for one in self.pieces[index])
            delta["tool_calls"] = [{"index": number, **self._call(index, number, piece)}]
        elif piece is not None:
            delta["content" if is_content(piece) else "reasoning_content"] = piece
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": self.reasons[index]}

    def _choice(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text(index)}
        reasoning = "".join(one for one in self.pieces[index] if isinstance(one, ReasoningText))
        calls = [one for one in self.pieces[index] if isinstance(one, ToolCall)]
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [self._call(index, number, call) for number, call in enumerate(calls)]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": self.reasons[index]}

    def _call(self, index: int, number: int, call: ToolCall) -> dict[str, Any]:
        name = f"{self.head['id']}_{index}_tool_call_{number}"
        return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
