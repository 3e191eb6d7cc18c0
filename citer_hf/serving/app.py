"""The endpoints: chat completions, completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import fastapi
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from .answers import Answer, Finished
from .engine import Engine
from .errors import RequestError, answer_errors, error_body
from .limits import BodyLimit
from .measured import Measured
from .prompts import chat_prompt, parser_of, text_prompts
from .replies import ChatReply, CompletionReply, Reply, event, usage
from .schema import ChatRequest, CompletionRequest, Request
from .settings import generation_settings, processors, stops_of

__all__ = ["build_app"]

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
    app.add_middleware(BodyLimit, most=engine.limits.body_bytes)
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
                settings=generation_settings(self.engine.model, body, len(prompt), self.engine.limits),
                processors=processors(body, len(prompt)),
                threshold=self.router_threshold if body.router_threshold is None else body.router_threshold,
                stops=stops_of(body),
                seed=None if body.seed is None else (body.seed + number) % 2**63,
                arrived=arrived,
                deadline=arrived + self.engine.limits.seconds,
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
