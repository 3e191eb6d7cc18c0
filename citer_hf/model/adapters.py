"""Adapters (PEFT) in a loaded base model: putting them in, telling them apart from the model, saving them."""

from __future__ import annotations

import copy
import os
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import safe_save_file

from .adapter_files import ADAPTER_WEIGHTS, Adapter

# Where the configuration of a loaded adapter notes which files it is from.
ORIGIN = "citer_origin"


def unwrapped(role: str, model: Any) -> Any:
    """Return the transformers model in which PEFT has put an adapter; any other model as it is."""
    if not isinstance(model, nn.Module) or not is_of_peft(model) or not hasattr(model, "get_base_model"):
        return model
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"{role}: {config.peft_type.value} puts its adapter before the prompt, which a pair "
            "cannot do: expected an adapter in the layers of the model, such as LoRA."
        )
    return model.get_base_model()  # type: ignore[operator]


def attach_adapter(role: str, model: PreTrainedModel, adapter: Adapter) -> None:
    """Put an adapter into a model."""
    if not model._hf_peft_config_loaded:
        problem: Any = None
        # By PEFT's own functions: those of transformers 5.24 want a PEFT that is not published yet.
        peft = import_module("peft")
        try:
            config = peft.PeftConfig.from_pretrained(adapter.folder)
            config.inference_mode = True
            wrapped = peft.PeftModel(model, config, autocast_adapter_dtype=False)
            info = wrapped.load_adapter(adapter.folder, "default", autocast_adapter_dtype=False)
            wrong = {*not_loaded(wrapped, set(info.missing_keys)), *info.unexpected_keys}
            problem = f"{sorted(map(str, wrong))[:3]} are missing or not known" if wrong else None
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            problem = error
        if problem is not None:
            raise ValueError(
                f"{role}: the adapter {adapter.name} does not fit {type(model).__name__} from "
                f"{model.name_or_path}: {problem}. Was it made for another model, or does it need a newer "
                "transformers?"
            )
        # So that `set_adapter` and others of transformers find it.
        model._hf_peft_config_loaded = True
    setattr(model.peft_config["default"], ORIGIN, adapter.reference)


def not_loaded(model: nn.Module, missing: set[str]) -> list[str]:
    """Return the weights that a file should have had, without those that are one with a weight of it."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    return [name for name in missing if id(weights.get(name)) not in loaded]


def is_of_peft(module: nn.Module) -> bool:
    """Say whether a module is of PEFT, which need not be installed."""
    return type(module).__module__.partition(".")[0] == "peft"


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the outermost layers of PEFT in a model, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in found)
        if not is_inner and is_of_peft(module) and hasattr(module, "active_adapters"):
            found[name] = module
    return found


def active_adapter(role: str, model: Any) -> str | None:
    """Return the name of the adapter that a model runs with, or `None` when it runs without."""
    layers = adapter_layers(model).values()
    names = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(
            f"{role}: it runs with several adapters, {sorted(names)}, which cannot be saved as one. Choose one with "
            f"{role}.set_adapter(...), or merge them with add_weighted_adapter of PEFT."
        )
    name = str(names.pop())
    if name not in getattr(model, "peft_config", {}):
        raise ValueError(
            f"{role}: its adapter {name!r} was attached to the pair as a whole. Save it with save_pretrained of the "
            f"PEFT model, or attach it to the one model: get_peft_model(pair.{role}, ...)."
        )
    return name


def adapter_origin(model: Any, name: str) -> dict[str, str] | None:
    """Return the reference to the files that an adapter is from, or `None` when it may differ from them."""
    trainable = any(
        parameter.requires_grad for layer in adapter_layers(model).values() for parameter in layer.parameters()
    )
    origin: dict[str, str] | None = getattr(model.peft_config[name], ORIGIN, None)
    return None if trainable or origin is None or "name_or_path" not in origin else origin


def save_adapter(model: Any, name: str, folder: str, base: str | None) -> None:
    """Save an adapter of a model as PEFT does."""
    config = copy.copy(model.peft_config[name])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    weights = import_module("peft").get_peft_model_state_dict(model, adapter_name=name)
    weights = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
    safe_save_file(weights, os.path.join(folder, ADAPTER_WEIGHTS), metadata={"format": "pt"})


def without_adapter(role: str, model: Any) -> Any:
    """Return a model as it is without its adapters, which shares its weights."""
    layers = adapter_layers(model)
    if not layers:
        return model
    if any(getattr(layer, "merged", False) for layer in layers.values()):
        raise ValueError(f"{role}: an adapter is merged into its weights. Call unmerge_adapter() before saving.")
    kept: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        layer = next((name for name in layers if key.startswith(f"{name}.")), None)
        if layer is None:
            kept[key] = tensor
            continue
        # The layer itself lies in its wrapper, or one wrapper deeper.
        parts = key[len(layer) + 1 :].split(".")
        inside = [index for index, part in enumerate(parts) if part in ("base_layer", "original_module")]
        if inside:
            kept[".".join([layer, *parts[inside[0] + 1 :]])] = tensor
    with torch.device("meta"):
        bare = type(model)(model.config)
    bare.load_state_dict(kept, assign=True)
    bare.generation_config = model.generation_config
    return bare
