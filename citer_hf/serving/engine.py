"""Answers one request after another, on the one thread on which transformers' server runs a model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any

from transformers.cli.serving.utils import InferenceThread

from .answers import Answer, Finished, write
from .errors import INTERNAL, RequestError
from .limits import Limits
from .metrics import Metrics

__all__ = ["Engine"]

logger = logging.getLogger(__name__)
BEGUN, LEFT = object(), object()
RETRY_AFTER = 5
SECONDS_TO_END = 5


class Engine:
    """A pair that writes for many clients."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits, metrics: Metrics):
        self.model, self.tokenizer, self.limits, self.metrics = model, tokenizer, limits, metrics
        self._thread = InferenceThread()
        self._requests = 0

    @property
    def alive(self) -> bool:
        """Whether the thread that writes is there."""
        return self._thread._thread.is_alive()

    def close(self) -> None:
        """Wait until the answer that is being written has ended, which it soon does when nobody wants it any more."""
        with suppress(futures.TimeoutError):
            self._thread.submit(lambda: None).result(timeout=SECONDS_TO_END)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for requests."""
        if self._requests > self.limits.waiting:
            raise RequestError(
                f"{self._requests} requests are here already (--max-waiting). Try again later.",
                status=503,
                retry_after=RETRY_AFTER,
            )
        self._requests += 1
        self.metrics.requests_here.inc()
        try:
            yield
        finally:
            self._requests -= 1
            self.metrics.requests_here.dec()

    async def pieces(self, answer: Answer, left: asyncio.Event) -> AsyncGenerator[Any, None]:
        """Give the pieces of an answer as they are written, and `Finished` at the end."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        watch = asyncio.create_task(self._watch(answer, left, queue))
        self._thread.submit(self._write, answer, asyncio.get_running_loop(), queue)
        try:
            await self._begun(answer, queue)
            while (piece := await queue.get()) is not LEFT:
                if isinstance(piece, RequestError):
                    raise piece
                yield piece
                if isinstance(piece, Finished):
                    return
        finally:
            answer.cancel()
            watch.cancel()

    async def _watch(self, answer: Answer, left: asyncio.Event, queue: asyncio.Queue[Any]) -> None:
        await left.wait()
        answer.cancel()
        queue.put_nowait(LEFT)

    async def _begun(self, answer: Answer, queue: asyncio.Queue[Any]) -> None:
        try:
            begun = await asyncio.wait_for(queue.get(), max(answer.deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            raise RequestError(
                f"Its turn did not come within {self.limits.seconds:g} s (--timeout). Try again later.",
                status=503,
                retry_after=RETRY_AFTER,
            ) from None
        if begun is LEFT:
            queue.put_nowait(LEFT)

    def _write(self, answer: Answer, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]) -> None:
        """Write an answer on this thread; whatever happens, the one who awaits it is told."""

        def tell(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        if answer.cancelled:
            return
        tell(BEGUN)
        try:
            finished = write(self.model, self.tokenizer, answer, loop, queue)
        except Exception as error:
            logger.exception("An answer could not be written.")
            tell(RequestError(advice(error), status=500))
            return
        self.metrics.count(finished)
        tell(finished)


def advice(error: Exception) -> str:
    """Say to a client what failed, without what the server's operator alone should see."""
    if type(error).__name__ == "OutOfMemoryError":
        return "The server has not enough memory for this request. Shorten the prompt or lower max_tokens."
    return INTERNAL
