"""What a request may hold: OpenAI's fields, transformers' sampling settings, and `router_threshold`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["ChatRequest", "CompletionRequest", "Message", "Request"]

MOST_CHOICES = 16
MOST_PROMPTS = 128
Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]


def refuse(wanted: bool) -> bool:
    """Refuse what this server does not offer."""
    if wanted:
        raise ValueError("this server does not offer that")
    return wanted


NotOffered = Annotated[bool, AfterValidator(refuse)]


class Strict(BaseModel):
    """Something whose fields are what they say: "5" is no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Part(Strict):
    """A part of a message; a pair reads text only."""

    type: Literal["text"]
    text: str


class Function(Strict):
    """A function that an earlier answer called."""

    name: str
    arguments: str | dict[str, Any]


class CalledTool(Strict):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """One message of a chat. Fields that clients copy from an answer and that a prompt has no use for are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(Strict):
    """The fields that both endpoints have."""

    # An answer that leaves a field out of account is a wrong answer.
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
    router_threshold: float | None = Field(None, ge=0, le=2, strict=True)
    # Who asks does not change the answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class TextFormat(Strict):
    """The only form of an answer: free text."""

    type: Literal["text"]


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: NotOffered | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Request):
    """The body of `/v1/completions`: one text or several, or their token ids."""

    prompt: str | Texts | Tokens | TokenLists
    best_of: int | None = Field(None, ge=1, le=1)
    echo: NotOffered | None = None
    logprobs: None = None
    suffix: None = None
