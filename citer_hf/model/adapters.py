"""Adapters (PEFT) of a base model: where their files are, putting them into a loaded model, saving them."""

import copy
import os
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import safe_save_file
from transformers.utils import find_adapter_config_file, is_peft_available
from transformers.utils.hub import cached_file, extract_commit_hash

from .references import HUB_KEYWORDS, REPOSITORY_ID, bare_state, explained, file_keywords, reference_to, resolve

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Where the configuration of a loaded adapter notes which files it is from.
ORIGIN = "citer_origin"


class Adapter(NamedTuple):
    """An adapter whose files are on this machine."""

    name: str
    folder: str
    reference: dict[str, str]


def fetch_adapter(role: str, name: str, hub: dict[str, Any]) -> Adapter:
    """Fetch an adapter's files, all of one commit."""
    if not is_peft_available():
        raise ImportError(f"{role}: the adapter {name} needs PEFT, which is not installed: pip install peft")
    with explained(f"{role}_adapter", name, hub):
        file = cached_file(name, ADAPTER_CONFIG, **hub)
        commit = extract_commit_hash(file, None)
        hub = {**hub, "revision": commit} if commit and not os.path.isdir(name) else hub
        if cached_file(name, ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub) is None:
            raise OSError(f"it has no {ADAPTER_WEIGHTS}; adapters are loaded from safetensors only")
    return Adapter(name, os.path.dirname(file), reference_to(name, hub) or {})


def has_adapter(role: str, source: str, keywords: dict[str, Any]) -> bool:
    """Return True if an adapter lies where a model is looked for."""
    with explained(role, source, keywords):
        found = None if keywords.get("gguf_file") else find_adapter_config_file(source, **file_keywords(keywords))
    return found is not None


def named_adapter(role: str, keywords: dict[str, Any]) -> Adapter | None:
    """Return the adapter that is named in the keywords, which are taken out."""
    name, revision = keywords.pop("adapter_name_or_path", None), keywords.pop("adapter_revision", None)
    hub = {key: keywords[key] for key in HUB_KEYWORDS if keywords.get(key)}
    hub |= {"revision": revision} if revision else {}
    return None if name is None else fetch_adapter(role, os.fspath(name), hub)


def split_off_adapter(role: str, source: Any, keywords: dict[str, Any]) -> tuple[Any, Adapter | None]:
    """Return which model and which adapter are meant, by name or by the path or id of an adapter alone."""
    name = keywords.get("adapter_name_or_path")
    if isinstance(source, nn.Module):
        if name is not None:
            raise ValueError(f"{role}_adapter_name_or_path: expected the name of a model with it, got a loaded model.")
        return source, None
    source = os.fspath(source)
    if not has_adapter(role, source, keywords):
        return source, named_adapter(role, keywords)
    if name is not None:
        raise ValueError(
            f"{role}, {role}_adapter_name_or_path: both name an adapter, {source} and {name}. Name one adapter."
        )
    adapter = fetch_adapter(role, source, file_keywords(keywords))
    for key in ("revision", "subfolder"):
        keywords.pop(key, None)
    is_local = os.path.isdir(source)
    if is_local and os.path.isfile(os.path.join(adapter.folder, "config.json")):
        # The directory holds the model, too.
        return adapter.folder, adapter
    config = import_module("peft").PeftConfig.from_pretrained(adapter.folder)
    base = str(config.base_model_name_or_path or "")
    if not base or not (is_local or (REPOSITORY_ID.fullmatch(base) and not os.path.exists(base))):
        raise ValueError(
            f"{role}: the adapter {source} says that it is for the model {base!r}, expected a repository id. Name the "
            f"model as {role}, and pass {role}_adapter_name_or_path={source!r}."
        )
    keywords.update({"revision": config.revision} if config.revision else {})
    return base, adapter


