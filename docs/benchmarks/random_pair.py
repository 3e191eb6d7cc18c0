"""Write a pair with random weights in the shapes of real models, for `citer bench --slm DIR/slm --llm DIR/llm`.

    python docs/benchmarks/random_pair.py smollm2-135m llama-1b DIR
    python docs/benchmarks/random_pair.py smollm2-135m llama-1b DIR --agreement 0.8

Speed does not depend on the values of weights, but what is drafted or verified does: two random models agree on
nothing. With `--agreement`, the next token of both models is a function of the last one, the same at this share of
tokens: each layer adds zeros, and the head has the embedding of a token as the row of the token that follows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": True}
QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**LLAMA, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "heads": (4, 2)},
    "mini": {**LLAMA, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "heads": (8, 4)},
    "smollm2-135m": {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": (9, 3)},
    "llama-300m": {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "heads": (16, 8)},
    "llama-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14, "heads": (32, 8)},
    "qwen2.5-0.5b": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "heads": (14, 2),
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-14b": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "heads": (40, 8),
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 49152


def build(
    shape: str,
    vocabulary: int = VOCABULARY,
    agreement: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """Return a model with random weights; the vocabulary is for shapes that have none."""
    size = {"vocab_size": vocabulary, **SHAPES[shape]}
    if agreement is not None:
        size["tie_word_embeddings"] = False
    heads, groups = size.pop("heads")
    config = AutoConfig.for_model(**size, num_attention_heads=heads, num_key_value_heads=groups)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if agreement is not None:
        follow(model, agreement)
    return model


@torch.no_grad()
def follow(model: Any, agreement: float) -> None:
    """Make the next token a function of the last one, which is the same for this share of tokens as at agreement 1."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    # Two vocabularies differ in their last tokens, if at all: these are left alone.
    half = model.config.vocab_size // 1024 * 512 or model.config.vocab_size // 2
    following = torch.arange(1, 2 * half + 1) % (2 * half)
    differs = (torch.rand(half, generator=torch.Generator().manual_seed(1)) >= agreement).repeat(2)
    following = torch.where(differs, following.roll(half), following).to(model.device)
    model.lm_head.weight[following] = model.model.embed_tokens.weight[: 2 * half]


def main() -> None:
    """Write the pair that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slm", choices=SHAPES)
    parser.add_argument("llm", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--agreement", type=float, help="share of tokens that both models choose alike, above 0")
    wanted = parser.parse_args()
    for name, agreement in (("slm", wanted.agreement and 1.0), ("llm", wanted.agreement)):
        model = build(getattr(wanted, name), wanted.vocabulary, agreement)
        model.save_pretrained(wanted.directory / name)
        print(f"{wanted.directory / name}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters")


if __name__ == "__main__":
    main()
