"""Roll-outs: what comes of an action at a state, when a policy writes the rest (CITER, section 3.3, case 3).

All states of a question lie along its reference answer. Both models read prompt and reference once, and every roll-out
starts from a copy of their caches in which what follows its state is hidden. Only the action's token is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from citer_hf import CiterCache
from citer_hf.data.tokens import Encoded
from citer_hf.evaluation.decoding import (
    BATCH_TOKENS,
    cut,
    decode,
    greedy_view,
    special_tokens,
    steady_policy,
    text_lengths,
)
from citer_hf.model.compat import CACHE
from citer_hf.model.kv_layers import all_grow, growing_cache

__all__ = ["RollOut", "cut_into_batches", "roll_out"]

# After so many tokens, rows that have ended leave the batch.
STRETCH = 32


@dataclass(frozen=True)
class RollOut:
    """One action at one state."""

    question: int
    position: int
    token: int


def cut_into_batches(
    wanted: Sequence[RollOut], questions: Sequence[Encoded], max_new_tokens: int, batch_tokens: int = BATCH_TOKENS
) -> list[list[RollOut]]:
    """Divide roll-outs into batches of questions of like lengths; the same roll-outs always give the same batches."""

    def room(one: RollOut) -> int:
        question = questions[one.question]
        length = len(question.response_ids)
        return len(question.prompt_ids) + length + min(length, max_new_tokens)

    batches: list[list[RollOut]] = []
    for one in sorted(wanted, key=lambda one: (room(one), one.question, one.position, one.token)):
        if not batches or (len(batches[-1]) + 1) * room(one) > batch_tokens:
            batches.append([])
        batches[-1].append(one)
    return batches


def roll_out(
    model: Any,
    questions: Sequence[Encoded],
    batch: Sequence[RollOut],
    router_threshold: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """Carry out actions and let the policy, which is the pair at a threshold, write to the end."""
    end_tokens, _ = special_tokens(model)
    texts = [started(one, questions) for one in batch]
    going = [
        index
        for index, (one, text) in enumerate(zip(batch, texts, strict=True))
        if one.token not in end_tokens and len(text) < max_new_tokens
    ]
    if not going:
        return texts
    rows = [batch[index] for index in going]
    room = max_new_tokens - min(len(texts[index]) for index in going)
    prefixes = shared_prefixes(model, questions, rows, router_threshold)
    if prefixes is None:
        prompts = [questions[one.question].prompt_ids + texts[index] for one, index in zip(rows, going, strict=True)]
        # One batch, whatever its size: it was cut before.
        written = decode(
            model, prompts, router_threshold=router_threshold, max_new_tokens=room, batch_tokens=1 << 40
        ).tokens
    else:
        limit = model.config.max_position_embeddings
        longest = int(prefixes.mask.sum(dim=1).max())
        written = prefixes.write(end_tokens, room if limit is None else min(room, limit - longest))
    for index, tokens in zip(going, written, strict=True):
        texts[index] = (texts[index] + tokens)[:max_new_tokens]
    return texts


def started(one: RollOut, questions: Sequence[Encoded]) -> list[int]:
    """Return the response up to the state, and the action."""
    action = [] if one.token < 0 else [one.token]
    return questions[one.question].response_ids[: one.position] + action


class Prefixes:
    """What the policy has read of prompts and references, one row per roll-out."""

    def __init__(
        self,
        policy: Any,
        options: dict[str, Any],
        cache: Any,
        ids: torch.Tensor,
        visible: torch.Tensor,
        last: torch.Tensor,
    ) -> None:
        self.policy, self.options, self.cache = policy, options, cache
        self.ids = torch.cat([ids, last], dim=1)
        self.mask = torch.cat([visible, torch.ones_like(last, dtype=torch.bool)], dim=1).long()

    def write(self, end_tokens: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Let the policy write from every state to the end."""
        ids, mask = self.ids, self.mask
        written: list[list[int]] = [[] for _ in ids]
        going = list(range(len(ids)))
        while going and max_new_tokens > 0:
            # States near the end of their answer are done soon, and need not be carried to the end of the others'.
            stretch = min(STRETCH, max_new_tokens)
            max_new_tokens -= stretch
            output = self.policy.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=stretch,
                **{CACHE: self.cache},
                **self.options,
            )
            new = output[:, ids.shape[1] :]
            for row, tokens in zip(going, cut(new, text_lengths(new, end_tokens)), strict=True):
                written[row] += tokens
            kept = [place for place, row in enumerate(going) if written[row][-1] not in end_tokens]
            if not kept or not max_new_tokens:
                break
            going = [going[place] for place in kept]
            rows = torch.tensor(kept, device=ids.device)
            ids, mask = output[rows], torch.cat([mask, torch.ones_like(new)], dim=1)[rows]
            self.cache.batch_select_indices(rows)
        return written


@torch.inference_mode()
def shared_prefixes(
    model: Any, questions: Sequence[Encoded], batch: Sequence[RollOut], router_threshold: float
) -> Prefixes | None:
    """Let the policy read every question of a batch once."""
    alone: Any = "slm" if router_threshold == 0 else "llm" if router_threshold > 1 else None
    policy = greedy_view(model, alone)
    cache = CiterCache(model.config) if alone is None else growing_cache(policy.config)
    asked = sorted({one.question for one in batch})
    texts = {index: questions[index].prompt_ids + questions[index].response_ids for index in asked}
    width = max(map(len, texts.values()))
    device = policy.device
    padding = special_tokens(model)[1]
    ids = torch.tensor([[padding] * (width - len(text)) + text for text in texts.values()], device=device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts.values()], device=device)
    reads = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
    if alone is None:
        # Above 1, both models read.
        model(ids, past_key_values=cache, logits_to_keep=1, router_threshold=2.0, **reads)
    elif alone == "slm":
        model.run_slm(ids, cache, 1, **reads)
    else:
        model.run_llm(ids, cache, 1, **reads)
    if not all(map(all_grow, (cache.slm, cache.llm) if isinstance(cache, CiterCache) else (cache,))):
        return None
    rows = torch.tensor([asked.index(one.question) for one in batch], device=device)
    cache.batch_select_indices(rows)
    own = [questions[one.question].prompt_ids + started(one, questions) for one in batch]
    places = torch.arange(width, device=device)
    first = torch.tensor([[width - len(texts[one.question])] for one in batch], device=device)
    end = first + torch.tensor([[len(text) - 1] for text in own], device=device)
    options = {"router_threshold": router_threshold, "waiting_rows": steady_policy} if alone is None else {}
    last = torch.tensor([text[-1:] for text in own], device=device)
    return Prefixes(policy, options, cache, ids[rows], (places >= first) & (places < end), last)
