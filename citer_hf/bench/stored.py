"""In how many bits a model's weights are stored, as its configuration tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

__all__ = ["StoredWeights", "is_skipped", "weights_of_config"]

DEFAULT_BITS = 16
# Beside quantized weights: a scale of 16 bits per group, or of 32 per block; microscaling has 8 bits per 32 weights.
SCALE, LONG_SCALE, MX_SCALE, MX_GROUP = 16, 32, 8, 32
# Of bitsandbytes in 4 bit: weights per scale, and scales per scale of scales.
BNB_BLOCK, BNB_NESTED_BLOCK = 64, 256
# Where configurations name the modules that stay as they are.
SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers")

# Where they give some modules other bits than the rest.
UNEVEN = ("dynamic", "extra_config", "lm_head", "modules_in_block_to_quantize", "modules_to_convert")


@dataclass(frozen=True)
class StoredWeights:
    """How the weights of a model are stored."""

    bits: float
    other_bits: float
    source: str
    skipped: tuple[str, ...] = ()


def weights_of_config(config: PreTrainedConfig, bits: float | None = None, argument: str = "bits") -> StoredWeights:
    """Read from a configuration how weights are stored: quantized, in its dtype, or in 16 bits when it says
    nothing."""
    if bits is not None:
        return StoredWeights(bits, max(bits, DEFAULT_BITS), "as given")
    dtype = _dtype(config)
    own = 8 * dtype.itemsize if dtype else DEFAULT_BITS
    others = max(own, DEFAULT_BITS)
    quantization = _quantization(config)
    if quantization is None:
        source = f"{str(dtype).removeprefix('torch.')} in its config" if dtype else "its config names no dtype"
        return StoredWeights(own, others, source)
    method = _method(quantization)
    stored = _bits_of(method, quantization)
    if not (stored and 1 <= stored <= 64):
        raise ValueError(
            f"{argument}: the configuration has a quantization whose bits are not known here, {method} (known are "
            f"{', '.join(METHODS)}, each with the same bits in all layers). Count the bits per weight with its "
            f"scales, such as 4.5 for nf4 in blocks of 64, and give {argument}."
        )
    skipped = tuple(name for key in SKIPPED for name in quantization.get(key) or ())
    return StoredWeights(stored, others, f"{method} in its config, other weights {others}", skipped)


def is_skipped(module: str, patterns: Iterable[str]) -> bool:
    """Tell whether a quantization leaves a module as it is, by the rules of transformers and compressed-tensors."""
    return any(module.endswith(pattern) or _matches(pattern.removeprefix("re:"), module) for pattern in patterns)


def _matches(pattern: str, module: str) -> bool:
    try:
        # Up to the end of a part of the name: layers.1 is not layers.11.
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return False


def _dtype(config: PreTrainedConfig) -> torch.dtype | None:
    for one in (config.get_text_config(decoder=True), config):
        dtype = getattr(one, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def _quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    for one in (config, config.get_text_config(decoder=True)):
        found = getattr(one, "quantization_config", None)
        if found:
            return found if isinstance(found, dict) else dict(found.to_dict())
    return None


def _method(quantization: dict[str, Any]) -> str:
    by_itself = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or ("bitsandbytes" if by_itself else "of an unnamed method")
    return str(getattr(method, "value", method))


def _bits_of(method: str, quantization: dict[str, Any]) -> float | None:
    if any(quantization.get(key) for key in UNEVEN):
        return None
    try:
        return METHODS[method](quantization)
    except (KeyError, TypeError, ValueError, AttributeError):
        # What a method needs is missing, or is none of the kind that is known.
        return None


def _grouped(bits: float, group: int | None, beside: float) -> float:
    # -1 is one group per output feature, which weighs nothing.
    return float(bits) + (beside / group if group and group > 0 else 0.0)


def _packed(quantization: dict[str, Any]) -> float:
    """Of awq and gptq: scales, and zero points packed as the weights are."""
    bits = quantization["bits"]
    return _grouped(bits, quantization.get("group_size", 128), SCALE + bits)


def _bitsandbytes(quantization: dict[str, Any]) -> float:
    if quantization.get("load_in_8bit"):
        return 8.0
    if not quantization.get("load_in_4bit"):
        raise ValueError
    if quantization.get("bnb_4bit_use_double_quant"):
        return 4 + 8 / BNB_BLOCK + LONG_SCALE / (BNB_BLOCK * BNB_NESTED_BLOCK)
    return _grouped(4, BNB_BLOCK, LONG_SCALE)


def _fp8(quantization: dict[str, Any]) -> float:
    if quantization.get("expert_dtype", "fp8") != "fp8":
        raise ValueError
    rows, columns = quantization.get("weight_block_size") or (0, 0)
    return _grouped(8, rows * columns, LONG_SCALE)


def _compressed_tensors(quantization: dict[str, Any]) -> float:
    groups = quantization["config_groups"].values()
    (stored,) = {_compressed_group(group["weights"]) for group in groups}
    if not any("Linear" in group["targets"] for group in groups):
        raise ValueError
    return stored


def _mxfp4(quantization: dict[str, Any]) -> float:
    if not quantization["modules_to_not_convert"]:
        raise ValueError
    return _grouped(4, MX_GROUP, MX_SCALE)


def _compressed_group(weights: dict[str, Any]) -> float:
    bits = weights["num_bits"]
    scale = 8 if weights.get("type") == "float" and bits == 4 else SCALE
    return _grouped(bits, weights.get("group_size"), scale + (0 if weights.get("symmetric", True) else bits))


METHODS: dict[str, Callable[[dict[str, Any]], float]] = {
    "awq": _packed,
    "gptq": _packed,
    "auto-round": _packed,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": lambda _: 8.0,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}
