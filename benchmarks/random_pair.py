"""Write a pair with random weights in the shapes of real models, for `citer bench --slm DIR/slm --llm DIR/llm`.

    python benchmarks/random_pair.py smollm2-135m llama-1b DIR

Speed does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "heads": (4, 2)},
    "mini": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "heads": (8, 4)},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": (9, 3)},
    "llama-300m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "heads": (16, 8)},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14, "heads": (32, 8)},
}


def write(shape: str, directory: Path, vocabulary: int) -> None:
    """Write one model.

    Args:
        shape: A key of `SHAPES`.
        directory: Where to.
        vocabulary: Rows of its table.
    """
    size = dict(SHAPES[shape])
    heads, groups = size.pop("heads")
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **size,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(directory)
    print(f"{directory}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters")


def main() -> None:
    """Write the pair that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slm", choices=SHAPES)
    parser.add_argument("llm", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocabulary", type=int, default=49152)
    wanted = parser.parse_args()
    for name in ("slm", "llm"):
        write(getattr(wanted, name), wanted.directory / name, wanted.vocabulary)


if __name__ == "__main__":
    main()