def saved_adapter(
    role: str, path: str, reference: Any, base: Any, keywords: dict[str, Any], repository: dict[str, Any]
) -> Adapter | None:
    """Return the adapter with which a router was saved, or that is named in its place."""
    if isinstance(base, nn.Module):
        # A remote LLM has its adapter on the server.
        return None
    adapter = named_adapter(role, keywords)
    if adapter is None and reference is not None:
        name, there = resolve(f"{role}_adapter", path, reference, repository)
        hub = {key: keywords[key] for key in HUB_KEYWORDS if keywords.get(key)}
        adapter = fetch_adapter(role, name, hub | there)
        if "name_or_path" not in reference:
            # An adapter in the router's own repository is saved with the router again.
            adapter = adapter._replace(reference=reference)
    held = has_adapter(role, base, keywords)
    if held and (adapter is None or os.path.realpath(adapter.folder) != os.path.realpath(base)):
        raise ValueError(
            f"{role}: {base} holds an adapter that this router was not saved with. It is not loaded; if you trust it, "
            f"pass {role}_name_or_path={base!r}."
        )
    return adapter


def unwrapped(role: str, model: Any) -> Any:
    """Return the transformers model in which PEFT has put an adapter; any other model as it is."""
    if not is_of_peft(model) or not hasattr(model, "get_base_model"):
        return model
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"{role}: expected an adapter in the layers of the model, such as LoRA, got {config.peft_type.value}."
        )
    return model.get_base_model()


def attach_adapter(role: str, model: PreTrainedModel, adapter: Adapter | None) -> None:
    if adapter is None:
        return
    if not model._hf_peft_config_loaded:
        # By PEFT's own functions: those of transformers 5.24 want a PEFT that is not published yet.
        peft = import_module("peft")
        try:
            config = peft.PeftConfig.from_pretrained(adapter.folder)
            config.inference_mode = True
            wrapped = peft.PeftModel(model, config, autocast_adapter_dtype=False)
            unknown = wrapped.load_adapter(adapter.folder, "default", autocast_adapter_dtype=False).unexpected_keys
            if unknown:
                raise ValueError(f"{unknown[:3]} are not known")
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{role}: the adapter {adapter.name} does not fit {model.name_or_path}: {error}"
            ) from error
        # So that `set_adapter` and others of transformers find it.
        model._hf_peft_config_loaded = True
    setattr(model.peft_config["default"], ORIGIN, adapter.reference)


def is_of_peft(module: Any) -> bool:
    """Return True for a module of PEFT, which need not be installed."""
    return type(module).__module__.partition(".")[0] == "peft"


def adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_of_peft(module) and hasattr(module, "active_adapters")]


def active_adapter(role: str, pair: Any) -> str | None:
    """Return the name of the adapter that a base model runs with, or `None` when it runs without."""
    model = getattr(pair, role)
    layers = adapter_layers(model)
    names = {str(name) for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    if getattr(pair, "peft_config", None) or not names <= getattr(model, "peft_config", {}).keys():
        raise ValueError(
            f"{role}: an adapter was attached to the pair as a whole. Save the PEFT model, or attach the adapter to "
            f"pair.{role}."
        )
    if len(names) > 1:
        raise ValueError(
            f"{role}: expected one active adapter, got {sorted(names)}. Choose one with {role}.set_adapter(...)."
        )
    return names.pop() if names else None


def adapter_origin(model: Any, name: str) -> dict[str, str] | None:
    """Return the reference to the files that an adapter is from, or `None` when it may differ from them."""
    trainable = any(one.requires_grad for layer in adapter_layers(model) for one in layer.parameters())
    origin: dict[str, str] | None = getattr(model.peft_config[name], ORIGIN, None)
    return None if trainable or origin is None or "name_or_path" not in origin else origin


def save_adapter(model: Any, name: str, folder: str, base: str | None) -> None:
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
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(f"{role}: an adapter is merged into its weights. Call unmerge_adapter() before saving.")
    state = bare_state(model)
    with torch.device("meta"):
        bare = type(model)(model.config)
    bare.load_state_dict({key: state[key] for key in bare.state_dict() if key in state}, assign=True)
    bare.generation_config = model.generation_config
    return bare
