"""From messages or texts to the token ids that the models read."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.utils import BaseHandler, Modality, build_response_parser, get_response_template

from .errors import RequestError
from .schema import ChatRequest, CompletionRequest, Request

__all__ = ["chat_prompt", "parser_of", "text_prompts"]

# The oldest transformers that is supported does not ask for them.
PARSER_KNOWS_TOOLS = "tools" in inspect.signature(build_response_parser).parameters
# What a request may not decide by way of `chat_template_kwargs`: these are the function's, not the template's.
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def chat_prompt(tokenizer: Any, request: ChatRequest) -> list[int]:
    """Return the tokens of a chat, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise RequestError(
            "messages: this model has no chat template. Use /v1/completions with the whole text as prompt.",
            param="messages",
        )
    options = request.chat_template_kwargs or {}
    if reserved := sorted(RESERVED & options.keys()):
        raise RequestError(
            f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a request; it is for variables of the "
            "model's chat template, such as enable_thinking.",
            param="chat_template_kwargs",
        )
    tools = request.tools if request.tool_choice != "none" else None
    try:
        rendered = tokenizer.apply_chat_template(
            messages_of(request), tools=tools or None, add_generation_prompt=True, return_dict=True, **options
        )
    except Exception as error:
        # A template is a program, and its input is whatever the client has sent.
        raise RequestError(
            f"messages: the model's chat template refuses them: {type(error).__name__}: {str(error)[:200]}",
            param="messages",
        ) from error
    return checked(list(rendered["input_ids"]), "messages")


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages as chat templates read them."""
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    for message in messages:
        # OpenAI's newer name, which templates do not know.
        message["role"] = message["role"].replace("developer", "system")
    parsed: list[dict[str, Any]] = BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
    return parsed


def parser_of(tokenizer: Any, llm: Any, request: Request, prompt: list[int]) -> Any:
    """Return what finds tool calls and reasoning in an answer, or `None` where its text is all there is."""
    markup = get_response_template(tokenizer, llm) if isinstance(request, ChatRequest) else None
    # A prompt that does not lead up to the answer as the markup expects would be taken for a part of it.
    if markup is None or markup.get("start_anchor", "") not in tokenizer.decode(prompt):
        return None
    tools = {"tools": request.tools} if PARSER_KNOWS_TOOLS and isinstance(request, ChatRequest) else {}
    return build_response_parser(tokenizer, llm, prompt, **tools)


def text_prompts(tokenizer: Any, request: CompletionRequest, vocabulary: int) -> list[list[int]]:
    """Return the tokens of every prompt."""
    prompts: list[Any] = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    if isinstance(prompts[0], int):
        prompts = [prompts]
    ids = [tokens_of(tokenizer, one) if isinstance(one, str) else list(one) for one in prompts]
    if any(token >= vocabulary for one in ids for token in one):
        raise RequestError(f"prompt: expected token ids below {vocabulary}.", param="prompt")
    return [checked(one or begin_of(tokenizer), "prompt") for one in ids]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt: no unicode text: {error.reason}.", param="prompt") from None
    return list(tokenizer(text).input_ids)


def begin_of(tokenizer: Any) -> list[int]:
    """Return what stands for an empty text."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def checked(ids: list[int], param: str) -> list[int]:
    """Return tokens that models can read."""
    if not ids:
        raise RequestError(f"{param}: the prompt has no tokens; the models need at least one.", param=param)
    return ids
