"""Routers that exist already: files of the released code of CITER (`.pth`) and of R2R (`.pt`)."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from .model.loading import end_at_union
from .model.modeling import CiterForCausalLM
from .model.references import ROLES, base_config, reference_to
from .model.routers import as_threshold, build_router, hidden_size_of
from .runs import option, router_sha256, write_json

# What the modules of a router are called in the files.
CITER_NAMES = {"expand": "mlp.0", "norm": "mlp.1", "contract": "mlp.4", "score": "linear"}
R2R_NAMES = {
    "input_projection": "backbone.input_projection",
    "norm": "backbone.output_layer.0",
    "score": "backbone.output_layer.1",
}
R2R_BLOCK_NAMES = {"norm": "layer_norm", "expand": "mlp.0", "contract": "mlp.3", "skip": "dim_change"}


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `citer convert` and of `convert`."""

    router_threshold: float | None = option(
        None, "The threshold to start with. [default: R2R's own, 0.5 for CITER's]", metavar="X"
    )
    trust_remote_code: bool = option(False, "Run code that the models' repositories bring.")

    def __post_init__(self) -> None:
        if self.router_threshold is not None:
            as_threshold(self.router_threshold)


def convert(
    file: str | os.PathLike[str],
    slm: str | os.PathLike[str],
    llm: str | os.PathLike[str],
    out: str | os.PathLike[str],
    **options: Any,
) -> CiterForCausalLM:
    """Write a router repository for a router of the released code of CITER or R2R, with its provenance beside it.

    Of the base models only the configurations and the tokenizers are read.

    Args:
        file: The router, `.pth` or `.pt`.
        slm: The SLM that the router was trained with: path or repository id.
        llm: The LLM, likewise.
        out: Directory of the repository, which does not exist yet or is empty.
        options: The fields of `ConvertOptions`: `router_threshold`, `trust_remote_code`.

    Returns:
        The pair, whose base models have no weights.

    Raises:
        ValueError: when the file is no such router, or does not fit the SLM, or the models are no pair.
        OSError: when the file or a model cannot be read, or the directory cannot be written.
    """
    from . import __version__

    wanted, out = ConvertOptions(**options), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} exists already; choose another directory or remove it first.")
    router = read_router(file)
    sources = {"slm": slm, "llm": llm}
    keywords: dict[str, Any] = {"trust_remote_code": True} if wanted.trust_remote_code else {}
    configs = {role: base_config(role, sources[role], keywords) for role in ROLES}
    with torch.device("meta"):
        models = {role: AutoModelForCausalLM.from_config(configs[role], **keywords) for role in ROLES}
    threshold = router.threshold if wanted.router_threshold is None else wanted.router_threshold
    if threshold is None:
        raise ValueError(f"router: {file} holds no threshold. Pass router_threshold=..., which is one minus R2R's.")
    model = CiterForCausalLM.from_pair(models["slm"], models["llm"], router_threshold=threshold, **keywords)
    model.config.router, model.router = router.spec, router.build(hidden_size_of(models["slm"]))
    if hasattr(model.router, "bind"):
        model.router.bind(models["slm"])
    for role in ROLES:
        setattr(model.config, f"{role}_reference", reference_to(sources[role], keywords))
    # An LLM without generation settings leaves the pair the default ones.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(os.fspath(llm))
    end_at_union(model)
    model.save_pretrained(out)
    write_json(
        out / "provenance.json",
        {
            "router_sha256": router_sha256(model.router),
            "converted_from": {
                "file": Path(file).name,
                "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
            },
            "router": router.spec,
            "router_threshold": threshold,
            "versions": {
                "citer_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    )
    return model


@dataclass(frozen=True)
class ReleasedRouter:
    """A router of released code: its configuration here, its weights (fp32), and its threshold in our terms."""

    spec: dict[str, Any]
    weights: dict[str, torch.Tensor]
    threshold: float | None

    def build(self, hidden_size: int) -> nn.Module:
        """Return the router for an SLM of this hidden size."""
        router = build_router(self.spec, hidden_size)
        router.load_state_dict(self.weights)
        return router.eval()


def read_router(file: str | os.PathLike[str]) -> ReleasedRouter:
    """Read a router file of the released code of CITER or R2R; nothing in the file is executed."""
    content = load_tensors(Path(file))
    found = content if isinstance(content, dict) else {}
    if isinstance(found.get("state_dict"), dict):
        tensors, names = found["state_dict"], name_in_r2r
        spec, threshold = r2r_spec(tensors, file), r2r_threshold(found.get("common_args"))
    elif any(str(key).startswith(tuple(f"{name}." for name in CITER_NAMES.values())) for key in found):
        tensors, names, threshold = found, name_in_citer, 0.5
        hidden = matrix(tensors, "linear.weight", file)[1]
        spec = {"type": "mlp", "hidden_size": hidden, "batch_norm": True}
    else:
        held = ", ".join(map(str, list(found)[:8])) or type(content).__name__
        raise ValueError(
            f"router: {file} is neither a router of CITER's released code (a state_dict with mlp.0.weight, ..., "
            "linear.weight) nor one of R2R's (a dictionary with model_type, common_args and state_dict). The file "
            f"holds: {held}."
        )
    with torch.device("meta"):
        expected = build_router(spec, spec["hidden_size"]).state_dict()
    check_shapes({names(key): tensor for key, tensor in expected.items()}, tensors, file)
    return ReleasedRouter(spec, {key: plain(tensors[names(key)]) for key in expected}, threshold)


def load_tensors(file: Path) -> Any:
    """Load what `torch.save` wrote, without executing anything."""
    if not file.is_file():
        raise FileNotFoundError(f"router: there is no file {file}.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, LookupError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to code ({code[1]})" if code else "it is damaged, or was not written by torch.save"
        raise ValueError(
            f"router: {file} cannot be loaded with weights_only=True: {reason}. Save the router's state_dict alone, "
            "or download the file anew."
        ) from error


def check_shapes(expected: dict[str, torch.Tensor], found: dict[str, Any], file: Any) -> None:
    """Raise an error that names the tensors which are missing, unknown, or of another shape."""
    wrong = [
        f"{key} is {shown(found.get(key))}, expected {shown(expected.get(key))}"
        for key in sorted(expected.keys() | found.keys(), key=str)
        if shown(found.get(key)) != shown(expected.get(key))
    ]
    if wrong:
        raise ValueError(f"router: {file}: its tensors are not those of a released router: {'; '.join(wrong)}.")


def shown(value: Any) -> str:
    """Return the shape of a tensor, in words."""
    if isinstance(value, torch.Tensor):
        return f"{'' if value.is_floating_point() else 'integer '}{list(value.shape)}"
    return "missing" if value is None else type(value).__name__


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a router holds it: fp32, contiguous, without gradients."""
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()


def matrix(tensors: dict[str, Any], key: str, file: Any) -> tuple[int, int]:
    """Return the rows and columns of a matrix."""
    tensor = tensors.get(key)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        raise ValueError(f"router: {file}: {key} is {shown(tensor)}, expected a matrix.")
    return tensor.shape[0], tensor.shape[1]


def name_in_citer(key: str) -> str:
    """Return what a tensor is called in CITER's file."""
    module, _, name = key.rpartition(".")
    return f"{CITER_NAMES[module]}.{name}"


def name_in_r2r(key: str) -> str:
    """Return what a tensor is called in R2R's file."""
    module, _, name = key.rpartition(".")
    if module.startswith("blocks."):
        _, index, layer = module.split(".")
        return f"backbone.blocks.{index}.{R2R_BLOCK_NAMES[layer]}.{name}"
    return f"{R2R_NAMES.get(module, module)}.{name}"


def r2r_spec(tensors: dict[str, Any], file: Any) -> dict[str, Any]:
    """Return the configuration of a router of R2R. All sizes come from the tensors."""
    hidden, top_logits = matrix(tensors, "logits_projection.weight", file)
    _, combined = matrix(tensors, "combined_projection.weight", file)
    if combined <= 2 * hidden:
        raise ValueError(
            f"router: {file}: combined_projection.weight has {combined} columns, but with a hidden size of {hidden} "
            f"it needs more than {2 * hidden}: for the hidden state, the embedding of the SLM's token and the "
            "projected logits. R2R's other classes of routers are not known here."
        )
    blocks = []
    for index in range(max(1, len({key.split(".")[2] for key in tensors if key.startswith("backbone.blocks.")}))):
        inner, size = matrix(tensors, f"backbone.blocks.{index}.mlp.0.weight", file)
        blocks.append([size, inner, matrix(tensors, f"backbone.blocks.{index}.mlp.3.weight", file)[0]])
    sizes = {"hidden_size": hidden, "embedding_size": combined - 2 * hidden}
    return {"type": "r2r", **sizes, "top_logits": top_logits, "blocks": blocks}


def r2r_threshold(common_args: Any) -> float | None:
    """Return the threshold of an R2R file in our terms, or `None` where the file has none."""
    given = common_args.get("threshold") if isinstance(common_args, dict) else None
    if isinstance(given, bool) or not isinstance(given, int | float) or given != given:
        return None
    return threshold_from_divergence(given)


def threshold_from_divergence(threshold: float) -> float:
    """Turn R2R's threshold into ours: a token goes to the LLM under the one where it does under the other."""
    one, given = torch.tensor(1.0), torch.tensor(threshold)
    boundary = torch.nextafter(one - given, 2 * one)
    # What is next to 0 may count as 0 on some devices.
    return float(boundary.clamp_min(torch.finfo(torch.float32).tiny)) if given <= 1 else 0.0
