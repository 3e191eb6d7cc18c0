"""Fields of a request, and the errors that a client is told: both as OpenAI has them."""

from typing import Annotated, Any, Literal

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

INTERNAL = "The server failed at this request; its log says why."


class RequestError(fastapi.HTTPException):
    """A request that gets no answer."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(status, message, {"Retry-After": "5"} if status == 503 else None)
        self.param, self.code = param, code


def error_body(error: HTTPException) -> dict[str, Any]:
    """Return what a client is told."""
    # The message may quote what a client has sent, which may be no unicode text.
    message = error.detail.encode(errors="backslashreplace").decode()
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    about = {name: getattr(error, name, None) for name in ("param", "code")}
    return {"error": {"message": message, "type": kind, **about}}


def answer_errors(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's form."""

    async def refused(request: fastapi.Request, error: Any) -> JSONResponse:
        return JSONResponse(error_body(error), error.status_code, error.headers)

    async def malformed(request: fastapi.Request, error: Any) -> JSONResponse:
        # Where a field may be of several types, the error about the right type says most.
        found = sorted(error.errors(), key=lambda one: one["type"].endswith("_type"))
        text = "; ".join(f"{field_of(one)}: {wording(one)}" for one in found[:3])
        return await refused(request, RequestError(text, param=field_of(found[0]).partition(".")[0]))

    async def failed(request: fastapi.Request, error: Any) -> JSONResponse:
        # uvicorn logs the error itself.
        return await refused(request, RequestError(INTERNAL, 500))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(Exception, failed)


def field_of(error: dict[str, Any]) -> str:
    return ".".join(str(name) for name in error["loc"] if name != "body") or "body"


def wording(error: dict[str, Any]) -> str:
    """Return what is wrong with a field. The value is not repeated: it may be long, or no text at all."""
    if error["type"] in ("extra_forbidden", "none_required") or error.get("ctx", {}).get("expected") == "False":
        return "this server does not offer that, and will not pretend to. Leave it out."
    return f"{error['msg']}."


MOST_CHOICES = 16
MOST_PROMPTS = 128
Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]


class Strict(BaseModel):
    """Fields of exactly the given types: "5" is no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Part(Strict):
    """A part of a message; a pair takes text only."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat. Fields that clients copy from an answer and that a prompt has no use for are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(Strict):
    """The fields that both endpoints have."""

    # An answer that ignores a field is a wrong answer.
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_CHOICES)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    router_threshold: float | None = Field(None, ge=0, le=2)
    # The following do not change the answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Request):
    """The body of `/v1/completions`: one text or several, or their token ids."""

    prompt: str | Texts | Tokens | TokenLists
    best_of: int | None = Field(None, ge=1, le=1)
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
