"""Matrix products with two to four tokens, which some CPUs compute slower than with one or with five."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

FEW = range(2, 5)
# Narrower models gain less than asking at every operation costs.
NARROWEST = 256


class WeightsFirst(TorchFunctionMode):
    """Computes linear layers over two to four tokens as `(W xᵀ)ᵀ` instead of `x Wᵀ`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            inputs, weight = args[0], args[1]
            if inputs.numel() // inputs.shape[-1] in FEW and inputs.dtype == weight.dtype == torch.float32:
                product = (weight @ inputs.reshape(-1, inputs.shape[-1]).T).T.reshape(*inputs.shape[:-1], -1)
                return product if len(args) < 3 or args[2] is None else product + args[2]
        return func(*args, **(kwargs or {}))


def weights_first(model: PreTrainedModel, tokens: int) -> Any:
    """Return the context in which a model reads so many tokens."""
    if tokens not in FEW or model.device.type != "cpu" or model.dtype != torch.float32:
        return nullcontext()
    if getattr(model.config.get_text_config(), "hidden_size", 0) < NARROWEST or torch.compiler.is_compiling():
        return nullcontext()
    return WeightsFirst() if is_made_by_amd() else nullcontext()


@lru_cache(maxsize=1)
def is_made_by_amd() -> bool:
    """Say whether the CPU is one of AMD. Timing both products would make texts depend, by their rounding, on noise."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Only Linux has that file.
        return False
