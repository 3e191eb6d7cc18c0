"""From the fields of a request to the settings of `generate`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .errors import RequestError
from .limits import Limits
from .schema import ChatRequest, Request

__all__ = ["generation_settings", "processors", "stops_of"]

# The longest answer where neither the request nor the model says one; transformers' server takes the same.
USUAL_LENGTH = 1024
# Below this, sampling is greedy decoding, and logits divided by it may be infinite.
COLDEST = 1e-4


def generation_settings(model: Any, request: Request, prompt_tokens: int, limits: Limits) -> GenerationConfig:
    """Return the model's own settings with what the request changes."""
    settings = copy.deepcopy(model.generation_config)
    room = room_for_answer(model, request, prompt_tokens, limits, settings.max_new_tokens)
    # One answer is written at a time, which a stream can follow.
    settings.update(
        max_new_tokens=room, max_length=None, min_length=0, num_beams=1, num_return_sequences=1, stop_strings=None
    )
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


def room_for_answer(model: Any, request: Request, prompt_tokens: int, limits: Limits, usual: int | None) -> int:
    """Return how many tokens the answer may have."""
    context = model.config.max_position_embeddings
    asked = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked = request.max_completion_tokens
    if asked is not None and asked > limits.new_tokens:
        raise RequestError(
            f"max_tokens: {asked} tokens were asked for, and this server writes at most {limits.new_tokens} "
            "(--max-new-tokens).",
            param="max_tokens",
        )
    left = limits.new_tokens if context is None else context - prompt_tokens
    if left < (asked or 1):
        raise RequestError(
            f"The models read at most {context} tokens; the prompt has {prompt_tokens} and the answer may have "
            f"{asked or 1}. Shorten the prompt or lower max_tokens.",
            code="context_length_exceeded",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
        )
    return asked or min(usual or USUAL_LENGTH, left, limits.new_tokens)


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
