"""What every router is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Router(nn.Module):
    """Base class of the routers: the probability that the SLM's next token is good enough.

    A new kind is one subclass and one line in `ROUTERS`. A kind that needs more of the SLM than its outputs has a
    method `bind(slm)`, which `CiterForCausalLM` calls when the pair is made.

    Args:
        hidden_size: Width H of the SLM's last hidden state.
        options: Everything else that the configuration's `router` dictionary holds.
    """

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__()
        if options:
            raise ValueError(
                f"router: unknown options {sorted(options)} for {type(self).__name__}; remove them from "
                "the `router` dictionary of the configuration."
            )

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Score one or many positions.

        Args:
            hidden: Last hidden state of the SLM, after the final norm, `[..., H]`.
            logits: Logits of the SLM at the same positions, `[..., V]`.

        Returns:
            `p_slm`, fp32 unless the user has cast the router, in [0, 1], `[...]`.
        """
        raise NotImplementedError
