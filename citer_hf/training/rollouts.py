"""Roll-outs: what comes of an action at a state when a policy writes the rest (CITER, section 3.3, case 3).

All states of a question lie along its reference answer. The policy reads prompt and reference once. Every roll-out
starts from a copy of its cache in which the tokens after the state are hidden; only the token of the action is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.data.tokens import Encoded
from citer_hf.evaluation.decode import cut, decode, greedy_view, special_tokens, steady_policy, text_lengths
from citer_hf.model.compat import CACHE
from citer_hf.model.kv_layers import all_grow, growing_cache
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE

# After so many tokens, finished sequences leave the batch.
STRETCH = 32


class RollOut(NamedTuple):
    """An action at a state: a token at a position of the reference; -1 leaves the action to the policy."""

    question: int
    position: int
    token: int


# A policy that has read prompts and references, one sequence per roll-out: model, cache, ids, mask, options.
Prefixes = tuple[Any, Any, torch.Tensor, torch.Tensor, dict[str, Any]]


def roll_out(
    model: CiterForCausalLM,
    questions: Sequence[Encoded],
    batch: Sequence[RollOut],
    router_threshold: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """Take actions and let the policy, the pair at a threshold, write to the end; return whole responses."""
    end_tokens, _ = special_tokens(model)
    # Responses up to the state, and the action.
    responses = [[*questions[one.question].response_ids[: one.position], one.token] for one in batch]
    responses = [response if one.token >= 0 else response[:-1] for one, response in zip(batch, responses, strict=True)]
    short = [index for index, response in enumerate(responses) if len(response) < max_new_tokens]
    going = [index for index in short if batch[index].token not in end_tokens]
    if not going:
        return responses
    new_tokens = max_new_tokens - min(len(responses[index]) for index in going)
    asked = [batch[index].question for index in going]
    states = [(one, questions[one].prompt_ids + responses[index]) for one, index in zip(asked, going, strict=True)]
    prefixes = shared_prefixes(model, questions, states, router_threshold)
    if prefixes is None:
        texts = [text for _, text in states]
        # One batch, whatever its size: it was cut before.
        limits: dict[str, Any] = {"max_new_tokens": new_tokens, "batch_tokens": 1 << 40}
        written = [one.tokens for one in decode(model, texts, router_threshold=router_threshold, **limits)]
    else:
        limit = model.config.max_position_embeddings
        if limit is not None:
            new_tokens = min(new_tokens, limit - int(prefixes[3].sum(dim=1).max()))
        written = write_on(prefixes, end_tokens, new_tokens)
    for index, tokens in zip(going, written, strict=True):
        responses[index] = (responses[index] + tokens)[:max_new_tokens]
    return responses


@torch.inference_mode()
def shared_prefixes(
    model: CiterForCausalLM, questions: Sequence[Encoded], states: Sequence[tuple[int, list[int]]], threshold: float
) -> Prefixes | None:
    """Run the policy over the question of every state once; `None` where its cache cannot hide tokens."""
    alone: Any = "slm" if threshold == SLM_ALONE else "llm" if threshold > 1 else None
    policy = greedy_view(model, alone)
    cache = CiterCache(model.config) if alone is None else growing_cache(policy.config)
    # 1. Prompts and references, padded on the left: ids [questions, width].
    asked = sorted({question for question, _ in states})
    texts = [questions[index].prompt_ids + questions[index].response_ids for index in asked]
    width = max(map(len, texts))
    device, padding = policy.device, special_tokens(model)[1]
    ids = torch.tensor([[padding] * (width - len(text)) + text for text in texts], device=device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=device)
    inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
    if alone is None:
        # Both models read: above 1, the LLM is always called.
        model(ids, cache=cache, logits_to_keep=1, router_threshold=LLM_ALONE, **inputs)
    else:
        (model.run_slm if alone == "slm" else model.run_llm)(ids, cache, 1, **inputs)
    if not all(map(all_grow, (cache.slm, cache.llm) if isinstance(cache, CiterCache) else (cache,))):
        return None
    # 2. One copy per roll-out, with what follows the state hidden, and the last token of the state to be read.
    sequences = torch.tensor([asked.index(question) for question, _ in states], device=device)
    cache.batch_select_indices(sequences)
    first = (mask == 0).sum(dim=1)[sequences, None]
    end = first + torch.tensor([[len(text) - 1] for _, text in states], device=device)
    places = torch.arange(width, device=device)
    last = torch.tensor([text[-1:] for _, text in states], device=device)
    visible = torch.cat([(places >= first) & (places < end), torch.ones_like(last, dtype=torch.bool)], dim=1)
    options = {"router_threshold": threshold, "waiting_rows": steady_policy} if alone is None else {}
    return policy, cache, torch.cat([ids[sequences], last], dim=1), visible.long(), options


def write_on(prefixes: Prefixes, end_tokens: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Let the policy write from every state to the end."""
    policy, cache, ids, mask, options = prefixes
    written: list[list[int]] = [[] for _ in ids]
    going = list(range(len(ids)))
    while going and max_new_tokens > 0:
        # States near the end of their answer are done soon, and need not be carried to the end of the others'.
        stretch = min(STRETCH, max_new_tokens)
        max_new_tokens -= stretch
        output = policy.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=stretch, **{CACHE: cache}, **options
        )
        new = output[:, ids.shape[1] :]
        for index, tokens in zip(going, cut(new, text_lengths(new, end_tokens)), strict=True):
            written[index] += tokens
        kept = [place for place, index in enumerate(going) if written[index][-1] not in end_tokens]
        if not kept or not max_new_tokens:
            break
        going = [going[place] for place in kept]
        chosen = torch.tensor(kept, device=ids.device)
        ids, mask = output[chosen], torch.cat([mask, torch.ones_like(new)], dim=1)[chosen]
        cache.batch_select_indices(chosen)
    return written
