"""A router that sends a given share of the tokens to the LLM, so that speed is known before a router is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .options import Setting

__all__ = ["ForcedRouter", "decides_by"]

# More numbers than one generation needs, even in a wide batch; after them the same come again.
TABLE = 1 << 16


class ForcedRouter(nn.Module):
    """Scores that are drawn at random and independently, so that `router_threshold=p` sends the share p to the LLM.

    The numbers come from a generator of its own: nothing else that draws numbers changes them, and they change
    nothing else.

    Args:
        seed: Another seed makes other decisions.
    """

    table: torch.Tensor
    drawn: torch.Tensor

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed
        self._generator = torch.Generator()
        self.register_buffer("table", torch.empty(0), persistent=False)
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long), persistent=False)
        self.reset()

    def reset(self, text: int = 0) -> None:
        """Begin again, so that the next text gets the same decisions as the text of that number did before.

        Args:
            text: Number of the text, from 0.
        """
        # Seeds of texts must not meet those of other runs: 0 with text 1 is another sequence than 1 with text 0.
        self._generator.manual_seed(self.seed * 1_000_003 + text)
        if self.table.numel():
            self.table.copy_(torch.rand(TABLE, generator=self._generator))
            self.drawn.zero_()

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Draw a score for each position.

        Args:
            hidden: `[..., H]`; its shape and device alone matter.
            logits: `[..., V]`, not looked at.

        Returns:
            Numbers spread evenly over [0, 1), fp32 `[...]`.
        """
        if hidden.device.type == "cpu":
            return torch.rand(hidden.shape[:-1], generator=self._generator)
        return self._look_up(hidden.shape[:-1], hidden.device)

    def _look_up(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Take numbers from a table on the device: no copy per token, and right inside a recorded graph."""
        if self.table.device != device or not self.table.numel():
            self.table = torch.rand(TABLE, generator=self._generator).to(device)
            self.drawn = self.drawn.to(device)
        index = self.drawn + torch.arange(shape.numel(), device=device)
        self.drawn += shape.numel()
        return self.table[index % TABLE].view(shape)


@contextmanager
def decides_by(model: Any, setting: Setting, seed: int = 0) -> Iterator[ForcedRouter | None]:
    """Let a pair decide as a setting says, and give it its own router back afterwards.

    Args:
        model: The `CiterForCausalLM`.
        setting: A share puts a `ForcedRouter` in the place of the router, a threshold leaves it.
        seed: Of the forced decisions.

    Yields:
        The forced router, or `None`.
    """
    if setting.share is None:
        yield None
        return
    own, forced = model.router, ForcedRouter(seed).eval()
    model.router = forced
    try:
        yield forced
    finally:
        model.router = own
