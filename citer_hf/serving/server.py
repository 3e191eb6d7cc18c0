"""`citer serve`: an OpenAI-compatible server of a pair."""

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent import futures
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import fastapi
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from transformers import LogitsProcessorList
from transformers.cli.serving.utils import InferenceThread

from ..model.modeling import CiterForCausalLM
from ..model.routers import as_threshold
from . import ServeOptions
from .answers import Answer, Finished, Reply, write
from .metrics import Metrics
from .requests import UsedTokens, generation_settings, parser_of, prompts_of
from .schema import INTERNAL, ChatRequest, CompletionRequest, Request, RequestError, answer_errors, error_body

logger = logging.getLogger(__name__)
BODY_SECONDS = 30.0
# The longest wait for streams and for the answer under way when the server is told to stop.
SECONDS_TO_END = 5
BEGUN = object()
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
# nginx' status of a request whose client has gone.
CLIENT_LEFT = 499
NO_MEMORY = "The server has not enough memory for this request. Shorten the prompt or lower max_tokens."


class Edge:
    """ASGI middleware that refuses bodies which are too large or come too slowly, and counts requests for answers."""

    def __init__(self, app: Any, metrics: Metrics, most: int, seconds: float = BODY_SECONDS):
        self.app, self.metrics, self.most, self.seconds = app, metrics, most, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        began, taken, complete, status, ended = time.monotonic(), 0, scope["type"] != "http", 500, False

        async def limited() -> Any:
            nonlocal taken, complete, status, ended
            # After the body, only the client's leaving comes, at any time.
            seconds = None if complete else max(began + self.seconds - time.monotonic(), 0.001)
            try:
                message = await asyncio.wait_for(receive(), seconds)
            except asyncio.TimeoutError:
                raise RequestError(f"The body of the request took longer than {self.seconds:g} s.", 408) from None
            taken += len(message.get("body", b""))
            complete = complete or not message.get("more_body", False)
            if taken > self.most:
                raise RequestError(f"The body of the request has more than {self.most} bytes, the most taken.", 413)
            if message["type"] == "http.disconnect" and not ended:
                status, ended = CLIENT_LEFT, True
            return message

        async def noted(message: Any) -> None:
            nonlocal status, ended
            if not ended:
                status = message.get("status", status)
                ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, limited, noted)
        finally:
            if scope.get("path") in ENDPOINTS:
                self.metrics.requests.labels(scope["path"], str(status)).inc()
                self.metrics.request_seconds.labels(scope["path"]).observe(time.monotonic() - began)


