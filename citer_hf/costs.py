"""The bytes that a forward pass of a model moves from memory and to it."""

import copy
from collections.abc import Callable
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
    # Of each layer that keeps keys and values: their bytes for a token, and its sliding window.
    layers: tuple[tuple[float, int | None], ...]
    resident_bytes: int = 0
    expert_bytes: int = 0
    expert_fraction: float = 1.0

    @property
    def kv_bytes_per_token(self) -> float:
        return sum(size for size, _ in self.layers)

    def weight_bytes_read(self, tokens: float = 1) -> float:
        """Bytes of weights that a forward pass reads; tokens choose experts evenly and independently."""
        visited = 1 - (1 - self.expert_fraction) ** tokens
        return self.weight_bytes + self.expert_bytes * (visited - self.expert_fraction)

    def kv_bytes_read(self, context: float) -> float:
        """Bytes of cached keys and values that a forward pass reads for one sequence."""
        return sum(size * (context if window is None else min(context, window - 1)) for size, window in self.layers)

    def bytes_moved(self, sequences: float, tokens: float, context: float) -> float:
        """Bytes that a forward pass reads and writes: `tokens` of each sequence behind `context` cached ones."""
        kv = self.kv_bytes_read(context) + self.kv_bytes_per_token * tokens
        return self.weight_bytes_read(sequences * tokens) + sequences * kv


def cost_of_model(model: PreTrainedModel) -> ModelCost:
    """Count the cost of a loaded model, with weights of the size that they are stored in (quantized ones too)."""
    if getattr(model, "is_remote", False):
        return cost_of_config(model.config)
    skeleton = _skeleton(model.config, type(model))
    return _cost(skeleton, model, lambda weight, _: _stored_bytes(weight), model.dtype.itemsize)


def cost_of_config(config: PreTrainedConfig, bits: float = 16) -> ModelCost:
    """Count the cost of a model from its configuration alone: `bits` of a matrix' weight, 16 of everything else."""
    skeleton = _skeleton(config, AutoModelForCausalLM)
    others = max(bits, 16)
    return _cost(skeleton, skeleton, lambda weight, matrix: weight.numel() * (bits if matrix else others) / 8, 2)


def _cost(
    skeleton: PreTrainedModel, model: PreTrainedModel, size: Callable[[torch.Tensor, bool], float], kv_itemsize: int
) -> ModelCost:
    """Count the bytes of a model with the size of each of its weights, which tells matrices from others."""
    fraction = _expert_fraction(model.config.get_text_config(decoder=True))
    head = {id(weight): weight for weight in model.get_output_embeddings().parameters()}
    read, experts, shared = set(head), 0.0, sum(size(weight, False) for weight in head.values())
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding):
            continue
        own = [*module.parameters(recurse=False)]
        if hasattr(module, "in_features"):
            # Some quantizations keep the weights of a linear layer in buffers.
            own += module.buffers(recurse=False)
        for weight in (one for one in own if id(one) not in read):
            read.add(id(weight))
            # Experts are modules of that name, or stacked in one tensor. A convolution's weight is [H, 1, kernel].
            stacked = weight.dim() == 3 and weight.shape[1] > 1
            if fraction < 1 and ("experts" in name.split(".") or stacked):
                experts += size(weight, weight.dim() >= 2)
            else:
                shared += size(weight, weight.dim() >= 2)
    # Embedding tables are looked up, not read.
    tables = sum(size(weight, False) for weight in model.parameters() if id(weight) not in read)
    return ModelCost(
        weight_bytes=round(shared + fraction * experts),
        layers=tuple((kv_itemsize * elements, window) for elements, window in _cache_layers(skeleton)),
        resident_bytes=round(shared + experts + tables),
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


def _stored_bytes(weight: torch.Tensor) -> int:
    """Bytes of a tensor, with the scales that bitsandbytes keeps beside the values."""
    state = getattr(weight, "quant_state", None)
    beside = [getattr(weight, "SCB", None)]
    while state is not None:
        beside.append(getattr(state, "absmax", None))
        state = getattr(state, "state2", None)
    return weight.nbytes + sum(int(part.nbytes) for part in beside if part is not None)


def _cache_layers(skeleton: PreTrainedModel) -> list[tuple[int, int | None]]:
    """Return for each layer with keys: how many numbers it keeps of a token, and its window."""
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
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
            layers.append((keys.numel() + values.numel(), window))
    return layers
