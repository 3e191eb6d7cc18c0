"""One answer: how it is generated, what it took, and its JSON, whole and in pieces."""

import asyncio
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, ReasoningText, ToolCall


class StopText:
    """Passes text on as far as it can be no part of a stop string."""

    def __init__(self, stops: tuple[str, ...] = ()):
        self.stops, self.met, self._held = stops, False, ""

    def feed(self, text: str) -> str:
        """Take new text, and return what is now known to be part of the answer."""
        if self.met:
            return ""
        text = self._held + text
        found = [place for place in map(text.find, self.stops) if place >= 0]
        self.met = bool(found)
        # How much of the text's end may be the beginning of a stop string.
        begun = max((n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        end = min(found) if found else len(text) - begun
        self._held = "" if self.met else text[end:]
        return text[:end]

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


@dataclass
class Finished:
    """The end of an answer."""

    reason: str
    prompt_tokens: int
    tokens: int
    llm_tokens: int
    llm_calls: int
    first_token_seconds: float


@dataclass
class Answer:
    """What an answer is generated from, and whether anybody still wants it."""

    prompt: list[int]
    settings: GenerationConfig
    processors: LogitsProcessorList
    threshold: float
    stops: tuple[str, ...]
    seed: int | None
    parser: Any
    arrived: float
    deadline: float
    cancelled: threading.Event


class Pieces(DirectStreamer):
    """Turns tokens into text, tool calls and reasoning, as transformers' server does, up to a stop string."""

    def __init__(self, tokenizer: Any, answer: Answer, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]):
        self.stop = StopText(answer.stops)
        self.tokens: list[int] = []
        self.first_token = 0.0
        self.text = ""
        super().__init__(tokenizer._tokenizer, loop, queue, response_parser=answer.parser)

    def put(self, value: torch.Tensor) -> None:
        if not self._first:
            self.first_token = self.first_token or time.monotonic()
            self.tokens += value.reshape(-1).tolist()
        super().put(value.reshape(-1))

    def _enqueue(self, item: Any) -> None:
        if item is None:
            item = self.stop.rest()
        elif isinstance(item, str) and not isinstance(item, ReasoningText):
            self.text += item
            item = self.stop.feed(item)
        if item != "":
            super()._enqueue(item)


def write(
    model: Any, tokenizer: Any, answer: Answer, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]
) -> Finished:
    """Generate an answer, whose pieces are put into a queue."""
    if answer.seed is None:
        torch.seed()
    else:
        torch.manual_seed(answer.seed)
    settings, pieces = answer.settings, Pieces(tokenizer, answer, loop, queue)

    def ends_early(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ends = pieces.stop.met or answer.cancelled.is_set() or time.monotonic() > answer.deadline
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)

    input_ids = torch.tensor([answer.prompt], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=settings,
        logits_processor=answer.processors,
        stopping_criteria=StoppingCriteriaList([ends_early]),
        router_threshold=answer.threshold,
        streamer=pieces,
        # Published stop strings need it.
        **({"tokenizer": tokenizer} if settings.stop_strings else {}),
    )
    routing = output.past_key_values.routing
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    # Stop strings of a published generation config stay in the text, as in `generate`.
    published = settings.stop_strings or []
    stopped = pieces.text.endswith(tuple([published] if isinstance(published, str) else published))
    return Finished(
        reason="stop" if pieces.stop.met or stopped or pieces.tokens[-1] in ends else "length",
        prompt_tokens=len(answer.prompt),
        tokens=len(pieces.tokens),
        llm_tokens=int(routing.to_llm.sum()),
        llm_calls=routing.llm_calls,
        first_token_seconds=pieces.first_token - answer.arrived,
    )


class Reply:
    """The JSON of the answers to one request, whole and as the pieces of a stream."""

    def __init__(self, model: str, is_chat: bool, choices: int, choices_of_a_prompt: int):
        self.is_chat, self.choices_of_a_prompt = is_chat, choices_of_a_prompt
        prefix, self.object = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.messages: list[dict[str, Any]] = [{} for _ in range(choices)]
        self.reasons: list[str | None] = [None] * choices
        self.finished: list[Finished] = []

    def add(self, index: int, piece: Any) -> dict[str, Any]:
        """Add a piece to an answer, and return the event that tells it in a stream."""
        message = self.messages[index]
        delta: dict[str, Any] = {}
        if not message:
            message.update(role="assistant", content="")
            delta["role"] = "assistant"
        if isinstance(piece, Finished):
            self.finished.append(piece)
            called = piece.reason == "stop" and "tool_calls" in message
            self.reasons[index] = "tool_calls" if called else piece.reason
        elif isinstance(piece, ToolCall):
            calls = message.setdefault("tool_calls", [])
            function = {"name": piece.name, "arguments": piece.arguments}
            name = f"{self.head['id']}_{index}_tool_call_{len(calls)}"
            calls.append({"id": name, "type": "function", "function": function})
            delta["tool_calls"] = [{"index": len(calls) - 1, **calls[-1]}]
        else:
            name = "reasoning_content" if isinstance(piece, ReasoningText) else "content"
            message[name] = message.get(name, "") + piece
            delta[name] = piece
        # The last choice tells the usage, as transformers' server does.
        complete = len(self.finished) == len(self.messages)
        return self.chunk([self._choice(index, "delta", delta)], **({"usage": self.usage()} if complete else {}))

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        return {**self.head, "object": self.object + ".chunk" * self.is_chat, "choices": choices, **usage}

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index, "message", message) for index, message in enumerate(self.messages)]
        return {**self.head, "object": self.object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return what the request took: OpenAI's counts, and who wrote how much."""
        tokens = sum(one.tokens for one in self.finished)
        llm_tokens = sum(one.llm_tokens for one in self.finished)
        prompt_tokens = sum(one.prompt_tokens for one in self.finished[:: self.choices_of_a_prompt])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "slm_tokens": tokens - llm_tokens,
            "llm_tokens": llm_tokens,
            "llm_share": llm_tokens / tokens if tokens else 0.0,
            "llm_calls": sum(one.llm_calls for one in self.finished),
        }

    def _choice(self, index: int, name: str, message: dict[str, Any]) -> dict[str, Any]:
        content = {name: message} if self.is_chat else {"text": message.get("content", "")}
        return {"index": index, **content, "logprobs": None, "finish_reason": self.reasons[index]}
