"""The inference thread: it owns the engine, admits answers, steps, and hands out settled tokens."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..model.cache import CiterCache
from ..model.compat import is_out_of_memory
from ..model.engine import CHUNK, Engine
from ..model.sequence import Sequence, Settled
from ..model.slots import takes_back
from .answers import Answer, Finished
from .schema import INTERNAL, RequestError

logger = logging.getLogger(__name__)

BEGUN = object()
NO_MEMORY = "The server has not enough memory for this request. Shorten the prompt or lower max_tokens."
NO_LLM = "The server of the LLM does not answer. Try again later."
STOPPING = "The server is being stopped. Ask another one, or try again later."


class Worker:
    """Writes answers on a thread of its own, several at once.

    Args:
        model: The pair.
        slots: Answers that are written at once.
        capacity: Tokens of a slot whose memory is fixed; `None`: it grows.
        count: Called with the end of every answer.
    """

    def __init__(self, model: Any, slots: int, capacity: int | None, count: Callable[[Finished], None]):
        self.model, self.slots, self.capacity, self.count = model, slots, capacity, count
        self.chunk = model.generation_config.prefill_chunk_size or CHUNK
        self._new: SimpleQueue[Answer | None] = SimpleQueue()
        self._waiting, self._running = deque[Answer](), list[Answer]()
        self._preparing = deque[tuple[Answer, Iterator[None]]]()
        self._stops_at: float | None = None
        self._closed = False
        # When the thread last did something; `None` where there is nothing to do.
        self._last_step: float | None = None
        self.thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.thread.start()

    @property
    def silence(self) -> float:
        """Seconds since the last step for what is under way; 0 where nothing is."""
        last = self._last_step
        return 0.0 if last is None else time.monotonic() - last

    def submit(self, answer: Answer) -> None:
        self._new.put(answer)

    def drain(self, seconds: float) -> None:
        """Refuse answers that wait, and end those that are being written after so many seconds at the latest."""
        self._stops_at = time.monotonic() + seconds
        self._new.put(None)

    def close(self, seconds: float) -> None:
        """End everything, and wait for the thread."""
        self._closed = True
        self._new.put(None)
        self.thread.join(timeout=seconds)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        model, settings = self.model, self.model.generation_config
        lent: Any = nullcontext()
        if self.capacity is not None:
            lent = model.compiled_steps.workspace(model, settings, self.slots, self.capacity)
        with torch.no_grad(), model._optimize_model_for_decode(), lent as work:
            while not self._closed:
                try:
                    self._serve(work)
                except Exception as error:
                    # A fault of ours: whoever waits is told, and a new engine goes on.
                    logger.exception("The engine failed.")
                    for answer in [*self._running, *self._waiting]:
                        self._fail(answer, error)
                    self._running, self._waiting, self._preparing = [], deque(), deque()

    def _serve(self, work: Any) -> None:
        """Serve until the thread ends."""
        cache = CiterCache(self.model.config)
        engine: Engine | None = None
        if takes_back(cache):
            engine = Engine(self.model, self.slots, cache, self.capacity, self.chunk, self.model.pace, work)
        while not self._closed:
            self._last_step = time.monotonic()
            # 1. New answers; wait for one where there is nothing to do.
            self._collect()
            # 2. Those that nobody wants any more, or whose time is over.
            self._drop(engine)
            # 3. The next ones begin where slots are free.
            self._begin(engine)
            self._go_on()
            # 4. A step of all.
            if engine is not None and engine.busy:
                try:
                    engine.step()
                except Exception:
                    logger.exception("A step failed; every answer goes on alone.")
                    engine.step_apart()
            # 5. Settled tokens go to the clients.
            self._hand_out()

    def _collect(self) -> None:
        idle = not (self._running or self._waiting)
        while idle or not self._new.empty():
            if idle:
                self._last_step = None
            answer = self._new.get()
            self._last_step, idle = time.monotonic(), False
            if answer is not None:
                self._waiting.append(answer)

    def _drop(self, engine: Engine | None) -> None:
        now = time.monotonic()
        for answer in list(self._waiting):
            # Where others to the same request are written already, it is in flight.
            stopped = self._stops_at is not None and (now > self._stops_at or not answer.begun.is_set())
            if answer.cancelled.is_set() or now > answer.deadline or stopped:
                self._waiting.remove(answer)
                answer.tell(RequestError(STOPPING if stopped else "Its turn did not come in time.", 503))
        for answer in self._running:
            if engine is not None and answer.sequence.on_settled is not None and self._is_over(answer):
                engine.cancel(answer.sequence)

    def _is_over(self, answer: Answer) -> bool:
        """Whether an answer is cut off where it is."""
        now = time.monotonic()
        stopped = self._stops_at is not None and now > self._stops_at
        return answer.cancelled.is_set() or now > answer.deadline or stopped or self._closed

    def _begin(self, engine: Engine | None) -> None:
        while self._waiting and len(self._running) < self.slots:
            answer = self._waiting[0]
            alone = engine is None or bool(answer.alone)
            if alone and self._running:
                # It holds up all others, and so begins when they have ended.
                return
            self._waiting.popleft()
            answer.begun.set()
            answer.tell(BEGUN)
            self._running.append(answer)
            self._preparing.append((answer, self._prepare(answer, None if alone else engine)))

    def _go_on(self) -> None:
        """Prepare one answer after the other, until there is a step for those that are prepared already."""
        while self._preparing:
            answer, steps = self._preparing[0]
            try:
                next(steps)
                return
            except StopIteration:
                self._preparing.popleft()
            except Exception as error:
                self._preparing.popleft()
                answer.sequence.finished, answer.sequence.error = True, error

    def _prepare(self, answer: Answer, engine: Engine | None) -> Iterator[None]:
        one = answer.sequence
        if answer.echo is not None:
            yield from self._echo(answer)
        if answer.length == 0 or self._is_over(answer):
            one.finished = True
        elif engine is None:
            self._write_alone(answer)
        else:
            one.on_settled = partial(settle, engine, answer)
            engine.submit(one)

    def _hand_out(self) -> None:
        for answer in list(self._running):
            one = answer.sequence
            if not one.finished:
                answer.tell_new()
                continue
            self._running.remove(answer)
            try:
                if one.error is not None:
                    raise one.error
                piece = answer.finish(cut=not answer.text.stopped and self._is_over(answer))
            except Exception as error:
                self._fail(answer, error)
                continue
            if piece.finished is not None:
                self.count(piece.finished)
            answer.tell(piece)

    def _fail(self, answer: Answer, error: BaseException) -> None:
        # The operator's log alone says more.
        logger.error("An answer could not be written.", exc_info=error)
        if isinstance(error, ConnectionError):
            answer.tell(RequestError(NO_LLM, 503))
            return
        answer.tell(RequestError(NO_MEMORY if is_out_of_memory(error) else INTERNAL, 500))

    # ---- beside the engine ----------------------------------------------------------------------------------------

    def _echo(self, answer: Answer) -> Iterator[None]:
        """Tell the prompt first, with the likelihood that `forward` gives it if asked for, chunk by chunk."""
        one, last = answer.sequence, None
        if answer.top is not None:
            cache, dials = CiterCache(self.model.config), {"router_threshold": one.threshold, "llm_veto": one.veto}
            for chunk in torch.split(torch.tensor([one.tokens], device=self.model.device), self.chunk, dim=1):
                logits = self.model(chunk, past_key_values=cache, **dials).logits[0]
                known = zip(chunk[0].tolist(), [last, *logits[:-1]], strict=True)
                answer.tokens += [answer.described(*both, None) for both in known]
                last = logits[-1]
                yield
                if self._is_over(answer):
                    return
        answer.parts.append(answer.echo)

    def _write_alone(self, answer: Answer) -> None:
        """Generate with transformers' loop, for what the engine cannot decode; the other answers wait."""
        cache, one = CiterCache(self.model.config), answer.sequence

        def ends_early(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            ends, self._last_step = answer.text.stopped or self._is_over(answer), time.monotonic()
            return torch.full((len(input_ids),), ends, device=input_ids.device)

        torch.manual_seed(answer.seed)
        answer.generate.keywords["stopping_criteria"].append(ends_early)
        answer.generate(past_key_values=cache, streamer=Settler(answer, cache))
        # The passes themselves are not told.
        one.passes["llm"] = [(0, 0)] * cache.routing.llm_calls
        one.finished = True


def settle(engine: Engine, answer: Answer, one: Sequence) -> None:
    """Take a settled token, and end the sequence where its text ends."""
    if answer.take(one):
        engine.cancel(one)


class Settler(BaseStreamer):
    """Settles the tokens that transformers' loop streams."""

    def __init__(self, answer: Answer, cache: CiterCache):
        self.answer, self.cache, self._is_prompt = answer, cache, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        answer, one = self.answer, self.answer.sequence
        one.tokens.append(int(value))
        one.record.append(Settled(*self.cache.routing.decision(len(one.record))))
        answer.take(one)
        answer.tell_new()

    def end(self) -> None:
        pass
