"""What a client is told when there is no answer, in OpenAI's form; never a traceback."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

__all__ = ["RequestError", "answer_errors", "error_body"]

logger = logging.getLogger(__name__)
INTERNAL = "The server failed at this request; its log says why."


class RequestError(Exception):
    """A request that gets no answer."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error."""
    # What a client has sent may be quoted in it, and may be no text.
    message = message.encode(errors="backslashreplace").decode()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_errors(app: FastAPI) -> None:
    """Let an app answer every error in this form."""

    async def refused(request: Request, error: Any) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status, headers)

    async def malformed(request: Request, error: Any) -> JSONResponse:
        # Where a field may be of several types, what is wrong with the right one says most.
        found = sorted(error.errors(), key=lambda one: one["type"].endswith("_type"))
        text = "; ".join(f"{field_of(one)}: {wording(one)}" for one in found[:3])
        return JSONResponse(error_body(text, 400, field_of(found[0]).partition(".")[0]), 400)

    async def http(request: Request, error: Any) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)

    async def failed(request: Request, error: Any) -> JSONResponse:
        # uvicorn logs the error itself.
        return JSONResponse(error_body(INTERNAL, 500), 500)

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def field_of(error: dict[str, Any]) -> str:
    """Name the field that a validation error is about."""
    names = [str(name) for name in error["loc"] if name != "body"]
    return ".".join(names) or "body"


def wording(error: dict[str, Any]) -> str:
    """Say what is wrong with a field. What was sent is not repeated: it may be long, or no text at all."""
    if error["type"] in ("extra_forbidden", "none_required"):
        return "this server does not offer that, and will not pretend to. Leave it out."
    if error["type"] == "json_invalid":
        return "the body is no JSON."
    return f"{error['msg']}."
