"""Former name of `decode`; goes when training imports from there."""

from .decode import (
    BATCH_TOKENS,
    cut,
    decode,
    greedy_view,
    special_tokens,
    steady_policy,
    text_lengths,
    with_router,
)

__all__ = [
    "BATCH_TOKENS",
    "cut",
    "decode",
    "greedy_view",
    "special_tokens",
    "steady_policy",
    "text_lengths",
    "with_router",
]
