"""What a forward pass of a model costs: bytes read from memory and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from citer_hf.model.compat import cache_argument
from citer_hf.model.memory import unquantized

from .stored import is_skipped

__all__ = ["ModelCost", "bytes_moved", "cost_of_config", "cost_of_model", "flops"]

# What the configurations of transformers call the number of experts, and how many of them a token visits.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class ModelCost:
    """What one causal language model costs to run."""

    weight_bytes: int
    kv_bytes_per_token: int
    active_parameters: int
    head_parameters: int = 0
    resident_bytes: int = 0
    num_layers: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    attention_width: int = 0
    windowed_attention_width: int = 0
    hidden_size: int = 0
    kv_window: int | None = None
    windowed_kv_bytes_per_token: int = 0
    expert_bytes: int = 0
    expert_fraction: float = 1.0

    def weight_bytes_read(self, tokens: int | float = 1) -> float:
        """Bytes of weights that a forward pass reads; experts are taken to be visited evenly and independently."""
        visited = 1 - (1 - self.expert_fraction) ** tokens
        return self.weight_bytes + self.expert_bytes * (visited - self.expert_fraction)

    def kv_bytes_read(self, context: int | float) -> float:
        """Bytes of keys and values that a forward pass reads for one row."""
        full = self.kv_bytes_per_token - self.windowed_kv_bytes_per_token
        return full * context + self.windowed_kv_bytes_per_token * self.in_window(context)

    def in_window(self, context: int | float) -> int | float:
        """Cached tokens that a sliding-window layer still sees."""
        return context if self.kv_window is None else min(context, self.kv_window - 1)


def cost_of_model(model: PreTrainedModel) -> ModelCost:
    """Count what a loaded model costs, at the sizes its weights are stored in (quantized ones included)."""
    skeleton = _skeleton(model.config, type(model))
    stored = _stored_bytes(model, _expert_fraction(model.config), lambda weight, _: _tensor_bytes(weight))
    return _cost(skeleton, stored, model.dtype.itemsize)


def cost_of_config(
    config: PreTrainedConfig,
    bits: float = 16,
    kv_bits: float = 16,
    other_bits: float | None = None,
    skipped: Sequence[str] = (),
) -> ModelCost:
    """Count what a model would cost, from its configuration alone; no weights are needed or allocated."""
    other_bits = max(bits, 16) if other_bits is None else other_bits
    for name, value in (("bits", bits), ("kv_bits", kv_bits), ("other_bits", other_bits)):
        if not 0 < value <= 64:
            raise ValueError(f"{name}: expected a number of bits above 0, such as 16, 8 or 4.5, got {value!r}.")
    skeleton = _skeleton(config, AutoModelForCausalLM)
    whole = {
        id(weight)
        for name, module in skeleton.named_modules()
        if is_skipped(name, skipped)
        for weight in module.parameters(recurse=False)
    }

    def size(weight: torch.Tensor, is_matrix: bool) -> float:
        return weight.numel() * (bits if is_matrix and id(weight) not in whole else other_bits) / 8

    stored = _stored_bytes(skeleton, _expert_fraction(config), size)
    return _cost(skeleton, stored, kv_bits / 8)


def bytes_moved(
    cost: ModelCost, forward_passes: int, cached_tokens_read: int | Iterable[int], tokens_written: int
) -> int:
    """Bytes that a run moves from and to memory: weights once per forward pass, and the cache."""
    if isinstance(cached_tokens_read, int):
        read: float = cost.kv_bytes_per_token * cached_tokens_read
    else:
        read = sum(cost.kv_bytes_read(context) for context in cached_tokens_read)
    return int(cost.weight_bytes * forward_passes + read + cost.kv_bytes_per_token * tokens_written)


def flops(cost: ModelCost, tokens: int | float, context: int | float = 0, logits: int | float = 1) -> float:
    """Floating-point operations of a forward pass of one row: two per weight and token, and attention."""
    products = (cost.active_parameters - cost.head_parameters) * tokens + cost.head_parameters * logits
    attention = cost.attention_width * (context + tokens)
    attention += cost.windowed_attention_width * (cost.in_window(context) + tokens)
    return float(2 * products + 2 * tokens * attention)


@dataclass(frozen=True)
class _Stored:
    """Bytes of the weights: what every token reads, the routed experts, and what is looked up or never read."""

    shared: float
    experts: float
    tables: float
    expert_fraction: float


def _cost(skeleton: PreTrainedModel, stored: _Stored, kv_itemsize: float) -> ModelCost:
    config = skeleton.config.get_text_config(decoder=True)
    fraction = stored.expert_fraction
    active: float = 0
    for weight, is_expert, _ in _read_weights(skeleton, fraction):
        # The norms and biases, also those of stacked experts, take part in no matrix product.
        if weight.dim() >= (3 if is_expert and weight.dim() != 2 else 2):
            active += weight.numel() * (fraction if is_expert else 1)
    layers = _cache_layers(skeleton)
    windows = [layer.window for layer in layers if layer.window is not None]
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    widths = [layer.attention_width(config, heads) for layer in layers]
    return ModelCost(
        weight_bytes=round(stored.shared + fraction * stored.experts),
        kv_bytes_per_token=round(kv_itemsize * sum(layer.elements for layer in layers)),
        active_parameters=round(active),
        head_parameters=_head(skeleton).weight.numel(),
        resident_bytes=round(stored.shared + stored.experts + stored.tables),
        num_layers=int(config.num_hidden_layers),
        num_heads=heads if layers else 0,
        num_kv_heads=max((layer.heads for layer in layers), default=1),
        attention_width=sum(width for width, layer in zip(widths, layers, strict=True) if layer.window is None),
        windowed_attention_width=sum(width for width, layer in zip(widths, layers, strict=True) if layer.window),
        hidden_size=int(config.hidden_size),
        kv_window=max(windows, default=None),
        windowed_kv_bytes_per_token=round(kv_itemsize * sum(layer.elements for layer in layers if layer.window)),
        expert_bytes=round(stored.experts),
        expert_fraction=fraction,
    )


def _skeleton(config: PreTrainedConfig, model_class: Any) -> PreTrainedModel:
    """Build the model without memory for its weights."""
    config = unquantized(config)
    # With a padding token, forward looks into its input, which has no content here.
    config.get_text_config(decoder=True).pad_token_id = None
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = build(config, attn_implementation="eager", dtype=torch.float32)
    return skeleton.eval()


def _head(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model: expected a causal language model, got {type(model).__name__}, which has no head. "
            "Load it with AutoModelForCausalLM."
        )
    return head


def _expert_fraction(config: PreTrainedConfig) -> float:
    text_config = config.get_text_config(decoder=True)
    total = _first(text_config, NUM_EXPERTS)
    per_token = _first(text_config, EXPERTS_PER_TOKEN)
    return min(1.0, per_token / total) if total and per_token else 1.0


def _first(config: PreTrainedConfig, names: Iterable[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _read_weights(model: PreTrainedModel, expert_fraction: float) -> Iterator[tuple[torch.Tensor, bool, bool]]:
    """Give every weight that a forward pass reads: the tensor, whether it is of a routed expert, whether of the
    head."""
    head = _head(model)
    seen = {id(weight) for weight in head.parameters()}
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        own = [*module.named_parameters(recurse=False)]
        if hasattr(module, "in_features"):
            # Some quantizations keep the weights of a linear layer in buffers.
            own += module.named_buffers(recurse=False)
        for _, weight in own:
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            # Experts are modules of that name, or stacked in one tensor. A convolution's weight is [H, 1, kernel].
            stacked = weight.dim() == 3 and weight.shape[1] > 1
            is_expert = expert_fraction < 1 and ("experts" in name.split(".") or stacked)
            yield weight, is_expert, False
    for weight in head.parameters():
        yield weight, False, True


def _stored_bytes(
    model: PreTrainedModel, expert_fraction: float, size: Callable[[torch.Tensor, bool], float]
) -> _Stored:
    """Add up the weights that are read, each of the size that a function of it and of being a layer's matrix gives."""
    shared = experts = 0.0
    read = set()
    for weight, is_expert, is_head in _read_weights(model, expert_fraction):
        read.add(id(weight))
        bytes_read = size(weight, weight.dim() >= 2 and not is_head)
        experts, shared = (experts + bytes_read, shared) if is_expert else (experts, shared + bytes_read)
    tables = sum(size(weight, False) for weight in model.parameters() if id(weight) not in read)
    return _Stored(shared, experts, tables, expert_fraction)


