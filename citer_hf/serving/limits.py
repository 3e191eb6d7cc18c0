"""How much a request may ask for: bytes, tokens, seconds, and others waiting before it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

__all__ = ["BodyLimit", "Limits"]

BODY_SECONDS = 30.0


@dataclass(frozen=True)
class Limits:
    """What the server takes on."""

    body_bytes: int = 4 * 2**20
    new_tokens: int = 4096
    seconds: float = 600.0
    waiting: int = 64

    def __post_init__(self) -> None:
        for name in ("body_bytes", "new_tokens", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        if self.waiting < 0:
            raise ValueError(f"waiting: expected a number from 0 up, got {self.waiting}.")


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
