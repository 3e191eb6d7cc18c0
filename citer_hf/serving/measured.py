"""Counts requests and how long they take, whatever becomes of them."""

from __future__ import annotations

import time
from typing import Any

from .metrics import Metrics

__all__ = ["Measured"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
# What nginx calls a request whose client has gone.
CLIENT_LEFT = 499


class Measured:
    """ASGI middleware that counts requests for answers."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in ENDPOINTS:
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        status, ended = 500, False

        async def noted(message: Any) -> None:
            nonlocal status, ended
            if not ended:
                status = message.get("status", status)
                ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        async def watched() -> Any:
            nonlocal status, ended
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                status, ended = CLIENT_LEFT, True
            return message

        try:
            await self.app(scope, watched, noted)
        finally:
            self.metrics.requests.labels(scope["path"], str(status)).inc()
            self.metrics.request_seconds.labels(scope["path"]).observe(time.monotonic() - began)
