"""A router that sends a given share of the tokens to the LLM, so that speed is known before a router is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["ForcedRouter", "decides_by", "forced_numbers", "replayed_numbers"]

# Rows that wait read again, and use up more numbers than there are tokens; after these the same come again.
TURNS = 4


class ForcedRouter(nn.Module):
    """Scores that are known beforehand, given in the order of the calls."""

    numbers: torch.Tensor

    def __init__(self, numbers: torch.Tensor):
        super().__init__()
        self.register_buffer("numbers", numbers, persistent=False)
        self._given = 0

    def reset(self) -> None:
        """Begin again with the first number."""
        self._given = 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Give each position its score."""
        if self.numbers.device != hidden.device:
            self.numbers = self.numbers.to(hidden.device)
        shape = hidden.shape[:-1]
        if self._given + shape.numel() > self.numbers.numel():
            self._given = 0
        scores = self.numbers.narrow(0, self._given, shape.numel())
        self._given += shape.numel()
        return scores.view(shape)


def forced_numbers(tokens: int, seed: int = 0, text: int = 0) -> torch.Tensor:
    """Return scores of which `router_threshold=p` sends the share p to the LLM, as exactly as the length allows."""
    # Seeds of texts must not meet those of other runs: 0 with text 1 is another sequence than 1 with text 0.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + text) % (1 << 63))
    order = torch.rand(TURNS, tokens, generator=generator).argsort(dim=1)
    return ((order + 0.5) / tokens).flatten()


def replayed_numbers(to_llm: torch.Tensor) -> torch.Tensor:
    """Return scores with which rows that move in step repeat decisions, at any `router_threshold` of a forced
    share."""
    return (~to_llm).T.flatten().float()


@contextmanager
def decides_by(model: Any, router: nn.Module | None) -> Iterator[None]:
    """Let a router decide for a pair, and give the pair its own one back afterwards."""
    own = model.router
    model.router = own if router is None else router
    try:
        yield
    finally:
        model.router = own
