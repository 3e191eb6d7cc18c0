"""From a request to what generates its answers: prompt tokens, settings, processors, parser."""

import copy
import inspect
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from transformers.cli.serving.utils import BaseHandler, Modality, build_response_parser, get_response_template

from . import ServeOptions
from .schema import ChatRequest, CompletionRequest, Request, RequestError

# The oldest transformers that is supported does not ask for them.
PARSER_KNOWS_TOOLS = "tools" in inspect.signature(build_response_parser).parameters
# A request may not set these by way of `chat_template_kwargs`: they are the function's, not the template's.
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
# The longest answer where neither the request nor the model says one; transformers' server takes the same.
USUAL_LENGTH = 1024
# Below this, sampling is greedy decoding, and logits divided by it may be infinite.
COLDEST = 1e-4


def refusal(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param)


def prompts_of(tokenizer: Any, request: Any, vocabulary: int) -> list[list[int]]:
    """Return the tokens of every prompt of a request."""
    is_chat = isinstance(request, ChatRequest)
    prompts = [chat_prompt(tokenizer, request)] if is_chat else text_prompts(tokenizer, request, vocabulary)
    if not all(prompts):
        raise refusal("messages" if is_chat else "prompt", "the prompt has no tokens; the models need at least one.")
    return prompts


def chat_prompt(tokenizer: Any, request: ChatRequest) -> list[int]:
    """Return the tokens of a chat, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise refusal("messages", "this model has no chat template. Use /v1/completions with a text as prompt.")
    options = request.chat_template_kwargs or {}
    if reserved := sorted(RESERVED & options.keys()):
        raise refusal("chat_template_kwargs", f"{', '.join(reserved)} cannot be set by a request. Leave it out.")
    tools = None if request.tool_choice == "none" else request.tools or None
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    for message in messages:
        # OpenAI's newer name, which templates do not know.
        message["role"] = message["role"].replace("developer", "system")
    try:
        rendered = tokenizer.apply_chat_template(
            BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM),
            tools=tools,
            add_generation_prompt=True,
            return_dict=True,
            **options,
        )
    except Exception as error:
        # A template is a program, and its input is whatever the client has sent.
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise refusal("messages", f"the model's chat template refuses them: {reason}") from error
    return list(rendered["input_ids"])


def text_prompts(tokenizer: Any, request: CompletionRequest, vocabulary: int) -> list[list[int]]:
    """Return the tokens of texts or token ids; the begin token stands for an empty text."""
    given: Any = request.prompt
    prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    try:
        for one in prompts:
            str(one).encode()
    except UnicodeEncodeError as error:
        raise refusal("prompt", f"no unicode text: {error.reason}.") from None
    ids = [list(tokenizer(one).input_ids) if isinstance(one, str) else one for one in prompts]
    if any(token >= vocabulary for one in ids for token in one):
        raise refusal("prompt", f"expected token ids below {vocabulary}.")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [one or begin for one in ids]


def parser_of(tokenizer: Any, llm: Any, request: Request, prompt: list[int]) -> Any:
    """Return what finds tool calls and reasoning in an answer, or `None` where its text is all there is."""
    if not isinstance(request, ChatRequest):
        return None
    markup, text = get_response_template(tokenizer, llm), tokenizer.decode(prompt)
    anchors = (markup or {}).get("start_anchor", "")
    # A prompt that does not lead up to the answer as the markup expects would be taken for a part of the answer.
    if markup is None or not any(one in text for one in ([anchors] if isinstance(anchors, str) else anchors)):
        return None
    return build_response_parser(tokenizer, llm, prompt, **({"tools": request.tools} if PARSER_KNOWS_TOOLS else {}))


def generation_settings(model: Any, request: Request, prompt_tokens: int, options: ServeOptions) -> GenerationConfig:
    """Return the model's own settings with what the request changes."""
    settings = copy.deepcopy(model.generation_config)
    length = answer_length(model, request, prompt_tokens, options, settings.max_new_tokens)
    # One answer is generated at a time, which a stream can follow.
    settings.update(max_new_tokens=length, max_length=None, min_length=0, num_beams=1, num_return_sequences=1)
    settings.update(use_cache=True, return_dict_in_generate=True, output_scores=False, output_logits=False)
    settings.update(output_hidden_states=False, output_attentions=False)
    sampling = request.model_dump(include={"temperature", "top_p", "top_k", "min_p"}, exclude_none=True)
    if request.temperature is not None and request.temperature < COLDEST:
        settings.update(do_sample=False, temperature=1.0, top_p=1.0, min_p=None)
    elif sampling:
        settings.update(do_sample=True, **sampling)
    if request.repetition_penalty is not None:
        settings.update(repetition_penalty=request.repetition_penalty)
    for token in request.logit_bias or {}:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < model.vocab_size):
            raise refusal("logit_bias", f"expected token ids from 0 to {model.vocab_size - 1} as keys.")
    if request.logit_bias:
        settings.update(sequence_bias={(int(token),): value for token, value in request.logit_bias.items()})
    return settings


def answer_length(model: Any, request: Request, prompt_tokens: int, options: ServeOptions, usual: int | None) -> int:
    """Return how many tokens the answer may have."""
    context, most = model.config.max_position_embeddings, options.max_new_tokens
    asked, param = request.max_tokens, "prompt"
    if isinstance(request, ChatRequest):
        asked, param = request.max_completion_tokens or asked, "messages"
    if asked is not None and asked > most:
        raise refusal("max_tokens", f"got {asked}, and this server writes at most {most} (--max-new-tokens).")
    left = most if context is None else context - prompt_tokens
    if left < (asked or 1):
        said = f"The models read at most {context} tokens; the prompt has {prompt_tokens} and the answer may have "
        raise RequestError(
            f"{said}{asked or 1}. Shorten the prompt or lower max_tokens.", 400, param, "context_length_exceeded"
        )
    return asked or min(usual or USUAL_LENGTH, left, most)


class UsedTokens(LogitsProcessor):
    """OpenAI's penalties, which transformers does not have: on the logits, for tokens of the answer alone."""

    def __init__(self, request: Request, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.frequency, self.presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        used = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, used, torch.ones_like(used, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
