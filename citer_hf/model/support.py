"""What the engine asks of a base model before it runs one."""

import inspect
import sys
from typing import Any

from transformers import PreTrainedModel

# Kinds of layers whose masks `slots.py` can give.
LAYER_TYPES = {"full_attention", "sliding_attention"}


def why_not_placed(model: PreTrainedModel) -> str:
    """Return why sequences of a model cannot stand at different places in one pass; "" if they can."""
    if getattr(model, "is_remote", False):
        return ""
    config: Any = model.config.get_text_config()
    name, implementation = config.model_type, config._attn_implementation
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{name} takes no positions"
    if not set(getattr(config, "layer_types", None) or ()) <= LAYER_TYPES:
        return f"{name} has layers of other kinds than full and sliding attention"
    modules = {sys.modules.get(parent.__module__) for parent in type(model).__mro__}
    if not any(hasattr(module, "create_causal_mask") for module in modules) or getattr(config, "alibi", False):
        return f"{name} makes its masks by itself"
    if implementation not in ("sdpa", "eager"):
        return f"attention {implementation!r} takes no masks of sequences that stand at different places"
    return ""


def is_plain(model: PreTrainedModel) -> bool:
    """Return True if a forward pass involves no offloading, dequantization or gathering."""
    moved = any(hasattr(module, "_hf_hook") for module in (model, *model.children()))
    return not (moved or getattr(model, "is_quantized", False) or is_shared(model))


def is_shared(model: PreTrainedModel) -> bool:
    """Return True if a model is divided among processes, by layers or within them."""
    return any(getattr(model, name, None) is not None for name in ("_tp_size", "_device_mesh"))
