"""Routers that exist already: files of the released code of CITER (`.pth`) and of R2R (`.pt`)."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from typing import Any, BinaryIO

import torch

from .model.routers import as_threshold
from .model.saved_router import ChosenRouter

__all__ = ["MAX_BYTES", "read_router_file", "threshold_from_divergence"]

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

# Four times what the router of an SLM with 8192 hidden units takes.
MAX_BYTES = 4 << 30

# Modules of the files, and what they are called here.
CITER_MODULES = {"mlp.0": "expand", "mlp.1": "norm", "mlp.4": "contract", "linear": "score"}
R2R_MODULES = {"backbone.input_projection": "input_projection"} | {
    "backbone.output_layer.0": "norm",
    "backbone.output_layer.1": "score",
}
R2R_BLOCK = "backbone.blocks."
R2R_BLOCK_MODULES = {"layer_norm": "norm", "mlp.0": "expand", "mlp.3": "contract", "dim_change": "skip"}


def read_router_file(path: str | os.PathLike[str], threshold: float | None = None) -> ChosenRouter:
    """Read a router file of CITER's or R2R's released code; nothing in it is executed.

    Args:
        path: The file.
        threshold: The threshold to start with. Default: R2R's own, which is in the file; 0.5 for CITER's.

    Returns:
        The router's configuration, threshold and weights, fp32.

    Raises:
        ValueError: when it is neither, which says what was found in it; when it holds code, claims more than it holds,
            or a tensor of it is missing, unknown or of another shape.
        OSError: when it cannot be read: it is not there, cut short, damaged or far too large.
    """
    name = os.fspath(path)
    content = load_tensors(name)
    if is_named(content) and is_named(content.get("state_dict")):
        spec, weights = from_r2r(content["state_dict"], name)
        if threshold is None:
            threshold = threshold_from_divergence(r2r_threshold(content, name))
    elif is_named(content) and any(key.rpartition(".")[0] in CITER_MODULES for key in content):
        spec, weights = from_citer(content, name)
    else:
        raise ValueError(
            f"router: {name} is neither a router of CITER's released code (a state_dict with mlp.0.weight, ..., "
            "linear.weight) nor one of R2R's (a dictionary with model_type, common_args and state_dict). It holds "
            f"{described(content)}."
        )
    start = as_threshold(0.5 if threshold is None else threshold)
    return ChosenRouter(spec, start, weights=weights, name=name)


def is_named(content: Any) -> bool:
    """Say whether something is a dictionary of named things."""
    return isinstance(content, dict) and all(isinstance(key, str) for key in content)


def load_tensors(path: str) -> Any:
    """Load what `torch.save` wrote, without executing anything."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"router: there is no file {path}.")
    with open(path, "rb") as file:
        try:
            size = unpacked_size(file)
            if size <= MAX_BYTES:
                return torch.load(file, map_location="cpu", weights_only=True)
        # A file that is no archive of tensors may fail in any way.
        except Exception as error:
            code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if code is None:
                raise OSError(
                    f"router: {path} cannot be read ({type(error).__name__}): it is damaged, cut short, or was not "
                    "written by torch.save. Download it anew."
                ) from error
            raise ValueError(
                f"router: {path} holds more than tensors and plain values: it refers to {code[1]}. Loading that could "
                "run code of whoever made the file, so it is refused. Save the router's state_dict alone."
            ) from error
    raise OSError(
        f"router: {path} holds {size / 2**30:.1f} GiB, but no router is larger than {MAX_BYTES / 2**30:.0f} GiB. Is "
        "it a whole model?"
    )


def unpacked_size(file: BinaryIO) -> int:
    """Return how much a file holds, in bytes: the archives of `torch.save` may be compressed."""
    size = os.fstat(file.fileno()).st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    file.seek(0)
    return size


def described(content: Any) -> str:
    """Say what a file holds, in at most a few lines."""
    if isinstance(content, torch.Tensor):
        return f"one tensor {list(content.shape)}"
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if not content:
        return "an empty dictionary"
    shown = [
        f"{key} {list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__}"
        for key, value in list(content.items())[:8]
    ]
    more = f" and {len(content) - 8} more" if len(content) > 8 else ""
    return f"a dictionary with {', '.join(shown)}{more}"


def from_citer(tensors: Tensors, path: str) -> tuple[dict[str, Any], Tensors]:
    """Turn a router of CITER's released code into an `mlp` router."""
    _, hidden = matrix_size(tensors, "linear.weight", path)
    wide = (2 * hidden,)
    shapes: Shapes = {
        **linear_shapes("mlp.0", hidden, 2 * hidden),
        **{f"mlp.1.{name}": wide for name in ("weight", "bias", "running_mean", "running_var")},
        "mlp.1.num_batches_tracked": (),
        **linear_shapes("mlp.4", 2 * hidden, hidden),
        **linear_shapes("linear", hidden, 1),
    }
    check_tensors(tensors, shapes, path)
    weights = {renamed(key, CITER_MODULES): tensor for key, tensor in plain(tensors).items()}
    return {"type": "mlp", "hidden_size": hidden, "batch_norm": True}, weights


