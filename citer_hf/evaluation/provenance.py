"""Fingerprints of earlier versions; goes when training and hub use `runs`."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import citer_hf
from citer_hf import CiterForCausalLM
from citer_hf.model.references import commit_of
from citer_hf.runs import processor_name

from ..data.examples import Example

__all__ = [
    "anonymous",
    "base_model_fingerprint",
    "data_fingerprint",
    "describe_run",
    "fingerprint",
    "model_fingerprint",
    "module_fingerprint",
    "versions",
]

# Numbers of each weight that enter a base model's fingerprint: all would take minutes for a large model.
SAMPLE = 32
# Of the Hub; real ones are longer.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def fingerprint(value: Any) -> str:
    """Return the sha256 of something that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def data_fingerprint(examples: Sequence[Example], prompts: Sequence[Sequence[int]]) -> str:
    """Return the sha256 of the problems and of their prompts as the models read them."""
    return fingerprint([[asdict(example), list(prompt)] for example, prompt in zip(examples, prompts, strict=True)])


def module_fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a router: its class, its settings and all its weights."""
    digest = hashlib.sha256(f"{type(module).__module__}:{type(module).__qualname__}".encode())
    for name, part in module.named_modules():
        settings = {
            key: value
            for key, value in sorted(vars(part).items())
            if isinstance(value, int | float | str) and key != "training" and not key.startswith("_")
        }
        digest.update(f"{name} {type(part).__qualname__} {settings}".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: CiterForCausalLM) -> str:
    """Return the sha256 of both models, and of the precision that they are loaded in."""
    return fingerprint([[base_model_fingerprint(part), str(part.dtype)] for part in (model.slm, model.llm)])


def base_model_fingerprint(model: PreTrainedModel) -> str:
    """Return the sha256 of a base model's shapes and of a sample of each weight; its precision does not matter."""
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(flat.numel() // SAMPLE, 1)].to(torch.bfloat16)
            digest.update(str(sample.cpu().tolist()).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what numbers depend on."""
    return {
        "citer_hf": citer_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe_run(model: CiterForCausalLM) -> dict[str, Any]:
    """Return versions, machine, date, and what both models are."""
    device = model.slm.device
    on_cuda = device.type == "cuda"
    machine: dict[str, Any] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_cuda else processor_name(),
        "threads": torch.get_num_threads(),
    }
    return {
        "versions": versions(),
        "machine": machine,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": _reference(model, None if model._repository is None else commit_of(*model._repository)),
        "slm": _reference(model.slm, model._commits.get("slm")) | {"reference": anonymous(model.config.slm_reference)},
        "llm": _reference(model.llm, model._commits.get("llm")) | {"reference": anonymous(model.config.llm_reference)},
    }


def _reference(model: Any, commit: str | None) -> dict[str, Any]:
    return {
        "name": anonymous(model.name_or_path),
        "commit": commit,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
    }


def anonymous(value: Any) -> Any:
    """Return arguments as they may be published: of a path outside the current directory the last part, no tokens."""
    if isinstance(value, Mapping):
        return {str(key): anonymous(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [anonymous(one) for one in value]
    if isinstance(value, Path):
        return anonymous(str(value))
    if not isinstance(value, str):
        return value
    value = TOKEN.sub("hf_...", value)
    return Path(value).name if value.startswith("~") or Path(value).is_absolute() else value
