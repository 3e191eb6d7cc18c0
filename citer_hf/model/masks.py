"""Attention masks for rows that stand at different places."""

from typing import Any, NamedTuple

import torch


class MaskKinds(NamedTuple):
    """Which masks a model wants."""

    windows: tuple[int | None, ...]
    by_kind: bool
    dtype: torch.dtype


def mask_kinds(model: Any, windows: Any) -> MaskKinds:
    different = tuple(sorted(set(windows), key=lambda window: window or 0))
    by_kind = len(different) > 1 or (
        None not in different and getattr(model.config.get_text_config(), "layer_types", None)
    )
    return MaskKinds(different, bool(by_kind), model.dtype)


def attention_masks(kinds: MaskKinds, readable: torch.Tensor, last: torch.Tensor) -> Any:
    """Return the masks `[batch, 1, tokens, places]` of queries that see everything up to a place."""
    readable = readable[:, None, None]
    if last.shape[1] == 1 and kinds.windows == (None,):
        # A row has nothing readable after its last token.
        return as_attention_mask(readable, kinds.dtype)
    distance = last[:, None, :, None] - torch.arange(readable.shape[-1], device=readable.device)
    full = (distance >= 0) & readable
    masks = {
        "full_attention" if window is None else "sliding_attention": as_attention_mask(
            full if window is None else full & (distance < window), kinds.dtype
        )
        for window in kinds.windows
    }
    return masks if kinds.by_kind else next(iter(masks.values()))


def as_attention_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask that is added to attention scores: made once per pass, where a bool would be at every layer."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
