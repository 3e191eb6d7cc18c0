"""`citer serve`: an OpenAI-compatible server of a pair."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from transformers.cli.serving.utils import InferenceThread

from ..model.modeling import CiterForCausalLM
from ..model.routers import as_threshold
from . import ServeOptions
from .answers import Answer, ChatReply, CompletionReply, Finished, Reply, event, usage, write
from .metrics import Measured, Metrics
from .requests import chat_prompt, generation_settings, parser_of, processors, stops_of, text_prompts
from .schema import INTERNAL, ChatRequest, CompletionRequest, Request, RequestError, answer_errors, error_body

BODY_SECONDS = 30.0


class BodyLimit:
    """ASGI middleware that refuses bodies which are too large or come too slowly, while they come."""

    def __init__(self, app: Any, most: int, seconds: float = BODY_SECONDS):
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken, complete = 0, False
        clock = asyncio.get_running_loop().time
        until = clock() + self.seconds

        async def limited() -> Any:
            nonlocal taken, complete
            if complete:
                # Nothing but the client's leaving comes after the body, and that may take as long as it likes.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(until - clock(), 0.001))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"The body of the request took longer than {self.seconds:g} s.") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > self.most:
                raise HTTPException(413, f"The body of the request has more than {self.most} bytes, the most taken.")
            return message

        await self.app(scope, limited, send)


logger = logging.getLogger(__name__)
BEGUN, LEFT = object(), object()
RETRY_AFTER = 5
SECONDS_TO_END = 5


class Engine:
    """A pair that writes for many clients."""

    def __init__(self, model: Any, tokenizer: Any, options: ServeOptions, metrics: Metrics):
        self.model, self.tokenizer, self.options, self.metrics = model, tokenizer, options, metrics
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
        if self._requests > self.options.max_waiting:
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
                f"Its turn did not come within {self.options.timeout:g} s (--timeout). Try again later.",
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


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in (
        (400, "The request is malformed, or asks for what this model cannot do."),
        (404, "Another model was asked for."),
        (408, "The body came too slowly."),
        (413, "The body is too large."),
        (503, "Too many requests are waiting."),
    )
}


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer.", "content": {"text/event-stream": {}}},
    **ERRORS,
}


def build_app(engine: Engine, names: tuple[str, ...], router_threshold: float) -> FastAPI:
    """Return the app that serves a pair."""
    app = FastAPI(title="citer serve", docs_url=None, redoc_url=None)
    answer_errors(app)
    app.add_middleware(BodyLimit, most=engine.options.max_request_bytes)
    app.add_middleware(Measured, metrics=engine.metrics)
    server = Server(engine, names, router_threshold)
    created = int(time.time())
    card = {"id": names[0], "object": "model", "created": created, "owned_by": "citer"}

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(request: fastapi.Request, body: ChatRequest) -> Response:
        return await server.chat(request, body)

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(request: fastapi.Request, body: CompletionRequest) -> Response:
        return await server.complete(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}", responses={404: ERRORS[404]})
    async def model(model: str) -> dict[str, Any]:
        server.check_name(model)
        return card

    @app.get("/health", responses={503: {"description": "The thread that writes has died."}})
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "dead"}, 200 if engine.alive else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class Server:
    """Answers requests with a pair."""

    def __init__(self, engine: Engine, names: tuple[str, ...], router_threshold: float):
        self.engine, self.names, self.router_threshold = engine, names, router_threshold

    def check_name(self, model: str | None) -> None:
        """Refuse a request for another model."""
        if model is not None and model not in self.names:
            raise RequestError(
                f"model: this server has {self.names[0]!r} only.", status=404, param="model", code="model_not_found"
            )

    async def chat(self, request: fastapi.Request, body: ChatRequest) -> Response:
        """Answer a chat."""
        return await self._answer(request, body, lambda: [chat_prompt(self.engine.tokenizer, body)], ChatReply)

    async def complete(self, request: fastapi.Request, body: CompletionRequest) -> Response:
        """Continue texts."""
        engine = self.engine
        prompts = partial(text_prompts, engine.tokenizer, body, engine.model.vocab_size)
        return await self._answer(request, body, prompts, CompletionReply)

    def _plan(self, body: Request, prompts: list[list[int]], arrived: float) -> list[Answer]:
        """Return the answers that a request asks for, those to one prompt side by side."""
        return [
            Answer(
                prompt=prompt,
                settings=generation_settings(self.engine.model, body, len(prompt), self.engine.options),
                processors=processors(body, len(prompt)),
                threshold=self.router_threshold if body.router_threshold is None else body.router_threshold,
                stops=stops_of(body),
                seed=None if body.seed is None else (body.seed + number) % 2**63,
                arrived=arrived,
                deadline=arrived + self.engine.options.timeout,
                parser=parser_of(self.engine.tokenizer, self.engine.model.llm, body, prompt),
            )
            for prompt in prompts
            for number in range(body.n or 1)
        ]

    async def _answer(
        self, request: fastapi.Request, body: Request, read: Callable[[], list[list[int]]], kind: type[Reply]
    ) -> Response:
        """Answer a request whose prompts `read` reads."""
        self.check_name(body.model)
        arrived = time.monotonic()
        # Templates and tokenizers take their time over long texts, and others wait for the event loop.
        prompts = await run_in_threadpool(read)
        answers = await run_in_threadpool(self._plan, body, prompts, arrived)
        reply = kind(self.names[0], len(answers))
        pieces = self._pieces(request, answers)
        if body.stream:
            # What is refused is refused with its status, which a stream that has begun cannot have any more.
            first = await anext(pieces, None)
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = stream(first, pieces, reply, len(prompts), include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        finished = []
        async for index, piece in pieces:
            reply.add(index, piece)
            if isinstance(piece, Finished):
                finished.append(piece)
        return JSONResponse(reply.whole(usage(finished, len(prompts))))

    async def _pieces(self, request: fastapi.Request, answers: list[Answer]) -> AsyncGenerator[tuple[int, Any], None]:
        """Give the pieces of several answers, one answer after the other, with their numbers."""
        left = asyncio.Event()
        watch = asyncio.create_task(notice_leaving(request, left))
        try:
            with self.engine.place():
                for index, answer in enumerate(answers):
                    async with aclosing(self.engine.pieces(answer, left)) as pieces:
                        async for piece in pieces:
                            yield index, piece
                    if left.is_set():
                        return
        finally:
            watch.cancel()


async def notice_leaving(request: fastapi.Request, left: asyncio.Event) -> None:
    """Wait until the client of a request has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    left.set()


