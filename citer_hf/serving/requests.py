"""From a request to what generates its answers: prompt tokens, settings, processors, parser."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cli.serving.utils import BaseHandler, Modality, build_response_parser, get_response_template

from . import ServeOptions
from .schema import ChatRequest, CompletionRequest, Request, RequestError

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


# The longest answer where neither the request nor the model says one; transformers' server takes the same.
USUAL_LENGTH = 1024
# Below this, sampling is greedy decoding, and logits divided by it may be infinite.
COLDEST = 1e-4


def generation_settings(model: Any, request: Request, prompt_tokens: int, options: ServeOptions) -> GenerationConfig:
    """Return the model's own settings with what the request changes."""
    settings = copy.deepcopy(model.generation_config)
    room = room_for_answer(model, request, prompt_tokens, options, settings.max_new_tokens)
    # One answer is written at a time, which a stream can follow.
    settings.update(max_new_tokens=room, max_length=None, min_length=0, num_beams=1, num_return_sequences=1)
    settings.update(use_cache=True, return_dict_in_generate=True, output_scores=False, output_logits=False)
    settings.update(output_hidden_states=False, output_attentions=False)
    named = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    given = {name: value for name, value in named.items() if value is not None}
    if request.temperature is not None and request.temperature < COLDEST:
        settings.update(do_sample=False, temperature=1.0, top_p=1.0, min_p=None)
        given = {name: value for name, value in given.items() if name == "repetition_penalty"}
    elif given.keys() - {"repetition_penalty"}:
        settings.update(do_sample=True)
    settings.update(**given)
    if request.logit_bias:
        settings.update(sequence_bias=biases(request.logit_bias, model.vocab_size))
    return settings


def room_for_answer(model: Any, request: Request, prompt_tokens: int, options: ServeOptions, usual: int | None) -> int:
    """Return how many tokens the answer may have."""
    context = model.config.max_position_embeddings
    asked = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked = request.max_completion_tokens
    if asked is not None and asked > options.max_new_tokens:
        raise RequestError(
            f"max_tokens: {asked} tokens were asked for, and this server writes at most {options.max_new_tokens} "
            "(--max-new-tokens).",
            param="max_tokens",
        )
    left = options.max_new_tokens if context is None else context - prompt_tokens
    if left < (asked or 1):
        raise RequestError(
            f"The models read at most {context} tokens; the prompt has {prompt_tokens} and the answer may have "
            f"{asked or 1}. Shorten the prompt or lower max_tokens.",
            code="context_length_exceeded",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
        )
    return asked or min(usual or USUAL_LENGTH, left, options.max_new_tokens)


def biases(logit_bias: dict[str, float], vocabulary: int) -> dict[tuple[int, ...], float]:
    """Return OpenAI's `logit_bias` as transformers takes it."""
    for token in logit_bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary):
            raise RequestError(
                f"logit_bias: expected token ids from 0 to {vocabulary - 1} as keys.", param="logit_bias"
            )
    return {(int(token),): value for token, value in logit_bias.items()}


def stops_of(request: Request) -> tuple[str, ...]:
    """Return the stop strings of a request."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def processors(request: Request, prompt_tokens: int) -> LogitsProcessorList:
    """Return what changes the logits besides transformers' own processors."""
    frequency, presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0
    wanted = [UsedTokens(prompt_tokens, frequency, presence)] if frequency or presence else []
    return LogitsProcessorList(wanted)


class UsedTokens(LogitsProcessor):
    """OpenAI's penalties, which transformers does not have: on the logits, for tokens of the answer alone."""

    def __init__(self, prompt_tokens: int, frequency: float, presence: float):
        self.prompt_tokens, self.frequency, self.presence = prompt_tokens, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        used = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, used, torch.ones_like(used, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
