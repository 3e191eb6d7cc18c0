"""How well a model solves the problems."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .problems import Problem, is_correct

__all__ = ["accuracy", "agreement", "solve"]


@torch.inference_mode()
def solve(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 100, **options: Any
) -> list[str]:
    """Write a response to every problem, greedily."""
    options = {"do_sample": False, "max_new_tokens": 160} | options
    responses: list[str] = []
    for start in range(0, len(problems), batch_size):
        prompts = [problem.prompt for problem in problems[start : start + batch_size]]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, **options)
        responses += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return responses


def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 100, **options: Any
) -> float:
    """Return the share of problems that a model answers correctly."""
    responses = solve(model, tokenizer, problems, batch_size, **options)
    return sum(map(is_correct, responses, problems)) / len(problems)


@torch.inference_mode()
def agreement(model: Any, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> float:
    """Return the share of tokens of the reference responses that are the model's best token there."""
    right = total = 0
    for problem in problems:
        prompt, response = tokenizer([problem.prompt, problem.response + tokenizer.eos_token]).input_ids
        tokens = torch.tensor([prompt + response], device=model.device)
        best = model(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += int((best == tokens[0, len(prompt) :]).sum())
        total += len(response)
    return right / total
