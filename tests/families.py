"""Tiny models of many architectures, with random weights, made on the spot."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
PAD, BOS, EOS = 0, 1, 2
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
# Wide enough for a random model to have opinions.
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LINEAR: dict[str, Any] = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4}
LINEAR |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}

# Name of the family: its configuration class and what it adds to the shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2}),
    "mistral_sliding": ("MistralConfig", {"sliding_window": 6}),
    "phi3": ("Phi3Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralConfig", {"head_dim": 8, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, **MOE}),
    "qwen3_next": ("Qwen3NextConfig", LINEAR),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
}

LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
# More architectures, which the table of `compatibility.py` leaves out.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3Config", {**LOW_RANK, **MOE, **GROUPS, "head_dim": 4, "num_key_value_heads": 4}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 6, **EXPERTS}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "olmo2": ("Olmo2Config", {}),
    "phi": ("PhiConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 16, **MOE}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}
EVERY = {**FAMILIES, **MORE}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Configuration of a tiny model of a family."""
    name, extra = EVERY[family]
    return getattr(transformers, name)(**{**SHAPE, **extra, **overrides})


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model of a family in fp32, in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32).eval()
