"""Write a pair with random weights in the shapes of real models, for `citer bench --slm DIR/slm --llm DIR/llm`.

    python docs/benchmarks/random_pair.py smollm2-135m llama-1b DIR

Speed does not depend on the values of weights.
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


def build(shape: str, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return a model with random weights; the vocabulary is for shapes that have none."""
    size = {"vocab_size": vocabulary, **SHAPES[shape]}
    heads, groups = size.pop("heads")
    config = AutoConfig.for_model(**size, num_attention_heads=heads, num_key_value_heads=groups)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def write(shape: str, directory: Path, vocabulary: int) -> None:
    """Write one model."""
    model = build(shape, vocabulary)
    model.save_pretrained(directory)
    print(f"{directory}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters")


def main() -> None:
    """Write the pair that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slm", choices=SHAPES)
    parser.add_argument("llm", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    wanted = parser.parse_args()
    for name in ("slm", "llm"):
        write(getattr(wanted, name), wanted.directory / name, wanted.vocabulary)


if __name__ == "__main__":
    main()
