"""Tiny base models and routers on disk, with a tokenizer of one word per token."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.families import VOCAB, tiny_model

TEXT = torch.arange(5, 17)[None]
# A process in which the package cannot be imported, and says so if anything tries.
WITHOUT_THE_PACKAGE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "citer_hf":
            raise ImportError("citer_hf is not installed here")

sys.meta_path.insert(0, Missing())
"""


def word_tokenizer(words: int = VOCAB, prefix: str = "w") -> PreTrainedTokenizerFast:
    """A tokenizer that knows w0, w1, ... and pads on the left."""
    inner = Tokenizer(models.WordLevel({f"{prefix}{index}": index for index in range(words)}, unk_token=f"{prefix}0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": f"{prefix}0", "pad_token": f"{prefix}0", "eos_token": f"{prefix}2"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def save_base_models(root: Path, small: int = 32, large: int = 64) -> None:
    """Save a small and a large Llama and their tokenizer in `slm` and `llm`."""
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [2, 5], "pad_token_id": 0}
    for name, seed, width in (("slm", 1, small), ("llm", 2, large)):
        shape = {"hidden_size": width, "intermediate_size": 2 * small, "head_dim": width // 4}
        model = tiny_model("llama", seed=seed, num_attention_heads=4, **shape)
        model.generation_config = GenerationConfig(**settings)
        model.save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)


def config_of(folder: Path) -> dict[str, Any]:
    """What the configuration in a directory says."""
    return json.loads((folder / "config.json").read_text())


def contents(folder: Path) -> dict[Path, bytes]:
    """What is in the files of a directory."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def change(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change settings in a file of JSON."""
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))


def logits(model: Any, threshold: float | None = None) -> torch.Tensor:
    """A model's logits of a fixed text."""
    options = {} if threshold is None else {"router_threshold": threshold}
    with torch.no_grad():
        return model(TEXT, **options).logits