def _tensor_bytes(weight: torch.Tensor) -> int:
    """Bytes of a tensor, with the scales that bitsandbytes keeps beside the values."""
    state = getattr(weight, "quant_state", None)
    beside = [getattr(weight, "SCB", None)]
    while state is not None:
        beside.append(getattr(state, "absmax", None))
        state = getattr(state, "state2", None)
    return weight.numel() * weight.element_size() + sum(int(part.nbytes) for part in beside if part is not None)


@dataclass(frozen=True)
class _CacheLayer:
    """Keys and values of one token in one attention layer."""

    heads: int
    elements: int
    window: int | None

    def attention_width(self, config: PreTrainedConfig, query_heads: int) -> int:
        if getattr(config, "kv_lora_rank", None):
            width: int = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        else:
            width = self.elements // self.heads
        return query_heads * width


def _cache_layers(skeleton: PreTrainedModel) -> list[_CacheLayer]:
    """Let the model fill its cache with one token, to see what it keeps; layers without keys are left out."""
    cache = DynamicCache(config=skeleton.config)
    for name, module in skeleton.named_modules():
        if name.endswith(".experts"):
            # Which experts run depends on the content, and there is none. They leave no mark on the cache.
            module.forward = _first_argument
    with torch.device("meta"), torch.no_grad():
        skeleton(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True, **cache_argument(skeleton, cache))
    layers = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
            layers.append(_CacheLayer(keys.shape[1], keys.numel() + values.numel(), window))
    return layers


def _first_argument(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states
