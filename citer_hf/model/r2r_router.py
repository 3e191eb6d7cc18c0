"""The router of R2R (arXiv 2505.21600)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .router_base import Router

FP32 = torch.float32


class R2RBlock(nn.Module):
    """A residual block: layer norm, linear, GELU, linear, added to what came in."""

    def __init__(self, size: int, inner_size: int, out_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, dtype=FP32)
        self.expand = nn.Linear(size, inner_size, dtype=FP32)
        self.contract = nn.Linear(inner_size, out_size, dtype=FP32)
        self.skip = nn.Linear(size, out_size, dtype=FP32) if out_size != size else None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(self.expand(self.norm(values)))
        return self.contract(inner) + (values if self.skip is None else self.skip(values))


class R2RRouter(Router):
    """The router of R2R: one minus the probability that the SLM's token leads the text astray."""

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int | None = None,
        top_logits: int = 100,
        blocks: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ):
        super().__init__(hidden_size, **options)
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.top_logits = top_logits
        blocks = blocks or [(hidden_size, 4 * hidden_size, hidden_size)]
        first, last = blocks[0][0], blocks[-1][2]
        self.logits_projection = nn.Linear(top_logits, hidden_size, dtype=FP32)
        self.combined_projection = nn.Linear(2 * hidden_size + self.embedding_size, first, dtype=FP32)
        self.input_projection = nn.Linear(first, first, dtype=FP32)
        self.blocks = nn.Sequential(*(R2RBlock(*sizes) for sizes in blocks))
        self.norm = nn.LayerNorm(last, dtype=FP32)
        self.score = nn.Linear(last, 1, dtype=FP32)
        # In a tuple, so that the SLM does not become a part of its router.
        self._bound: tuple[Any, ...] = ()

    def bind(self, slm: Any) -> None:
        """Take the embeddings of tokens from this model."""
        width = slm.get_input_embeddings().weight.shape[-1]
        if width != self.embedding_size:
            raise ValueError(
                f"router: it was made for an SLM with embeddings of {self.embedding_size}, but this SLM's have "
                f"{width}. Use the SLM that the router was trained with."
            )
        self._bound = (slm,)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        # R2R compares the probability itself: the complement of its sigmoid, not the sigmoid of the negative.
        return 1 - torch.sigmoid(self.divergence(hidden, logits))

    def divergence(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logit of the probability that the SLM's token leads astray."""
        like = self.combined_projection.weight
        largest = logits.topk(min(self.top_logits, logits.shape[-1]), dim=-1).values.to(like)
        largest = nn.functional.pad(largest, (0, self.top_logits - largest.shape[-1]))
        token = self._embedded(logits.argmax(-1)).to(like)
        inputs = torch.cat([hidden.to(like), token, self.logits_projection(largest)], dim=-1)
        values = self.blocks(self.input_projection(self.combined_projection(inputs)))
        return self.score(self.norm(values)).squeeze(-1)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self._bound:
            raise RuntimeError("router: it reads the SLM's embeddings; call router.bind(slm) before it scores.")
        table = self._bound[0].get_input_embeddings()
        if table.weight.device.type != "meta":
            tokens = tokens.to(table.weight.device)
        # Called, not indexed: weights may be offloaded. Some tables scale what they give, R2R takes what they store.
        return table(tokens) / getattr(table, "embed_scale", 1)
