"""The files of an adapter (PEFT) of a base model: where they are, and what they may say."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from torch import nn
from transformers.modeling_utils import load_state_dict
from transformers.utils import find_adapter_config_file, is_peft_available
from transformers.utils.hub import cached_file, extract_commit_hash

from .paths import REPOSITORY_ID, check_reference, leads_out
from .references import HUB_KEYWORDS, explained, file_keywords, folder_of_router

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(NamedTuple):
    """An adapter whose files are on this machine."""

    name: str
    folder: str
    config: dict[str, Any]
    reference: dict[str, str]


def fetch_adapter(role: str, name: str, hub: dict[str, Any]) -> Adapter:
    """Fetch an adapter's files, all of one commit."""
    if not is_peft_available():
        raise ImportError(f"{role}: the adapter {name} needs PEFT, which is not installed: pip install peft")
    file = cached_file(name, ADAPTER_CONFIG, **hub)
    commit = extract_commit_hash(file, None)
    fixed = {**hub, "revision": commit} if commit and not os.path.isdir(name) else hub
    weights = cached_file(name, ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **fixed)
    if weights is None:
        raise OSError(
            f"{name} has no {ADAPTER_WEIGHTS}; adapters are read from safetensors only. Save it again with "
            "save_pretrained."
        )
    with open(file, encoding="utf-8") as opened:
        config = json.load(opened)
    folder = os.path.dirname(file)
    check_adapter_config(role, name, config, weights)
    if os.path.isdir(name):
        return Adapter(name, folder, config, {"name_or_path": os.path.abspath(folder)})
    said = {"name_or_path": name, "revision": commit, "subfolder": hub.get("subfolder")}
    return Adapter(name, folder, config, {key: value for key, value in said.items() if value})


def check_adapter_config(role: str, name: str, config: dict[str, Any], weights: str) -> None:
    """Refuse an adapter that would read or import something else, or takes more memory than its file holds."""
    # The first loads other adapters by the paths that it names, the second imports a module by name.
    for setting in [key for key in ("adapters", "megatron_config") if config.get(key)]:
        raise ValueError(
            f"{role}: the adapter {name} has the setting {setting}, which leads out of it. It is not loaded; merge it "
            "into its model, and use that."
        )
    try:
        shapes = [tensor.shape for tensor in load_state_dict(weights, map_location="meta").values()]
    except Exception as error:
        raise OSError(f"{weights} cannot be read: {error}. Save the adapter again.") from error
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    largest = max((size for shape in shapes for size in shape), default=0)
    for rank in ranks:
        if isinstance(rank, int) and rank > largest:
            raise ValueError(
                f"{role}: the adapter {name} claims to have rank {rank}, but no tensor of it has more than "
                f"{largest} rows. Save it again."
            )


def named_base(role: str, adapter: Adapter) -> tuple[str, dict[str, Any]]:
    """Return the path or repository id of the model that an adapter is for, and its revision as a keyword."""
    if os.path.isdir(adapter.name) and os.path.isfile(os.path.join(adapter.folder, "config.json")):
        # A directory that holds the model, too; transformers loads the adapter in it along with the model.
        return adapter.folder, {}
    base = adapter.config.get("base_model_name_or_path") or ""
    allowed = isinstance(base, str) and base != ""
    if allowed and not os.path.isdir(adapter.name):
        allowed = REPOSITORY_ID.fullmatch(base) is not None and not leads_out(base) and not os.path.exists(base)
    if not allowed:
        raise ValueError(
            f"{role}: the adapter {adapter.name} says that it is for the model {base!r}, expected a repository id, or "
            f"the path of a model where the adapter is a directory, too. Name both: the model as {role}, and "
            f"{role}_adapter_name_or_path={adapter.name!r}."
        )
    revision = adapter.config.get("revision")
    return base, {"revision": revision} if revision else {}


def locate_adapter(
    role: str, path: str, reference: Any, hub: dict[str, Any], repository: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Say where the adapter of a saved router is, and with which keywords it is fetched."""
    check_reference(f"{role}_adapter", reference, path)
    if reference.get("name_or_path") is not None:
        fixed = {key: reference[key] for key in ("revision", "subfolder") if reference.get(key)}
        return reference["name_or_path"], {**hub, **fixed}
    place, there = folder_of_router(path, reference.get("subfolder", ""), repository)
    return place, {**hub, **there}


def split_off_adapter(role: str, source: Any, keywords: dict[str, Any]) -> tuple[Any, Adapter | None]:
    """Say which model and which adapter are meant, by name or by the path or id of an adapter alone."""
    name = keywords.pop("adapter_name_or_path", None)
    hub = file_keywords(keywords)
    if isinstance(source, nn.Module):
        if name is not None:
            raise ValueError(
                f"{role}_adapter_name_or_path: this model is loaded already. Call its load_adapter({name!r}) before."
            )
        return source, None
    with explained(role, source, keywords):
        is_adapter = not keywords.get("gguf_file") and find_adapter_config_file(source, **hub) is not None
    if name is None and not is_adapter:
        return source, None
    if name is not None:
        if is_adapter:
            raise ValueError(
                f"{role}, {role}_adapter_name_or_path: both name an adapter, {source} and {name}. Name the model that "
                f"{name} is for as {role}."
            )
        hub = {key: value for key, value in hub.items() if key in HUB_KEYWORDS}
        revision = keywords.pop("adapter_revision", None)
        return source, load_adapter_files(role, str(name), hub | ({"revision": revision} if revision else {}))
    adapter = load_adapter_files(role, os.fspath(source), hub)
    base, said = named_base(role, adapter)
    for key in ("revision", "subfolder"):
        keywords.pop(key, None)
    keywords.update(said)
    return base, adapter


def saved_adapter(
    role: str, path: str, reference: Any, base: str, keywords: dict[str, Any], repository: dict[str, Any]
) -> Adapter | None:
    """Return the adapter with which a router was saved, or that is named in its place."""
    named, revision = keywords.pop("adapter_name_or_path", None), keywords.pop("adapter_revision", None)
    hub = {key: keywords[key] for key in HUB_KEYWORDS if keywords.get(key)}
    name, adapter = named, None
    if name is None and reference is not None:
        name, hub = locate_adapter(role, path, reference, hub, repository)
    if name is not None:
        adapter = load_adapter_files(role, str(name), hub | ({"revision": revision} if revision else {}))
        if named is None and "name_or_path" not in reference:
            # It belongs to the router, and is saved with it again.
            adapter = adapter._replace(reference=reference)
    with explained(role, base, keywords):
        held = not keywords.get("gguf_file") and find_adapter_config_file(base, **file_keywords(keywords)) is not None
    if held and (adapter is None or os.path.realpath(adapter.folder) != os.path.realpath(base)):
        raise ValueError(
            f"{role}: {base} holds an adapter that this router was not saved with. It is not loaded; if you trust it, "
            f"pass {role}_name_or_path={base!r}."
        )
    return adapter


def load_adapter_files(role: str, name: str, hub: dict[str, Any]) -> Adapter:
    """Fetch an adapter's files; what fails says which adapter it was and what to do."""
    with explained(f"{role}_adapter", name, hub):
        return fetch_adapter(role, name, hub)
