"""The `router` argument of `from_pair`, and the weights of saved routers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

from .compat import is_broken_transfer
from .configuration import CiterConfig
from .paths import check_folder
from .references import file_keywords
from .routers import CUSTOM_ROUTER, ROUTERS, as_threshold, build_router

ROUTER_WEIGHTS = "model.safetensors"


class ChosenRouter:
    """What the `router` argument of `from_pair` means."""

    def __init__(
        self,
        spec: dict[str, Any],
        threshold: float,
        module: nn.Module | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        name: str = "",
    ):
        self.spec, self.threshold, self.module, self.weights, self.name = spec, threshold, module, weights, name


# Reads a router file of other people's code, given the threshold if any. `citer_hf` puts its importers here; they do
# not travel with a router.
read_router_file: Callable[[str, float | None], ChosenRouter] | None = None
ROUTER_FILES = (".pt", ".pth")


def choose_router(router: Any, threshold: float | None, hub: dict[str, Any]) -> ChosenRouter:
    """Interpret the `router` argument of `from_pair`."""
    start = as_threshold(0.5 if threshold is None else threshold)
    if isinstance(router, nn.Module):
        return ChosenRouter({"type": CUSTOM_ROUTER}, start, module=router)
    if isinstance(router, dict):
        return ChosenRouter(dict(router), start)
    name = os.fspath(router)
    if name in ROUTERS:
        return ChosenRouter({"type": name}, start)
    if os.path.isfile(name) or (name.endswith(ROUTER_FILES) and not os.path.isdir(name)):
        if read_router_file is None:
            raise ValueError(f"router: reading {name} takes the whole package: pip install citer-hf, import citer_hf.")
        return read_router_file(name, threshold)
    if not os.path.isdir(name) and "/" not in name:
        raise ValueError(
            f"router: expected one of {sorted(ROUTERS)}, the path or repository id of a saved router, or a "
            f"torch.nn.Module, got {router!r}."
        )
    saved = CiterConfig.from_pretrained(name, **hub)
    weights = router_state_dict(name, hub) if needs_weights(saved.router, None, saved.slm_config) else None
    if weights is not None:
        check_router_weights(saved.router, saved.slm_config, weights, name)
    spec = {"hidden_size": saved.slm_config.get_text_config().hidden_size, **saved.router}
    return ChosenRouter(spec, start if threshold is not None else saved.router_threshold, weights=weights, name=name)


def needs_weights(spec: dict[str, Any], module: nn.Module | None, slm_config: PreTrainedConfig) -> bool:
    """Say whether a router has weights, and refuse one that does not fit the SLM, before gigabytes are read."""
    if module is None:
        with torch.device("meta"):
            module = build_router(spec, slm_config.get_text_config().hidden_size)
    return bool(module.state_dict())


def router_state_dict(path: str, repository: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the weights of a saved router."""
    if os.path.isdir(path):
        check_folder(path)
    try:
        file = cached_file(
            path, ROUTER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **file_keywords(repository)
        )
    except Exception as error:
        if not is_broken_transfer(error):
            raise
        raise OSError(
            f"{path}: the download of {ROUTER_WEIGHTS} broke off: {error}. Load the router again."
        ) from error
    if file is None:
        raise OSError(
            f"{path} has no {ROUTER_WEIGHTS}: the weights of its router are missing. Save the router again, or "
            "download the repository anew with force_download=True."
        )
    try:
        tensors = load_state_dict(file)
    except Exception as error:
        raise OSError(
            f"{file} cannot be read: {error}. The file is damaged or cut short; save the router again, or download "
            "the repository anew with force_download=True."
        ) from error
    return {key.removeprefix("router."): value for key, value in tensors.items() if key.startswith("router.")}


def check_router_weights(
    spec: dict[str, Any], slm_config: PreTrainedConfig, weights: dict[str, torch.Tensor], name: str
) -> None:
    """Refuse weights that do not fit, before memory is taken for a router as large as a configuration claims."""
    with torch.device("meta"):
        router = build_router(spec, slm_config.get_text_config().hidden_size)
    refuse_misfits(router.state_dict(), weights, name)


def refuse_misfits(expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], name: str) -> None:
    """Refuse weights that do not fit a router."""
    refuse_wrong_tensors([f"router.{key}" for key in expected.keys() ^ weights.keys()], name)
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{name}: the tensor router.{key} has the shape {list(tensor.shape)}, but this router needs "
                f"{list(expected[key].shape)}. Was it trained with another SLM?"
            )


def load_router_weights(router: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Put saved weights into a router, all of them and nothing else."""
    refuse_misfits(router.state_dict(), weights, name)
    router.load_state_dict(weights)


def refuse_wrong_tensors(names: list[str], path: str) -> None:
    """Refuse a weights file with missing or unknown router tensors."""
    if names:
        raise ValueError(
            f"{path}: its weights file does not fit its router: {sorted(names)} are missing or not known. Save the "
            "router again; nothing is initialised at random in their place."
        )
