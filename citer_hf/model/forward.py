"""What `forward` of a pair computes with tensors alone: where they go, which positions count, the likelihood."""

from __future__ import annotations

from typing import Any

import torch


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors of a dictionary (masks by kind of layer); anything else stays as it is."""
    if isinstance(value, dict):
        return {key: to_device(one, device) for key, one in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def keep(values: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Select positions as `logits_to_keep` says, for models that do not know it."""
    if isinstance(logits_to_keep, torch.Tensor):
        return values[:, logits_to_keep]
    return values[:, -logits_to_keep:] if logits_to_keep else values


def real_text(
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    finished_rows: torch.Tensor | None,
    length: int,
    logits_to_keep: int | torch.Tensor,
) -> torch.Tensor:
    """Say which kept positions are real text of unfinished rows."""
    real = torch.ones_like(like, dtype=torch.bool)
    if attention_mask is not None and attention_mask.dim() == 2:
        real &= keep(attention_mask[:, -length:], logits_to_keep).to(like.device).bool()
    if finished_rows is not None:
        real &= ~finished_rows.to(like.device)[:, None]
    return real


def marginal(scores: torch.Tensor, slm_logits: torch.Tensor, llm_logits: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of every token when the router draws the writer (Co-LLM's marginal likelihood)."""
    tiny = torch.finfo(torch.float32).tiny
    p_slm = scores.float()[..., None]
    by_slm = slm_logits.float().log_softmax(-1) + p_slm.clamp_min(tiny).log()
    by_llm = llm_logits.float().log_softmax(-1) + (1 - p_slm).clamp_min(tiny).log()
    return torch.logaddexp(by_slm, by_llm)


def in_one_piece(logits_to_keep: int | torch.Tensor, input_ids: torch.Tensor) -> int | torch.Tensor:
    """Let a model copy the last positions of several rows before its head multiplies them."""
    rows, tokens = input_ids.shape
    if isinstance(logits_to_keep, torch.Tensor) or rows == 1 or not 0 < logits_to_keep < tokens:
        return logits_to_keep
    return torch.arange(tokens - logits_to_keep, tokens, device=input_ids.device)
