"""Router scores along given texts, from one pass of the SLM over each, and the thresholds that follow from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from citer_hf import CiterForCausalLM

from .decoding import BATCH_TOKENS, evaluating

__all__ = ["Scored", "check_scores", "score_texts", "spread_thresholds", "threshold_for_share"]

# Logits of a batch, in numbers: 1 GB in fp32.
MOST_LOGITS = 1 << 28


@dataclass(frozen=True)
class Scored:
    """Scores of routers along texts."""

    scores: dict[str, list[np.ndarray]]
    seconds: float


@torch.no_grad()
def score_texts(
    model: CiterForCausalLM,
    routers: Mapping[str, nn.Module],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda texts: None,
) -> Scored:
    """Score every new token of given texts, with the SLM reading each text once."""
    began = time.perf_counter()
    scores: dict[str, list[np.ndarray]] = {name: [np.empty(0)] * len(texts) for name in routers}
    most = min(batch_tokens, MOST_LOGITS // model.vocab_size)
    read = [[*prompt, *text[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
    rows: list[int] = []
    for row in [*sorted(range(len(texts)), key=lambda row: -len(read[row])), None]:
        if rows and (row is None or (len(rows) + 1) * len(read[rows[0]]) > most):
            for name, of_batch in _score_batch(model, routers, [read[one] for one in rows]).items():
                for one, all_scores in zip(rows, of_batch, strict=True):
                    scores[name][one] = all_scores[len(read[one]) - len(texts[one]) :]
            progress(len(rows))
            rows = []
        if row is not None:
            rows.append(row)
    for name, of_router in scores.items():
        check_scores(name, np.concatenate(of_router))
    return Scored(scores, time.perf_counter() - began)


def _score_batch(
    model: CiterForCausalLM, routers: Mapping[str, nn.Module], texts: Sequence[Sequence[int]]
) -> dict[str, list[np.ndarray]]:
    """Score every position of texts, which are padded on the right where no token sees the padding."""
    device, width = model.slm.device, max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
    positions = torch.arange(width, device=device)[None]
    slm = model.run_slm(ids, attention_mask=mask, position_ids=positions)
    found = {}
    for name, router in routers.items():
        with evaluating(router):
            values = router(slm.hidden, slm.logits).float().cpu().numpy()
        found[name] = [row[: len(text)] for row, text in zip(values, texts, strict=True)]
    return found


def check_scores(name: str, scores: np.ndarray) -> None:
    """Refuse scores that no threshold can be compared with."""
    bad = int(np.isnan(scores).sum())
    if bad:
        raise ValueError(
            f"router {name!r}: {bad} of {scores.size} scores are NaN. Its weights or the SLM's hidden states are not "
            "finite; check how it was trained, and whether the SLM overflows in this dtype."
        )


def threshold_for_share(scores: np.ndarray, share: float) -> float:
    """Return the threshold under which a share of the scores lies, as nearly as ties let it."""
    place = min(round(share * len(scores)), len(scores) - 1)
    tied = scores[place]
    below, up_to = (int(np.searchsorted(scores, tied, side)) for side in ("left", "right"))
    first = below if up_to - share * len(scores) >= share * len(scores) - below else up_to
    if first == len(scores):
        return float(np.nextafter(np.float32(tied), np.float32(np.inf)))
    if first == 0:
        return float(scores[0])
    low, high = np.float32(scores[first - 1]), np.float32(scores[first])
    middle = low + (high - low) / np.float32(2)
    return float(middle if middle > low else high)


def spread_thresholds(scores: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Return thresholds under which these shares of the scores lie, each once; none that sends no token."""
    ordered = np.sort(scores)
    thresholds = {threshold_for_share(ordered, share) for share in shares}
    return sorted(threshold for threshold in thresholds if threshold > ordered[0])
