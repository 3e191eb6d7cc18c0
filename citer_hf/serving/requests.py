"""From a request to what generates its answers: prompt tokens, settings, processors."""

import copy
import inspect
from typing import Any

import torch
from jinja2 import Environment, meta
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from ..data.examples import as_call
from .schema import ChatRequest, CompletionRequest, Message, Request, RequestError, refusal

# A request may not set these by way of `chat_template_kwargs`: they are the function's, not the template's.
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
# The longest answer where neither the request nor the model says one; transformers' server takes the same.
USUAL_LENGTH = 1024
# Below this, sampling is greedy decoding, and logits divided by it may be infinite.
COLDEST = 1e-4


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
    if tools and not knows_tools(tokenizer):
        raise refusal("tools", "the chat template of this model has no place for tools. Leave them out.")
    continues = bool(request.continue_final_message)
    if continues:
        last = request.messages[-1]
        if last.role != "assistant" or last.tool_calls or not text_of(last):
            raise refusal("continue_final_message", "expected a last message of the assistant, with a text.")
        if request.add_generation_prompt:
            raise refusal("add_generation_prompt", "continue_final_message begins no new message. Leave either out.")
    try:
        rendered = tokenizer.apply_chat_template(
            [for_template(message) for message in request.messages],
            tools=None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools],
            add_generation_prompt=not continues and request.add_generation_prompt is not False,
            continue_final_message=continues,
            return_dict=True,
            **options,
        )
    except Exception as error:
        # A template is a program, and its input is whatever the client has sent.
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise refusal("messages", f"the model's chat template refuses them: {reason}") from error
    return list(rendered["input_ids"])


def knows_tools(tokenizer: Any) -> bool:
    """Return True if the chat template of a tokenizer looks at the tools that it is given."""
    template = tokenizer.get_chat_template(tools=[{}])
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return "tools" in meta.find_undeclared_variables(environment.parse(template))
    except Exception:
        # transformers' own tags, such as `generation`.
        return "tools" in template


def text_of(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def for_template(message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it."""
    found = message.model_dump(include={"name", "reasoning_content", "reasoning", "tool_call_id"}, exclude_none=True)
    if message.reasoning is not None:
        # The name that templates know; older transformers does not translate it.
        found.setdefault("reasoning_content", message.reasoning)
    # OpenAI's newer name, which templates do not know.
    role = "system" if message.role == "developer" else message.role
    if message.tool_calls:
        calls = [one.model_dump(exclude={"id"} if one.id is None else None) for one in message.tool_calls]
        found["tool_calls"] = list(map(as_call, calls))
    return {"role": role, "content": text_of(message), **found}


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


def generation_settings(model: Any, request: Request, length: int) -> GenerationConfig:
    """Return the model's own settings with what the request changes."""
    settings = copy.deepcopy(model.generation_config)
    # An answer is one sequence, which a stream can follow.
    settings.update(max_new_tokens=max(length, 1), max_length=None, min_length=0, num_beams=1, num_return_sequences=1)
    settings.update(use_cache=True, cache_implementation=None, prompt_lookup_num_tokens=None, stop_strings=None)
    settings.update(output_scores=False, output_hidden_states=False, output_attentions=False)
    settings.update(return_dict_in_generate=True, output_logits=bool(request.logprobs))  # type: ignore[attr-defined]
    sampling = request.model_dump(include={"temperature", "top_p", "top_k", "min_p"}, exclude_none=True)
    if sampling.get("top_k", 1) <= 0:
        # Off, which does not ask for sampling.
        settings.update(top_k=sampling.pop("top_k") * 0)
    if sampling.get("temperature", 1.0) < COLDEST or sampling.get("top_p") == 0:
        settings.update(do_sample=False, temperature=1.0, top_p=1.0, min_p=None)
    elif sampling:
        settings.update(do_sample=True, **sampling)
        if getattr(model.llm, "is_remote", False) and request.top_k is None:
            # Its server tells of so many tokens.
            settings.update(top_k=min(settings.top_k or model.llm.logprobs, model.llm.logprobs))
    if request.repetition_penalty is not None:
        settings.update(repetition_penalty=request.repetition_penalty)
    for token in request.logit_bias or {}:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < model.vocab_size):
            raise refusal("logit_bias", f"expected token ids from 0 to {model.vocab_size - 1} as keys.")
    if request.logit_bias:
        settings.update(sequence_bias={(int(token),): value for token, value in request.logit_bias.items()})
    return settings


def answer_length(request: Any, prompt_tokens: int, usual: int | None, most: int, context: int | None) -> int:
    """Return how many tokens the answer may have: what is asked for, as far as the server and the models allow it."""
    is_chat, asked = isinstance(request, ChatRequest), request.max_tokens
    if is_chat and request.max_completion_tokens is not None:
        asked = request.max_completion_tokens
    echoes = not is_chat and bool(request.echo)
    if asked == 0 and not echoes:
        raise refusal("max_tokens", "expected at least 1, or with echo 0.")
    left = most if context is None else min(most, context - prompt_tokens)
    if left < 1 and not (left == 0 and echoes):
        raise RequestError(
            f"The models read at most {context} tokens, and the prompt has {prompt_tokens}. Shorten the prompt.",
            param="messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    return min((usual or USUAL_LENGTH) if asked is None or asked < 0 else asked, left)


class UsedTokens(LogitsProcessor):
    """OpenAI's penalties, which transformers does not have: on the logits, for tokens of the answer alone."""

    def __init__(self, request: Request, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.field = "frequency_penalty" if request.frequency_penalty else "presence_penalty"
        self.frequency, self.presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        used = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, used, torch.ones_like(used, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
