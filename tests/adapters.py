"""Tiny models with random adapters of PEFT, in directories."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from citer_hf import CiterForCausalLM
from tests.repositories import save_base_models

peft = pytest.importorskip("peft")
# PEFT asks transformers by an attribute's old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# transformers 5.24 wants PEFT 0.22 for functions of its own, before there is one.
TRANSFORMERS_LOADS = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="this transformers refuses this PEFT"
)
ROLES = ("slm", "llm")
LAYERS = ["q_proj", "v_proj", "down_proj"]


def with_adapter(base: Path | Any, seed: int = 0, **options: Any) -> Any:
    """A model with a random adapter that changes its text."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, Path) else base
    options = {"target_modules": LAYERS, "init_lora_weights": False, "r": 4, **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, **options)).eval()


def save_models_with_adapters(folder: Path) -> Path:
    """Save two models, and an adapter for each."""
    save_base_models(folder)
    for seed, role in enumerate(ROLES):
        with_adapter(folder / role, seed).save_pretrained(folder / f"{role}-lora")
    return folder


def pair_with(home: Path, slm: Any = None, **options: Any) -> CiterForCausalLM:
    """A pair of the adapted SLM and the LLM."""
    torch.manual_seed(7)
    slm = home / "slm-lora" if slm is None else slm
    return CiterForCausalLM.from_pair(slm, home / "llm", router="linear", **options)