def from_r2r(tensors: Tensors, path: str) -> tuple[dict[str, Any], Tensors]:
    """Turn a router of R2R's released code into an `r2r` router. All sizes come from the tensors."""
    hidden, top_logits = matrix_size(tensors, "logits_projection.weight", path)
    first, combined = matrix_size(tensors, "combined_projection.weight", path)
    embedding = combined - 2 * hidden
    if embedding < 1:
        raise ValueError(
            f"router: {path}: combined_projection.weight has the shape {[first, combined]}, but with a hidden size of "
            f"{hidden} it needs more than {2 * hidden} columns: for the hidden state, the embedding of the SLM's "
            "token and the projected logits. R2R's other classes of routers are not known here."
        )
    blocks = r2r_blocks(tensors, path)
    shapes: Shapes = {
        **linear_shapes("logits_projection", top_logits, hidden),
        **linear_shapes("combined_projection", combined, first),
        **linear_shapes("backbone.input_projection", first, first),
        **norm_shapes("backbone.output_layer.0", blocks[-1][2]),
        **linear_shapes("backbone.output_layer.1", blocks[-1][2], 1),
    }
    size = first
    for index, (_, inner, out) in enumerate(blocks):
        block = f"{R2R_BLOCK}{index}"
        shapes |= norm_shapes(f"{block}.layer_norm", size)
        shapes |= linear_shapes(f"{block}.mlp.0", size, inner) | linear_shapes(f"{block}.mlp.3", inner, out)
        if out != size:
            shapes |= linear_shapes(f"{block}.dim_change", size, out)
        size = out
    check_tensors(tensors, shapes, path)
    spec = {"type": "r2r", "hidden_size": hidden, "embedding_size": embedding}
    weights = {r2r_renamed(key): tensor for key, tensor in plain(tensors).items()}
    return {**spec, "top_logits": top_logits, "blocks": blocks}, weights


def r2r_blocks(tensors: Tensors, path: str) -> list[list[int]]:
    """Return the widths (in, between, out) of every block."""
    count = len({key.split(".")[2] for key in tensors if key.startswith(R2R_BLOCK)})
    blocks = []
    for index in range(max(count, 1)):
        inner, size = matrix_size(tensors, f"{R2R_BLOCK}{index}.mlp.0.weight", path)
        out, _ = matrix_size(tensors, f"{R2R_BLOCK}{index}.mlp.3.weight", path)
        blocks.append([size, inner, out])
    return blocks


def r2r_threshold(content: dict[str, Any], path: str) -> float:
    """Return the threshold that an R2R file holds."""
    common = content.get("common_args")
    threshold = common.get("threshold") if isinstance(common, dict) else None
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:
        raise ValueError(
            f"router: {path}: common_args.threshold: expected a number, got {threshold!r}. Pass router_threshold=..., "
            "which is one minus R2R's."
        )
    return float(threshold)


def threshold_from_divergence(threshold: float) -> float:
    """Turn R2R's threshold into ours: a token goes to the LLM under the one where it does under the other."""
    one, given = torch.tensor(1.0), torch.tensor(threshold)
    boundary = torch.nextafter(one - given, 2 * one)
    # What is next to 0 may count as 0 on some devices.
    return float(boundary.clamp_min(torch.finfo(torch.float32).tiny)) if given <= 1 else 0.0


def matrix_size(tensors: Tensors, key: str, path: str) -> tuple[int, int]:
    """Return the rows and columns of a matrix."""
    tensor = tensors.get(key)
    if tensor is None:
        raise ValueError(f"router: {path}: the tensor {key} is missing. {HELD}{described(tensors)}.")
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(f"router: {path}: {key} is to be a matrix. {HELD}{described({key: tensor})}.")
    return tensor.shape[0], tensor.shape[1]


HELD = "The file holds "


def linear_shapes(module: str, size: int, out_size: int) -> Shapes:
    """Return the shapes of a linear layer's tensors."""
    return {f"{module}.weight": (out_size, size), f"{module}.bias": (out_size,)}


def norm_shapes(module: str, size: int) -> Shapes:
    """Return the shapes of a layer norm's tensors."""
    return {f"{module}.weight": (size,), f"{module}.bias": (size,)}


def check_tensors(tensors: Tensors, shapes: Shapes, path: str) -> None:
    """Refuse tensors that are missing, unknown, of another shape, not of numbers, or that claim more than they
    hold."""
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(map(str, tensors.keys() - shapes.keys()))
    if missing or unknown:
        raise ValueError(
            f"router: {path}: its tensors are not those of a released router: missing {missing}, unknown {unknown}."
        )
    for key, shape in shapes.items():
        tensor = tensors[key]
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            raise ValueError(
                f"router: {path}: {key} is to have the shape {list(shape)}. {HELD}{described({key: tensor})}."
            )
        held = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not held or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"router: {path}: {key} claims the shape {list(shape)}, but holds fewer numbers.")
        if not tensor.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise ValueError(f"router: {path}: {key} is to hold floating-point numbers, got {tensor.dtype}.")


def plain(tensors: Tensors) -> Tensors:
    """Return tensors as a router holds them: fp32, contiguous, without gradients."""
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        for key, tensor in tensors.items()
    }


def renamed(key: str, modules: dict[str, str]) -> str:
    """Return what a tensor of a file is called here."""
    module, _, name = key.rpartition(".")
    return f"{modules.get(module, module)}.{name}"


def r2r_renamed(key: str) -> str:
    """Return what a tensor of an R2R file is called here."""
    if not key.startswith(R2R_BLOCK):
        return renamed(key, R2R_MODULES)
    index, _, rest = key.removeprefix(R2R_BLOCK).partition(".")
    return f"blocks.{index}.{renamed(rest, R2R_BLOCK_MODULES)}"