async def stream(
    first: tuple[int, Any] | None,
    others: AsyncGenerator[tuple[int, Any], None],
    reply: Reply,
    prompts: int,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Give the events of a stream. The last choice tells what the request took, as transformers' server does."""
    finished: list[Finished] = []
    used = None
    try:
        async with aclosing(others):
            piece = first
            while piece is not None:
                choice = reply.add(*piece)
                if isinstance(piece[1], Finished):
                    finished.append(piece[1])
                    used = usage(finished, prompts) if len(finished) == len(reply.pieces) else None
                yield event(reply.chunk([choice], used))
                piece = await anext(others, None)
    except RequestError as error:
        yield event(error_body(str(error), error.status, error.param, error.code))
        return
    if include_usage:
        yield event(reply.chunk([], used))
    yield "data: [DONE]\n\n"


# Streams that are under way when the server is told to stop.
SECONDS_TO_LEAVE = 5


def serve(load: Callable[[], CiterForCausalLM], name: str, **options: Any) -> None:
    """Serve a pair to OpenAI clients until interrupted.

    Args:
        load: Loads the pair, once the port is taken.
        name: What requests call the model; the last part of a path is accepted too.
        options: Of `ServeOptions`.

    Raises:
        OSError: when the port cannot be had.
        ValueError: for a pair without a tokenizer that can stream, or senseless options.
    """
    chosen = ServeOptions(**options)
    # Whoever cannot have the port learns it before minutes of loading.
    with listen(chosen.host, chosen.port) as listener:
        print(f"Loading {name} ...", file=sys.stderr)
        model = load()
        tokenizer = model.load_tokenizer()
        if tokenizer is None or not tokenizer.is_fast:
            found = "no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__}, which cannot stream"
            raise ValueError(f"{name} has {found}: a tokenizer.json is needed. Save one there.")
        threshold = as_threshold(
            model.default_threshold if chosen.router_threshold is None else chosen.router_threshold
        )
        if chosen.cache_implementation is not None:
            model.generation_config.cache_implementation = chosen.cache_implementation
        engine = Engine(model, tokenizer, chosen, Metrics())
        app = build_app(engine, tuple(dict.fromkeys((name, Path(name).name))), threshold)
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=SECONDS_TO_LEAVE
        )
        print(welcome(name, threshold, *listener.getsockname()[:2]), file=sys.stderr, flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
        finally:
            engine.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}. Choose others; --port 0 takes a free one.") from error
    return listener


def welcome(name: str, threshold: float, host: str, port: int) -> str:
    """Say where the server is and how it is asked."""
    inside = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    warning = (
        "" if inside else "\nAnyone who reaches this address can use it: it asks for no key. Put a proxy before it."
    )
    place = f"[{host}]" if ":" in host else host
    return (
        f"Serving {name} at http://{place}:{port}/v1 with threshold {threshold:g}; also /health and /metrics. "
        f"Ctrl-C stops it.{warning}"
    )
