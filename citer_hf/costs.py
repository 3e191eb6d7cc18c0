"""The cost of a forward pass of a model: bytes moved from memory and floating-point operations."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel

# The names in transformers' configurations for the number of experts, and for the experts of each token.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class ModelCost:
    """The cost of running one causal language model. Bytes of weights are those that one token reads."""

    weight_bytes: int
    kv_bytes_per_token: int
    active_parameters: int
    head_parameters: int = 0
    resident_bytes: int = 0
    attention_width: int = 0
    windowed_attention_width: int = 0
    kv_window: int | None = None
    windowed_kv_bytes_per_token: int = 0
    expert_bytes: int = 0
    expert_fraction: float = 1.0

    def weight_bytes_read(self, tokens: float = 1) -> float:
        """Bytes of weights that a forward pass reads; tokens choose experts evenly and independently."""
        visited = 1 - (1 - self.expert_fraction) ** tokens
        return self.weight_bytes + self.expert_bytes * (visited - self.expert_fraction)

    def kv_bytes_read(self, context: float) -> float:
        """Bytes of cached keys and values that a forward pass reads for one sequence."""
        full = self.kv_bytes_per_token - self.windowed_kv_bytes_per_token
        return full * context + self.windowed_kv_bytes_per_token * self.in_window(context)

    def bytes_moved(self, sequences: float, tokens: float, context: float) -> float:
        """Bytes that a forward pass reads and writes: `tokens` of each sequence behind `context` cached ones."""
        kv = self.kv_bytes_read(context) + self.kv_bytes_per_token * tokens
        return self.weight_bytes_read(sequences * tokens) + sequences * kv

    def in_window(self, context: float) -> float:
        """Cached tokens that a sliding-window layer still sees."""
        return context if self.kv_window is None else min(context, self.kv_window - 1)


def flops(cost: ModelCost, tokens: float, context: float = 0) -> float:
    """Floating-point operations of a forward pass of one sequence: two per weight and token, and attention."""
    # The head computes the last position's logits alone.
    products = (cost.active_parameters - cost.head_parameters) * tokens + cost.head_parameters
    attention = cost.attention_width * (context + tokens)
    attention += cost.windowed_attention_width * (cost.in_window(context) + tokens)
    return float(2 * products + 2 * tokens * attention)


def cost_of_model(model: PreTrainedModel) -> ModelCost:
    """Count the cost of a loaded model, with weights of the size that they are stored in (quantized ones too)."""
    return _cost(_skeleton(model.config, type(model)), model, lambda weight, _: _stored_bytes(weight), model.dtype)


def cost_of_config(config: PreTrainedConfig, bits: float = 16, kv_bits: float = 16) -> ModelCost:
    """Count the cost of a model from its configuration alone; no weights are loaded or allocated."""
    skeleton = _skeleton(config, AutoModelForCausalLM)
    # `bits` are those of the weight matrices.
    others = max(bits, 16)
    return _cost(skeleton, skeleton, lambda weight, matrix: weight.numel() * (bits if matrix else others) / 8, kv_bits)


def _cost(
    skeleton: PreTrainedModel,
    model: PreTrainedModel,
    size: Callable[[torch.Tensor, bool], float],
    kv_size: torch.dtype | float,
) -> ModelCost:
    """Count operations on the skeleton, and bytes on the model with the size of each of its weights."""
    config = skeleton.config.get_text_config(decoder=True)
    fraction = _expert_fraction(config)
    # Norms and biases take part in no matrix product.
    active = sum(
        weight.numel() * (fraction if is_expert else 1)
        for weight, is_expert, _ in _weights_read(skeleton, fraction)
        if weight.dim() >= 2
    )
    shared = experts = 0.0
    read = set()
    for weight, is_expert, is_head in _weights_read(model, fraction):
        read.add(id(weight))
        bytes_read = size(weight, weight.dim() >= 2 and not is_head)
        experts, shared = (experts + bytes_read, shared) if is_expert else (experts, shared + bytes_read)
    # Embedding tables are looked up, not read.
    tables = sum(size(weight, False) for weight in model.parameters() if id(weight) not in read)
    layers = _cache_layers(skeleton)
    full, windowed = ([layer for layer in layers if bool(layer[2]) is has_window] for has_window in (False, True))
    itemsize = kv_size.itemsize if isinstance(kv_size, torch.dtype) else kv_size / 8
    return ModelCost(
        weight_bytes=round(shared + fraction * experts),
        kv_bytes_per_token=round(itemsize * sum(elements for elements, _, _ in layers)),
        active_parameters=round(active),
        head_parameters=skeleton.get_output_embeddings().weight.numel(),
        resident_bytes=round(shared + experts + tables),
        attention_width=sum(width for _, width, _ in full),
        windowed_attention_width=sum(width for _, width, _ in windowed),
        kv_window=max((window for _, _, window in windowed if window), default=None),
        windowed_kv_bytes_per_token=round(itemsize * sum(elements for elements, _, _ in windowed)),
        expert_bytes=round(experts),
        expert_fraction=fraction,
    )


def _skeleton(config: PreTrainedConfig, model_class: Any) -> PreTrainedModel:
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    # With a padding token, forward looks into its input, which has no content here.
    config.get_text_config(decoder=True).pad_token_id = None
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = build(config, attn_implementation="eager", dtype=torch.float32)
    return skeleton.eval()


def _expert_fraction(config: PreTrainedConfig) -> float:
    total, per_token = (
        next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
        for names in (NUM_EXPERTS, EXPERTS_PER_TOKEN)
    )
    return min(1.0, per_token / total) if total and per_token else 1.0


def _weights_read(model: PreTrainedModel, expert_fraction: float) -> Iterator[tuple[torch.Tensor, bool, bool]]:
    """Yield every weight that a forward pass reads, and whether it is of a routed expert, and of the head."""
    head = model.get_output_embeddings()
    seen = {id(weight) for weight in head.parameters()}
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        own = [*module.parameters(recurse=False)]
        if hasattr(module, "in_features"):
            # Some quantizations keep the weights of a linear layer in buffers.
            own += module.buffers(recurse=False)
        for weight in own:
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            # Experts are modules of that name, or stacked in one tensor. A convolution's weight is [H, 1, kernel].
            stacked = weight.dim() == 3 and weight.shape[1] > 1
            yield weight, expert_fraction < 1 and ("experts" in name.split(".") or stacked), False
    for weight in head.parameters():
        yield weight, False, True


def _stored_bytes(weight: torch.Tensor) -> int:
    """Bytes of a tensor, with the scales that bitsandbytes keeps beside the values."""
    state = getattr(weight, "quant_state", None)
    beside = [getattr(weight, "SCB", None)]
    while state is not None:
        beside.append(getattr(state, "absmax", None))
        state = getattr(state, "state2", None)
    return weight.nbytes + sum(int(part.nbytes) for part in beside if part is not None)


def _cache_layers(skeleton: PreTrainedModel) -> list[tuple[int, int, int | None]]:
    """Return for each layer with keys: numbers kept of a token, those that take part in its attention, its window."""
    config = skeleton.config.get_text_config(decoder=True)
    for name, module in skeleton.named_modules():
        if name.endswith(".experts"):
            # The choice of experts depends on the content, and there is none. Experts leave nothing in the cache.
            module.forward = lambda hidden_states, *_, **__: hidden_states
    with torch.device("meta"), torch.no_grad():
        output = skeleton(torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    layers = []
    for layer in (layer for value in output.values() if isinstance(value, Cache) for layer in value.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            elements = keys.numel() + values.numel()
            width = elements // keys.shape[1]
            if getattr(config, "kv_lora_rank", None):
                # Compressed keys and values are expanded for attention.
                width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
            layers.append((elements, int(getattr(config, "num_attention_heads", 1)) * width, window))
    return layers