class Server:
    """Answers the requests of many clients with a pair, one answer at a time."""

    def __init__(self, model: Any, tokenizer: Any, name: str, options: ServeOptions):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.names = (name, Path(name).name)
        threshold = options.router_threshold
        self.threshold = as_threshold(model.default_threshold if threshold is None else threshold)
        self.metrics = Metrics()
        self.thread = InferenceThread()
        self._requests = 0

    def close(self) -> None:
        """Wait until the answer under way has ended, which it soon does when nobody wants it any more."""
        with suppress(futures.TimeoutError):
            self.thread.submit(lambda: None).result(timeout=SECONDS_TO_END)

    def check_name(self, model: str | None) -> None:
        """Raise an error for a request for another model."""
        if model is not None and model not in self.names:
            raise RequestError(f"model: this server has {self.names[0]!r} only.", 404, "model", "model_not_found")

    async def answer(self, request: fastapi.Request, body: Request) -> Response:
        """Answer a request, whole or as a stream."""
        self.check_name(body.model)
        # Templates and tokenizers take their time over long texts, and other requests wait for the event loop.
        answers = await run_in_threadpool(self._plan, body, time.monotonic())
        reply = Reply(self.names[0], isinstance(body, ChatRequest), len(answers), body.n or 1)
        pieces = self._pieces(request, answers)
        if body.stream:
            # A refusal has a status, which a stream that has begun cannot give any more.
            first = await anext(pieces, None)
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = stream(first, pieces, reply, include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async for index, piece in pieces:
            reply.add(index, piece)
        return JSONResponse(reply.whole())

    def _plan(self, body: Request, arrived: float) -> list[Answer]:
        """Return the answers that a request asks for, those to one prompt side by side."""
        cancelled, penalized = threading.Event(), body.frequency_penalty or body.presence_penalty
        return [
            Answer(
                prompt=prompt,
                settings=generation_settings(self.model, body, len(prompt), self.options),
                processors=LogitsProcessorList([UsedTokens(body, len(prompt))] if penalized else []),
                threshold=self.threshold if body.router_threshold is None else body.router_threshold,
                stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
                seed=None if body.seed is None else (body.seed + number) % 2**63,
                parser=parser_of(self.tokenizer, self.model.llm, body, prompt),
                arrived=arrived,
                deadline=arrived + self.options.timeout,
                cancelled=cancelled,
            )
            for prompt in prompts_of(self.tokenizer, body, self.model.vocab_size)
            for number in range(body.n or 1)
        ]

    async def _pieces(self, request: fastapi.Request, answers: list[Answer]) -> AsyncGenerator[tuple[int, Any], None]:
        """Give the pieces of several answers as they are generated, with their numbers, and `Finished` after each."""
        if self._requests > self.options.max_waiting:
            raise RequestError(
                f"{self._requests} requests are here already (--max-waiting). Try again later.", status=503
            )
        self._requests += 1
        self.metrics.requests_here.inc()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        watch = asyncio.create_task(notice_leaving(request, answers[0].cancelled, queue))
        try:
            for index, answer in enumerate(answers):
                self.thread.submit(self._write, answer, asyncio.get_running_loop(), queue)
                try:
                    piece = await asyncio.wait_for(queue.get(), max(answer.deadline - time.monotonic(), 0.001))
                except asyncio.TimeoutError:
                    late = f"Its turn did not come within {self.options.timeout:g} s (--timeout). Try again later."
                    raise RequestError(late, status=503) from None
                while True:
                    if isinstance(piece, RequestError):
                        raise piece
                    if piece is not BEGUN:
                        yield index, piece
                    if isinstance(piece, Finished):
                        break
                    piece = await queue.get()
        finally:
            answers[0].cancelled.set()
            watch.cancel()
            self._requests -= 1
            self.metrics.requests_here.dec()

    def _write(self, answer: Answer, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]) -> None:
        """Generate an answer on this thread; whatever happens, the one who awaits it is told."""
        if answer.cancelled.is_set():
            return

        def tell(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        tell(BEGUN)
        try:
            finished = write(self.model, self.tokenizer, answer, loop, queue)
        except Exception as error:
            logger.exception("An answer could not be written.")
            # The operator's log alone says more.
            is_memory = type(error).__name__ == "OutOfMemoryError"
            tell(RequestError(NO_MEMORY if is_memory else INTERNAL, status=500))
            return
        self.metrics.count(finished)
        tell(finished)


async def notice_leaving(request: fastapi.Request, cancelled: threading.Event, queue: asyncio.Queue[Any]) -> None:
    """Wait until the client of a request has gone, which ends its answers."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancelled.set()
    queue.put_nowait(RequestError("The client has left.", CLIENT_LEFT))


def event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def stream(
    first: tuple[int, Any] | None, others: AsyncGenerator[tuple[int, Any], None], reply: Reply, include_usage: bool
) -> AsyncIterator[str]:
    piece = first
    try:
        async with aclosing(others):
            while piece is not None:
                yield event(reply.add(*piece))
                piece = await anext(others, None)
    except RequestError as error:
        yield event(error_body(error))
        return
    if include_usage:
        yield event(reply.chunk([], usage=reply.usage()))
    yield "data: [DONE]\n\n"


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer.", "content": {"text/event-stream": {}}},
    400: {"description": "The request is malformed, or asks for what this model cannot do."},
    404: {"description": "Another model was asked for."},
    408: {"description": "The body came too slowly."},
    413: {"description": "The body is too large."},
    503: {"description": "Too many requests are waiting."},
}


def build_app(server: Server) -> FastAPI:
    app = FastAPI(title="citer serve", docs_url=None, redoc_url=None)
    answer_errors(app)
    app.add_middleware(Edge, metrics=server.metrics, most=server.options.max_request_bytes)
    card = {"id": server.names[0], "object": "model", "created": int(time.time()), "owned_by": "citer"}

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(request: fastapi.Request, body: ChatRequest) -> Response:
        return await server.answer(request, body)

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(request: fastapi.Request, body: CompletionRequest) -> Response:
        return await server.answer(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}", responses={404: ANSWERS[404]})
    async def model(model: str) -> dict[str, Any]:
        server.check_name(model)
        return card

    @app.get("/health", responses={503: {"description": "The thread that generates has died."}})
    async def health() -> JSONResponse:
        alive = server.thread._thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


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
    # A port that is taken is named before minutes of loading.
    with listen(chosen.host, chosen.port) as listener:
        print(f"Loading {name} ...", file=sys.stderr)
        model = load()
        tokenizer = model.load_tokenizer()
        if tokenizer is None or not tokenizer.is_fast:
            raise ValueError(f"{name} has no tokenizer.json, which streams need. Save a fast tokenizer there.")
        if chosen.cache_implementation is not None:
            model.generation_config.cache_implementation = chosen.cache_implementation
        server = Server(model, tokenizer, name, chosen)
        host, port = listener.getsockname()[:2]
        print(
            f"Serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 with threshold "
            f"{server.threshold:g}; also /health and /metrics. Ctrl-C stops it.\n"
            "Anyone who reaches this address can use it: it asks for no key.",
            file=sys.stderr,
            flush=True,
        )
        config = uvicorn.Config(
            build_app(server), log_level="warning", server_header=False, timeout_graceful_shutdown=SECONDS_TO_END
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
        finally:
            server.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; who connects before the pair is loaded waits."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}. Choose others; --port 0 takes a free one.") from error
