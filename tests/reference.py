"""The method written down naively: no cache, no padding, one row at a time. Everything else is compared with this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def naive_logits(model: Any, ids: Sequence[int], threshold: float) -> tuple[torch.Tensor, float, bool]:
    """Logits of the token that follows `ids`, the router's score, and whether the LLM gives the logits."""
    input_ids = torch.tensor([list(ids)], device=model.slm.device)
    slm_logits = model.slm(input_ids, use_cache=False).logits[0, -1, : model.config.vocab_size]
    hidden = model.slm.base_model(input_ids, use_cache=False).last_hidden_state[0, -1]
    score = float(model.router(hidden, slm_logits))
    if score >= threshold:
        return slm_logits, score, False
    return model.llm(input_ids, use_cache=False).logits[0, -1, : model.config.vocab_size], score, True


def naive_generate(
    model: Any, ids: Sequence[int], max_new_tokens: int, threshold: float, eos: Sequence[int] = (2,)
) -> tuple[list[int], list[bool], list[float], torch.Tensor]:
    """Greedy text after `ids`, up to and with the first end token; who wrote each token, the scores, the logits."""
    text, to_llm, scores, logits = list(ids), [], [], []
    for _ in range(max_new_tokens):
        row, score, by_llm = naive_logits(model, text, threshold)
        text.append(int(row.argmax()))
        to_llm.append(by_llm)
        scores.append(score)
        logits.append(row)
        if text[-1] in eos:
            break
    return text[len(ids) :], to_llm, scores, torch.stack(logits)
