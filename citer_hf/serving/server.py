"""`citer serve`: an OpenAI-compatible server of a pair."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import fastapi
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from ..model.modeling import CiterForCausalLM
from ..runs import listen
from . import ServeOptions
from .answers import Answer, Piece, Reply, routing_of
from .metrics import Metrics
from .planning import Planner
from .schema import ChatRequest, CompletionRequest, Request, RequestError, StreamOptions, answer_errors, error_body
from .worker import BEGUN, STOPPING, Worker

BODY_SECONDS = 30.0
# The longest wait for the step under way when the server ends.
SECONDS_TO_END = 5
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
# nginx' status of a request whose client has gone.
CLIENT_LEFT = 499
# A proxy passes events on one by one.
STREAM_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}


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
        except asyncio.CancelledError:
            # Some servers tell so that the client has left.
            status = status if ended else CLIENT_LEFT
            raise
        finally:
            if scope.get("path") in ENDPOINTS:
                self.metrics.requests.labels(scope["path"], str(status)).inc()
                self.metrics.request_seconds.labels(scope["path"]).observe(time.monotonic() - began)


class Server:
    """Answers the requests of many clients with a pair, several at once."""

    def __init__(self, model: Any, tokenizer: Any, name: str, options: ServeOptions, metrics: Metrics | None = None):
        if tokenizer is None or not tokenizer.is_fast:
            raise ValueError(f"{name} has no tokenizer.json, which streams need. Save a fast tokenizer there.")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.names: tuple[str, ...] = (name, Path(name).name)
        # What clients may ask for: other models may be beside this one.
        self.offered = [name]
        self.planner = Planner(model, tokenizer, options)
        self.metrics = metrics or Metrics()
        capacity = self.planner.context if self.planner.is_static else None
        self.worker = Worker(model, options.max_batch_size, capacity, self.metrics.count)
        self.stopping = False
        self._requests = 0

    @property
    def status(self) -> str:
        return "stopping" if self.stopping else "ok" if self.worker.thread.is_alive() else "dead"

    def drain(self) -> None:
        """Refuse new requests from now on, and end those in flight within the grace time."""
        self.stopping = True
        self.worker.drain(self.options.grace)

    def close(self) -> None:
        """End all answers, and wait until the one under way has ended, which it soon does."""
        self.worker.close(SECONDS_TO_END)

    def check_name(self, model: str | None) -> None:
        """Raise an error for a request for another model."""
        if model is not None and model not in self.names:
            raise RequestError(
                f"model: this server has {', '.join(map(repr, self.offered))} only.", 404, "model", "model_not_found"
            )

    async def answer(self, request: fastapi.Request, body: Request) -> Response:
        """Answer a request, whole or as a stream."""
        self.check_name(body.model)
        if self.status != "ok":
            raise RequestError(STOPPING, 503)
        if self._requests >= self.options.max_batch_size + self.options.max_waiting:
            raise RequestError(f"{self._requests} requests are here already (--max-waiting). Try again later.", 503)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(item: Any) -> None:
            # Where the server has ended meanwhile, nobody listens.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, item)

        self._count(1)
        try:
            # Templates and tokenizers take their time over long texts, and other requests wait for the event loop.
            answers = await run_in_threadpool(self.planner.answers, body, time.monotonic(), tell)
        except BaseException:
            self._count(-1)
            raise
        is_chat = isinstance(body, ChatRequest)
        reply = Reply(self.names[0], is_chat, len(answers), body.n or 1, answers[0].top is not None)
        pieces = self._pieces(request, answers, queue)
        if body.stream:
            # A refusal has a status, which a stream that has begun cannot give any more.
            first = await anext(pieces, None)
            events = stream(first, pieces, reply, body.stream_options or StreamOptions())
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        async for piece in pieces:
            reply.add(piece)
        return JSONResponse(reply.whole())

    def _count(self, change: int) -> None:
        self._requests += change
        self.metrics.requests_here.inc(change)

    async def _pieces(
        self, request: fastapi.Request, answers: list[Answer], queue: asyncio.Queue[Any]
    ) -> AsyncGenerator[Piece, None]:
        """Give the pieces of the answers to a request as they are generated."""
        watch = asyncio.create_task(notice_leaving(request, answers[0].cancelled, queue))
        begun, unfinished = False, len(answers)
        try:
            for answer in answers:
                self.worker.submit(answer)
            while unfinished:
                seconds = None if begun else max(answers[0].deadline - time.monotonic(), 0.001)
                try:
                    piece = await asyncio.wait_for(queue.get(), seconds)
                except asyncio.TimeoutError:
                    late = f"Its turn did not come within {self.options.timeout:g} s (--timeout). Try again later."
                    raise RequestError(late, 503) from None
                if isinstance(piece, RequestError):
                    raise piece
                begun = True
                if piece is not BEGUN:
                    unfinished -= piece.finished is not None
                    yield piece
        finally:
            answers[0].cancelled.set()
            watch.cancel()
            self._count(-1)


async def notice_leaving(request: fastapi.Request, cancelled: threading.Event, queue: asyncio.Queue[Any]) -> None:
    """Wait until the client of a request has gone, which ends its answers."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancelled.set()
    queue.put_nowait(RequestError("The client has left.", CLIENT_LEFT))


