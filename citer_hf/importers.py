"""Routers that exist already: files of the released code of CITER (`.pth`) and of R2R (`.pt`)."""

import hashlib
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from .model.configuration import router_width
from .model.loading import end_at_union
from .model.modeling import CiterForCausalLM
from .model.references import ROLES, base_config, reference_to
from .model.routers import build_router
from .runs import provenance, write_json

# Parts of the tensors' names in the files and here, to be replaced in this order.
CITER_NAMES = {"mlp.0.": "expand.", "mlp.1.": "norm.", "mlp.4.": "contract.", "linear.": "score."}
R2R_NAMES = {
    "backbone.output_layer.0.": "norm.",
    "backbone.output_layer.1.": "score.",
    "backbone.": "",
    ".layer_norm.": ".norm.",
    ".mlp.0.": ".expand.",
    ".mlp.3.": ".contract.",
    ".dim_change.": ".skip.",
}


def convert(
    file: str | os.PathLike[str],
    slm: str | os.PathLike[str],
    llm: str | os.PathLike[str],
    out: str | os.PathLike[str],
    router_threshold: float | None = None,
) -> CiterForCausalLM:
    """Write a router repository for a router of the released code of CITER or R2R, with its provenance beside it.

    Of the base models only the configurations and the tokenizers are read.

    Args:
        file: The router, `.pth` or `.pt`.
        slm: The SLM that the router was trained with: path or repository id.
        llm: The LLM, likewise.
        out: Directory of the repository, which does not exist yet or is empty.
        router_threshold: The threshold to start with. Default: that of the file, or 0.5.

    Returns:
        The pair, whose base models have no weights.

    Raises:
        ValueError: when the file is no such router, or does not fit the SLM, or the models are no pair.
        OSError: when the file or a model cannot be read, or the directory cannot be written.
    """
    file, out = Path(file), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} exists already; choose another directory or remove it first.")
    if not file.is_file():
        raise FileNotFoundError(f"router: there is no file {file}.")
    spec, weights, threshold = read_router(file)
    threshold = threshold if router_threshold is None else router_threshold
    sources = {"slm": slm, "llm": llm}
    configs = {role: base_config(role, sources[role], {}) for role in ROLES}
    with torch.device("meta"):
        models = {role: AutoModelForCausalLM.from_config(configs[role]) for role in ROLES}
    router = build_router(spec, router_width(models["slm"].config))
    try:
        router.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"router: the tensors in {file} are not those of a released router. {error}") from error
    model = CiterForCausalLM.from_pair(**models, router=router, router_threshold=threshold)
    model.config.router = spec
    for role in ROLES:
        setattr(model.config, f"{role}_reference", reference_to(sources[role], {}))
    # An LLM without generation settings leaves the pair the default ones.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(os.fspath(llm))
    end_at_union(model)
    model.save_pretrained(out)
    origin = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    write_json(out / "provenance.json", {**provenance(model), "converted_from": origin})
    return model


def read_router(file: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Return a released router's configuration, weights and threshold in our terms; no code in the file is run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to code ({code[1]})" if code else "it is damaged, or was not written by torch.save"
        raise ValueError(f"router: {file} cannot be loaded with weights_only=True: {reason}.") from error
    try:
        if "state_dict" in content:
            weights = renamed(content["state_dict"], R2R_NAMES)
            given = (content.get("common_args") or {}).get("threshold")
            threshold = threshold_from_divergence(given) if isinstance(given, float | int) else 0.5
            return r2r_spec(weights), weights, threshold
        weights = renamed(content, CITER_NAMES)
        return {"type": "mlp", "hidden_size": weights["score.weight"].shape[1], "batch_norm": True}, weights, 0.5
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"router: the tensors in {file} are not those of a released router. {error!r}") from error


def renamed(tensors: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the tensors of a file by their names here."""
    found = {}
    for key, tensor in tensors.items():
        for there, here in names.items():
            key = str(key).replace(there, here)
        found[key] = tensor
    return found


def r2r_spec(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a router of R2R. All sizes come from the tensors."""
    hidden, top_logits = weights["logits_projection.weight"].shape
    combined = weights["combined_projection.weight"].shape[1]
    blocks = []
    for index in range(max(1, len({key.split(".")[1] for key in weights if key.startswith("blocks.")}))):
        inner, size = weights[f"blocks.{index}.expand.weight"].shape
        blocks.append([size, inner, weights[f"blocks.{index}.contract.weight"].shape[0]])
    sizes = {"hidden_size": hidden, "embedding_size": combined - 2 * hidden, "top_logits": top_logits}
    return {"type": "r2r", **sizes, "blocks": blocks}


def threshold_from_divergence(threshold: float) -> float:
    """Turn R2R's threshold into ours: a token goes to the LLM under the one where it does under the other."""
    one, given = torch.tensor(1.0), torch.tensor(threshold)
    boundary = torch.nextafter(one - given, 2 * one)
    # What is next to 0 may count as 0 on some devices.
    return 0.0 if given > 1 else float(boundary.clamp_min(torch.finfo(torch.float32).tiny))
