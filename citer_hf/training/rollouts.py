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
from citer_hf.evaluation.decoding import (
    BATCH_TOKENS,
    cut,
    decode,
    greedy_view,
    special_tokens,
    steady_policy,
    text_lengths,
)
from citer_hf.evaluation.tokens import Encoded
from citer_hf.layers_citer import all_grow

__all__ = ["RollOut", "cut_into_batches", "roll_out"]

# After so many tokens, rows that have ended leave the batch.
STRETCH = 32


@dataclass(frozen=True)
class RollOut:
    """One action at one state.

    Attributes:
        question: Index of the question.
        position: Tokens of the reference answer before the action.
        token: The action; -1 lets the policy decide from the state itself.
    """

    question: int
    position: int
    token: int


def cut_into_batches(
    wanted: Sequence[RollOut], questions: Sequence[Encoded], max_new_tokens: int, batch_tokens: int = BATCH_TOKENS
) -> list[list[RollOut]]:
    """Divide roll-outs into batches of questions of like lengths; the same roll-outs always give the same batches.

    Args:
        wanted: The roll-outs, in any order.
        questions: All questions.
        max_new_tokens: Longest response, in tokens.
        batch_tokens: Tokens of all rows of a batch, at most, if that leaves one row.
    """

    def room(one: RollOut) -> int:
        question = questions[one.question]
        return len(question.prompt_ids) + len(question.response_ids) + max_new_tokens

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
    router_threshold: float | None,
    max_new_tokens: int,
) -> list[list[int]]:
    """Carry out actions and let the policy, which is the pair at a threshold, write to the end.

    Args:
        model: The pair, with the router of the policy.
        questions: All questions.
        batch: Roll-outs.
        router_threshold: 0 is the SLM alone, above 1 the LLM alone; `None` is the pair's own.
        max_new_tokens: Longest response, in tokens, the state's part included.

    Returns:
        The whole response of each, from its first token on: reference, action, and what the policy wrote.
    """
    end_tokens = set(special_tokens(model)[0])
    texts = [started(one, questions) for one in batch]
    going = [
        index
        for index, (one, text) in enumerate(zip(batch, texts, strict=True))
        if one.token not in end_tokens and len(text) < max_new_tokens
    ]
    if not going:
        return texts
    rows = [batch[index] for index in going]
    prefixes = shared_prefixes(model, questions, rows, router_threshold)
    if prefixes is None:
        prompts = [questions[one.question].prompt_ids + started(one, questions) for one in rows]
        longest = max_new_tokens - min(len(texts[index]) for index in going)
        written = decode(
            model, prompts, router_threshold=router_threshold, max_new_tokens=longest, batch_tokens=1 << 40
        ).tokens
    else:
        written = prefixes.write(router_threshold, max_new_tokens)
    for index, tokens in zip(going, written, strict=True):
        texts[index] = (texts[index] + tokens)[:max_new_tokens]
    return texts


def started(one: RollOut, questions: Sequence[Encoded]) -> list[int]:
    """Return the response up to the state, and the action."""
    action = [] if one.token < 0 else [one.token]
    return questions[one.question].response_ids[: one.position] + action


class Prefixes:
    """The caches of both models after prompts and references, one row per roll-out.

    Args:
        model: The pair.
        cache: What both models have read, one row per roll-out.
        ids: Its tokens, `[rows, width]`.
        visible: Which of them lie before the last token of a row's own text, bool `[rows, width]`.
        last: The last token of a row's own text, `[rows, 1]`.
    """

    def __init__(
        self, model: Any, cache: CiterCache, ids: torch.Tensor, visible: torch.Tensor, last: torch.Tensor
    ) -> None:
        self.model, self.cache, self.ids, self.visible, self.last = model, cache, ids, visible, last

    def write(self, router_threshold: float | None, max_new_tokens: int) -> list[list[int]]:
        """Let the policy write from every state to the end.

        Args:
            router_threshold: Of the policy.
            max_new_tokens: Of a row, at most; earlier where the context is full.
        """
        end_tokens, _ = special_tokens(self.model)
        limit = self.model.config.max_position_embeddings
        if limit is not None:
            max_new_tokens = min(max_new_tokens, limit - 1 - int(self.visible.sum(dim=1).max()))
        ids = torch.cat([self.ids, self.last], dim=1)
        mask = torch.cat([self.visible, torch.ones_like(self.last, dtype=torch.bool)], dim=1).long()
        written: list[list[int]] = [[] for _ in ids]
        going = list(range(len(ids)))
        policy = greedy_view(self.model)
        while going and max_new_tokens > 0:
            # States near the end of their answer are done soon, and need not be carried to the end of the others'.
            stretch = min(STRETCH, max_new_tokens)
            max_new_tokens -= stretch
            output = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self.cache,
                router_threshold=router_threshold,
                waiting_rows=steady_policy,
                max_new_tokens=stretch,
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
    model: Any, questions: Sequence[Encoded], batch: Sequence[RollOut], router_threshold: float | None
) -> Prefixes | None:
    """Let both models read every question of a batch once.

    Args:
        model: The pair.
        questions: All questions.
        batch: Roll-outs.
        router_threshold: Of the policy; at 0 the LLM need not read.

    Returns:
        `None` where a layer does not keep the whole text by its place (sliding windows, linear attention), so that
        nothing in it can be hidden.
    """
    cache = CiterCache(model.config)
    asked = sorted({one.question for one in batch})
    texts = {index: questions[index].prompt_ids + questions[index].response_ids for index in asked}
    width = max(map(len, texts.values()))
    device = model.slm.device
    padding = special_tokens(model)[1]
    ids = torch.tensor([[padding] * (width - len(text)) + text for text in texts.values()], device=device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts.values()], device=device)
    model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
        past_key_values=cache,
        logits_to_keep=1,
        router_threshold=0.0 if router_threshold == 0 else 2.0,
    )
    if not all_grow(cache.slm) or (cache.llm_length and not all_grow(cache.llm)):
        return None
    rows = torch.tensor([asked.index(one.question) for one in batch], device=device)
    cache.batch_select_indices(rows)
    own = [questions[one.question].prompt_ids + started(one, questions) for one in batch]
    padded = [width - len(texts[one.question]) for one in batch]
    places = torch.arange(width, device=device)
    first = torch.tensor(padded, device=device)[:, None]
    end = first + torch.tensor([len(text) - 1 for text in own], device=device)[:, None]
    last = torch.tensor([text[-1:] for text in own], device=device)
    return Prefixes(model, cache, ids[rows], (places >= first) & (places < end), last)