def event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def stream(
    first: Piece | None, others: AsyncGenerator[Piece, None], reply: Reply, options: StreamOptions
) -> AsyncIterator[str]:
    piece = first
    try:
        async with aclosing(others):
            while piece is not None:
                for choice in reply.add(piece):
                    if options.include_routing and choice["finish_reason"] is None:
                        choice["routing"] = routing_of(piece.tokens)
                    yield event(reply.chunk([choice]))
                piece = await anext(others, None)
    except RequestError as error:
        yield event(error_body(error))
        return
    if options.include_usage:
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
    card = {"object": "model", "created": int(time.time()), "owned_by": "citer"}
    card["max_model_len"] = server.planner.context

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(request: fastapi.Request, body: ChatRequest) -> Response:
        return await server.answer(request, body)

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(request: fastapi.Request, body: CompletionRequest) -> Response:
        return await server.answer(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **card} for name in server.offered]}

    @app.get("/v1/models/{model:path}", responses={404: ANSWERS[404]})
    async def model(model: str) -> dict[str, Any]:
        server.check_name(model)
        return {"id": next(name for name in server.offered if model in (name, Path(name).name)), **card}

    @app.get("/health", responses={503: {"description": "The server is being stopped, or cannot generate."}})
    async def health() -> JSONResponse:
        return JSONResponse({"status": server.status}, 200 if server.status == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class Runner(uvicorn.Server):
    """uvicorn, which tells the server of a pair when it is told to stop."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.server.drain()
        super().handle_exit(sig, frame)


def runner_of(server: Server, app: Any) -> Runner:
    """Return what serves an app on sockets, with the headers that let pages of other origins ask."""
    origins = list(server.options.cors)
    if origins:
        # Around everything, errors included.
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    grace = int(server.options.grace) + SECONDS_TO_END
    return Runner(
        uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=grace), server
    )


def serve(
    load: Callable[[], CiterForCausalLM], name: str, mount: Callable[[Any, Any], Any] | None = None, **options: Any
) -> None:
    """Serve a pair to OpenAI clients until interrupted.

    Args:
        load: Loads the pair, once the port is taken.
        name: What requests call the model; the last part of a path is accepted too.
        mount: Adds pages to the app, which it is given with the pair.
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
        server = Server(model, model.load_tokenizer(), name, chosen)
        host, port = listener.getsockname()[:2]
        print(
            f"Serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 with threshold "
            f"{server.planner.threshold:g} and {chosen.max_batch_size} slots; also /health and /metrics.\n"
            "Ctrl-C stops it. Anyone who reaches this address can use it: it asks for no key.",
            file=sys.stderr,
            flush=True,
        )
        app = build_app(server)
        try:
            runner_of(server, app if mount is None else mount(app, model)).run(sockets=[listener])
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
        finally:
            server.close()
