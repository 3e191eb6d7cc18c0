"""Out of memory while one of the two models is loaded or runs, said in words that help."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

GB = 1e9
ALLOCATION_FAILED = re.compile(
    r"(can't|can ?not|could not|couldn't|failed to|unable to) allocate|out of memory|not enough memory|bad_alloc",
    re.IGNORECASE,
)
# What an allocation that failed may raise, the narrower type first.
KINDS = (torch.OutOfMemoryError, MemoryError, OSError, RuntimeError)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out: torch, Python and the system each have their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and ALLOCATION_FAILED.search(str(error)) is not None


def weight_bytes(model: PreTrainedModel) -> float:
    """Count the bytes of a loaded model's weights, as they are stored."""
    return float(sum(part.nbytes for part in (*model.parameters(), *model.buffers())))


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a configuration as it is without quantization."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def weight_bytes_of(config: PreTrainedConfig, keywords: dict[str, Any]) -> float:
    """Count the bytes of a model's weights, unquantized, without loading any."""
    config = unquantized(config)
    dtype: Any = keywords.get("dtype", keywords.get("torch_dtype"))
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    trust = {"trust_remote_code": True} if keywords.get("trust_remote_code") else {}
    with torch.device("meta"):
        return weight_bytes(AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, **trust))


def not_loaded(error: Exception, role: str, source: Any, needed: float) -> Exception:
    """Return an error of the same type which says which model could not be loaded and what helps."""
    kind = next(kind for kind in KINDS if isinstance(error, kind))
    return kind(
        f"{role.upper()}: out of memory while it was loaded from {source}. It needs about {needed / GB:.3g} GB for "
        "its weights, before any quantization. What helps: weights in fewer bytes "
        f"({role}_quantization_config=..., or dtype=torch.bfloat16); weights on all devices and the disk "
        '(device_map="auto", offload_folder=...); another device '
        f'(device_map="cpu"). What was raised: {error}'
    )


def kv_bytes_per_token(model: PreTrainedModel) -> float:
    """Estimate the bytes of one token's keys and values, as if every layer had attention over the whole text."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "kv_lora_rank", None):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(config.num_hidden_layers * groups * width * model.dtype.itemsize)


def explained(error: Exception, role: str, model: PreTrainedModel, rows: int, tokens: int, length: int) -> Exception:
    """Return an error of the same type which says what did not fit and what helps."""
    name, kv = role.upper(), rows * length * kv_bytes_per_token(model)
    kind = next(kind for kind in KINDS if isinstance(error, kind))
    # What was raised stays in the text: accelerate's search for a batch size that fits looks for it.
    return kind(
        f"{name}: out of memory while it was reading {tokens} token(s) of {rows} row(s). It needs "
        f"{weight_bytes(model) / GB:.3g} GB for its weights, about {kv / GB:.3g} GB for the keys and values of "
        f"{length} token(s) of every row, and room to compute in. What helps: fewer rows or shorter prompts "
        "(prefill_chunk_size=512 reads a long prompt in parts); weights in fewer bytes "
        f"({role}_quantization_config=..., or dtype=torch.bfloat16); keys and values or weights elsewhere "
        f'(cache_implementation="offloaded", device_map="auto"). What was raised: {error}'
    )
