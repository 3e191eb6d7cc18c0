"""One answer: what it is written from, how it is written, and what it took."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, ReasoningText

from .stops import StopText

__all__ = ["Answer", "Finished", "write"]


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
        self._text, self._whole_tokenizer = "", tokenizer
        super().__init__(tokenizer._tokenizer, loop, queue, response_parser=answer.parser)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then every token."""
        if not self._first:
            self.first_token = self.first_token or time.monotonic()
            self.tokens += value.tolist()
        super().put(value)

    def end(self) -> None:
        """Take notice that no more tokens come."""
        if self._parser is None and not self.stop.met:
            # A character of which not all bytes came is shown as decoding shows it.
            whole = self._whole_tokenizer.decode(self.tokens, skip_special_tokens=True)
            if whole.startswith(self._text):
                self._enqueue(whole[len(self._text) :])
        super().end()

    def _enqueue(self, item: Any) -> None:
        if item is None:
            item = self.stop.rest()
        elif isinstance(item, str) and not isinstance(item, ReasoningText):
            self._text += item
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
    return "stop" if pieces.stop.met or pieces.tokens[-1] in ends else "length"
