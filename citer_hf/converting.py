"""From a router file of other people's code to a router repository, without loading the base models."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import citer_hf

from .model.loading import saved_generation_config
from .model.modeling import CiterForCausalLM
from .model.references import ROLES, base_config, reference_to
from .runs import atomic_write

__all__ = ["PROVENANCE", "convert"]

PROVENANCE = "provenance.json"


def convert(
    file: str | os.PathLike[str],
    slm: str | os.PathLike[str],
    llm: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    router_threshold: float | None = None,
    trust_remote_code: bool = False,
) -> CiterForCausalLM:
    """Write a router repository for a router of CITER's or R2R's released code, with where it came from beside it.

    Of the base models only the configurations and the tokenizers are read.

    Args:
        file: The router, `.pth` or `.pt`.
        slm: The SLM that it was trained with: path or repository id.
        llm: The LLM, likewise.
        out: Directory of the repository, which does not exist yet or is empty.
        router_threshold: The SLM writes a token when its score reaches this. Default: R2R's own, 0.5 for CITER's.
        trust_remote_code: Whether to run code that the base models' repositories bring.

    Returns:
        The pair, whose base models have no weights.

    Raises:
        ValueError: when the file is no such router, or does not fit the SLM, or the models are no pair.
        OSError: when the file or a model cannot be read, or the directory cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} exists already; choose another directory or remove it first.")
    sources = {"slm": slm, "llm": llm}
    keywords: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    configs = {role: base_config(role, sources[role], keywords) for role in ROLES}
    with torch.device("meta"):
        models = {role: AutoModelForCausalLM.from_config(configs[role], **keywords) for role in ROLES}
    model: CiterForCausalLM = CiterForCausalLM.from_pair(
        models["slm"], models["llm"], router=file, router_threshold=router_threshold, **keywords
    )
    for role in ROLES:
        setattr(model.config, f"{role}_reference", reference_to(sources[role], keywords))
    model.generation_config = saved_generation_config(os.fspath(llm), {}) or model.generation_config
    model.save_pretrained(out)
    with atomic_write(out / PROVENANCE) as record:
        record.write((json.dumps(provenance(model, Path(file)), indent=2) + "\n").encode())
    return model


def provenance(model: CiterForCausalLM, file: Path) -> dict[str, Any]:
    """Return what is known about a converted router."""
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "converted_from": {"file": file.name, "sha256": sha256},
        "router": model.config.router,
        "router_threshold": model.config.router_threshold,
        "versions": {
            "citer_hf": citer_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
