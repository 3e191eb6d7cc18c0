"""`quality`: the threshold and the veto that `calibrate` found for a part of the LLM's accuracy."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .routers import LLM_ALONE

COMMAND = "citer calibrate MODEL --data FILE --checker NAME --quality"


def as_quality(value: Any) -> float:
    """Return a quality as a number, after a check of its range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"quality: expected a part of the LLM's accuracy, above 0 and at most 1, got {value!r}.")
    return float(value)


def dials_of(model: Any, quality: Any) -> dict[str, float]:
    """Return threshold and veto for a quality: those of the lowest calibrated one that is not below it."""
    wanted, saved = as_quality(quality), model.config.calibration or {}
    if wanted == 1:
        # The LLM's own text needs no calibration.
        return {"router_threshold": LLM_ALONE, "llm_veto": 0.0}
    if not saved:
        raise ValueError(f"quality: this pair is not calibrated. Run `{COMMAND} {wanted:g} --write`.")
    for part, now in pair_of(model).items():
        made_for = saved["pair"][part]
        # By its name where it has one, whatever its precision; or else by its weights, where they are on this machine.
        key = "name" if made_for["name"] and now["name"] else "weights"
        if made_for[key] and now[key] and made_for[key] != now[key]:
            raise ValueError(
                f"quality: this pair was calibrated with another {part}: {made_for['name'] or 'one without a name'}. "
                f"Run `{COMMAND} {wanted:g} --write` for it as it is now."
            )
    reached = [one for one in saved["settings"] if one["quality"] >= wanted]
    if not reached:
        known = ", ".join(f"{one['quality']:g}" for one in saved["settings"])
        raise ValueError(
            f"quality: {wanted:g} is above what was calibrated: {known}. Run `{COMMAND} {wanted:g} --write`."
        )
    found = min(reached, key=lambda one: one["quality"])
    return {"router_threshold": found["router_threshold"], "llm_veto": found["llm_veto"]}


def with_setting(saved: dict[str, Any] | None, pair: dict[str, Any], setting: dict[str, float]) -> dict[str, Any]:
    """Return a calibration with one more setting; those of another pair are dropped."""
    others = saved["settings"] if saved and saved["pair"] == pair else []
    kept = [one for one in others if one["quality"] != setting["quality"]]
    return {"pair": pair, "settings": sorted([*kept, setting], key=lambda one: one["quality"])}


def pair_of(model: Any) -> dict[str, dict[str, str]]:
    """Return names and digests of both models and the router, by which they are known wherever they are loaded."""
    parts = {
        role: {
            "name": name_of(base),
            "weights": digest_of([base.get_input_embeddings(), base.get_output_embeddings()]),
        }
        for role, base in (("SLM", model.slm), ("LLM", model.llm))
    }
    kind = model.config.router["type"]
    return parts | {"router": {"name": "", "weights": f"{kind} {digest_of([model.router])}"}}


def name_of(base: Any) -> str:
    """Return the name of a base model without the place where it lies; "" within a router repository."""
    name = os.path.basename(str(base.name_or_path or "").rstrip("/"))
    return "" if name in ("slm", "llm") else name


def digest_of(modules: Iterable[nn.Module]) -> str:
    """Return a digest of some numbers of each weight; "" without any. Quantization leaves embeddings as they are."""
    digest, weights = hashlib.sha256(), [one for module in modules for one in module.parameters()]
    if not weights or any(one.device.type == "meta" for one in weights):
        return ""
    for weight in weights:
        digest.update(f"{tuple(weight.shape)} {sample_of(weight, 64)}".encode())
    return digest.hexdigest()[:16]


def sample_of(weight: torch.Tensor, count: int) -> list[float]:
    """Return about so many numbers of a weight, the same in whatever precision and place it is loaded."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(flat.numel() // count, 1)].to(torch.bfloat16).cpu().tolist()
