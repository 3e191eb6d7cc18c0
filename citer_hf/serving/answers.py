"""One answer: how it is generated, what it took, and its JSON, whole and in pieces."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, ReasoningText, ToolCall


class StopText:
    """Passes text on as far as it can be no part of a stop string."""

    def __init__(self, stops: tuple[str, ...] = ()):
        self.stops = stops
        self.met = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Take new text, and return what is now known to be part of the answer."""
        if self.met:
            return ""
        text = self._held + text
        found = [place for place in map(text.find, self.stops) if place >= 0]
        self.met = bool(found)
        end = min(found) if found else len(text) - max((begun(text, stop) for stop in self.stops), default=0)
        self._held = "" if self.met else text[end:]
        return text[:end]

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


@dataclass
class Finished:
    """The end of an answer."""

    reason: str
    prompt_tokens: int
    tokens: int
    llm_tokens: int
    llm_calls: int
    first_token_seconds: float
    seconds: float


@dataclass
class Answer:
    """What an answer is written from, and whether it is still wanted."""

    prompt: list[int]
    settings: GenerationConfig
    processors: LogitsProcessorList
    threshold: float
    stops: tuple[str, ...]
    seed: int | None
    arrived: float
    deadline: float
    parser: Any = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Note that nobody wants it any more: it ends after the token that is being written."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled.is_set()


class Pieces(DirectStreamer):
    """Turns tokens into pieces of text, tool calls and reasoning, as transformers' server does, up to a stop
    string."""

    def __init__(self, tokenizer: Any, answer: Answer, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]):
        self.stop = StopText(answer.stops)
        self.tokens: list[int] = []
        self.first_token = 0.0
        self.text, self._whole_tokenizer = "", tokenizer
        super().__init__(tokenizer._tokenizer, loop, queue, response_parser=answer.parser)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then every token."""
        if not self._first:
            self.first_token = self.first_token or time.monotonic()
            self.tokens += value.reshape(-1).tolist()
        super().put(value.reshape(-1))

    def end(self) -> None:
        """Take notice that no more tokens come."""
        if self._parser is None and not self.stop.met:
            # A character of which not all bytes came is shown as decoding shows it.
            whole = self._whole_tokenizer.decode(self.tokens, skip_special_tokens=True)
            if whole.startswith(self.text):
                self._enqueue(whole[len(self.text) :])
        super().end()

    def _enqueue(self, item: Any) -> None:
        if item is None:
            item = self.stop.rest()
        elif isinstance(item, str) and not isinstance(item, ReasoningText):
            self.text += item
            item = self.stop.feed(item)
        if item != "":
            super()._enqueue(item)


class EndsEarly(StoppingCriteria):
    """Ends an answer at a stop string, at its deadline, and when its client has gone."""

    def __init__(self, answer: Answer, stop: StopText):
        self.answer, self.stop = answer, stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ends = self.stop.met or self.answer.cancelled or time.monotonic() > self.answer.deadline
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)


def write(
    model: Any, tokenizer: Any, answer: Answer, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]
) -> Finished:
    """Write an answer, piece by piece."""
    if answer.seed is None:
        torch.seed()
    else:
        torch.manual_seed(answer.seed)
    began = time.monotonic()
    pieces = Pieces(tokenizer, answer, loop, queue)
    input_ids = torch.tensor([answer.prompt], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=answer.settings,
        logits_processor=answer.processors,
        stopping_criteria=StoppingCriteriaList([EndsEarly(answer, pieces.stop)]),
        router_threshold=answer.threshold,
        streamer=pieces,
        # Published stop strings need it.
        **({"tokenizer": tokenizer} if answer.settings.stop_strings else {}),
    )
    routing = output.past_key_values.routing
    return Finished(
        reason=reason_of(answer, pieces),
        prompt_tokens=len(answer.prompt),
        tokens=len(pieces.tokens),
        llm_tokens=int(routing.to_llm.sum()),
        llm_calls=routing.llm_calls,
        first_token_seconds=pieces.first_token - answer.arrived,
        seconds=time.monotonic() - began,
    )


def reason_of(answer: Answer, pieces: Pieces) -> str:
    """Say why an answer ended, in OpenAI's words."""
    ends = answer.settings.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    # Stop strings of a published generation config stay in the text, as in `generate`.
    published = answer.settings.stop_strings or []
    stopped = pieces.text.endswith(tuple([published] if isinstance(published, str) else published))
    return "stop" if pieces.stop.met or pieces.tokens[-1] in ends or stopped else "length"


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
