"""Fields of a request, and the errors that a client is told: both as OpenAI has them."""

from typing import Annotated, Any, Literal

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

INTERNAL = "The server failed at this request; its log says why."


class RequestError(fastapi.HTTPException):
    """A request that gets no answer."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(status, message, {"Retry-After": "5"} if status == 503 else None)
        self.param, self.code = param, code


def refusal(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param)


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
MOST_TOP = 20
Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
# -1 is no limit, as for other servers.
Length = Annotated[int, Field(ge=-1, lt=2**31)]
# Nothing of its kind: what clients send by habit.
Nothing = Annotated[list[Any], Field(max_length=0)]


class Strict(BaseModel):
    """Fields of exactly the given types: "5" is no number. A field that is null is a field left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_null(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


class Part(Strict):
    """A part of a message; a pair takes text only."""

    type: Literal["text"]
    text: str


class Function(Strict):
    """A call in an earlier turn. The arguments may be broken: a model wrote them."""

    name: str
    arguments: str | dict[str, Any] = ""


class CalledTool(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """A message of a chat. Fields that clients copy from an answer and that a prompt has no use for are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    # These would change the answer.
    audio: None = None
    function_call: None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    include_routing: bool | None = None


class Schema(Strict):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to it alone")
        return self


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class ToolFunction(Strict):
    """A function that may be called; what else it says is for the chat template."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: ToolFunction


class Request(Strict):
    """The fields that both endpoints have."""

    # An answer that ignores a field is a wrong answer.
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    max_tokens: Length | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_CHOICES)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    router_threshold: float | None = Field(None, ge=0, le=2)
    llm_veto: float | None = Field(None, ge=0, le=1)
    # The following do not change the answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Length | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | Literal[0] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    modalities: list[Literal["text"]] | None = None
    # These do not change the answer either.
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None


class CompletionRequest(Request):
    """The body of `/v1/completions`: one text or several, or their token ids."""

    prompt: str | Texts | Tokens | TokenLists
    best_of: int | None = Field(None, ge=1, le=1)
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
