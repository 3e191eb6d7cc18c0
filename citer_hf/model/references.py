"""The two base models of a pair: their keywords, where they are, and loading them."""

from __future__ import annotations

import inspect
import os
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, convert_file_size_to_int, extract_commit_hash

from .compat import is_broken_transfer
from .memory import is_out_of_memory, not_loaded, weight_bytes_of
from .pair import check_config, check_model, check_table_sizes, check_tokenizers, load_tokenizer
from .paths import check_folder, check_reference

ROLES = ("slm", "llm")
# Where a repository is and how it is fetched: these concern the files, not the model.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
LOADING_KEYWORDS = frozenset(inspect.signature(PreTrainedModel.from_pretrained).parameters) | frozenset(
    [
        "allow_all_kernels",
        "attn_implementation",
        "code_revision",
        "device_map",
        "device_mesh",
        "distributed_config",
        "dtype",
        "experts_implementation",
        "generation_config",
        "gguf_file",
        "kernel_config",
        "key_mapping",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "output_loading_info",
        "proxies",
        "quantization_config",
        "state_dict",
        "subfolder",
        "torch_dtype",
        "tp_plan",
        "tp_size",
        "tqdm_class",
        "trust_remote_code",
        "use_kernels",
        "variant",
    ]
)


def split_keywords(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Divide the keywords of a pair among its models."""
    prefixes = tuple(f"{role}_" for role in ROLES)
    shared = {key: value for key, value in kwargs.items() if not key.startswith(prefixes)}
    quantization = {key: shared.pop(key) for key in ("quantization_config",) if key in shared}
    keywords = {"slm": dict(shared), "llm": {**shared, **quantization}}
    for key, value in kwargs.items():
        if key.startswith(prefixes):
            role, name = key.split("_", 1)
            keywords[role][name] = value
    return keywords


def check_keywords(role: str, keywords: dict[str, Any], given: dict[str, Any], config: PreTrainedConfig) -> None:
    """Refuse keywords that nothing reads."""
    for key in keywords:
        if key not in LOADING_KEYWORDS and not hasattr(config, key):
            written = f"{role}_{key}" if f"{role}_{key}" in given else key
            raise ValueError(
                f"{written}: neither a keyword of from_pretrained nor a setting of {type(config).__name__}. Check "
                "its spelling; the prefixes slm_ and llm_ address one of the two models."
            )


def hub_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """Select what says where a model's files are."""
    names = (*HUB_KEYWORDS, "revision", "subfolder", "gguf_file", "trust_remote_code")
    return {key: keywords[key] for key in names if key in keywords}


def file_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """Select what says where any file of a repository is."""
    return {key: keywords[key] for key in (*HUB_KEYWORDS, "revision", "subfolder") if keywords.get(key)}


def base_config(role: str, source: Any, keywords: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a base model, without loading its weights."""
    if isinstance(source, nn.Module):
        check_model(role, source)
        config: PreTrainedConfig = source.config
        if keywords.get("quantization_config") is not None:
            raise ValueError(
                f"{role}: this model is loaded already, so that quantization_config comes too late. Pass its name "
                "or path, or quantize it where you load it."
            )
    else:
        with explained(role, source, keywords):
            config = AutoConfig.from_pretrained(source, **hub_keywords(keywords))
    check_config(role, config)
    return config


def load_models(sources: dict[str, Any], keywords: dict[str, dict[str, Any]]) -> dict[str, PreTrainedModel]:
    """Load the two base models, the SLM first, so that the LLM's device map is planned with what is left."""
    models: dict[str, PreTrainedModel] = {}
    for role in ROLES:
        source, own = sources[role], keywords[role]
        if role == "llm" and own.get("max_memory") is not None:
            own["max_memory"] = memory_left(own["max_memory"], models["slm"])
        if isinstance(source, nn.Module):
            models[role] = source
        else:
            with explained(role, source, own):
                models[role] = AutoModelForCausalLM.from_pretrained(source, **own, **for_adapters(own))
    return models


def for_adapters(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return how an adapter beside a model is looked for: where files are, which transformers does not pass on."""
    files = {key: keywords[key] for key in ("cache_dir", "local_files_only") if keywords.get(key)}
    return {"adapter_kwargs": files} if files else {}


def memory_left(max_memory: dict[Any, Any], slm: PreTrainedModel) -> dict[Any, Any]:
    """Subtract what the SLM takes from a memory budget."""
    taken: dict[Any, int] = {}
    for parameter in slm.parameters():
        device: Any = parameter.device.index if parameter.device.type == "cuda" else parameter.device.type
        taken[device] = taken.get(device, 0) + parameter.numel() * parameter.element_size()
    sizes = {device: convert_file_size_to_int(size) for device, size in max_memory.items()}
    return {device: max(size - taken.get(device, 0), 0) for device, size in sizes.items()}


def reference_to(source: Any, keywords: dict[str, Any]) -> dict[str, Any] | None:
    """Say where a base model came from, or `None` when it has never been on disk."""
    name = str(source.name_or_path or "") if isinstance(source, nn.Module) else os.fspath(source)
    if os.path.isdir(name):
        reference = {"name_or_path": os.path.abspath(name)}
    elif name and (not isinstance(source, nn.Module) or (name.count("/") <= 1 and not os.path.isabs(name))):
        reference = {"name_or_path": name}
        commit = commit_of(name, keywords) if not isinstance(source, nn.Module) else None
        if commit or keywords.get("revision"):
            reference["revision"] = commit or keywords["revision"]
    else:
        return None
    return reference | {key: keywords[key] for key in ("subfolder", "gguf_file") if keywords.get(key)}


def commit_of(name: str, keywords: dict[str, Any]) -> str | None:
    """Return the commit that a repository's revision stands for, from the local cache."""
    hub = {key: keywords[key] for key in ("cache_dir", "revision", "token", "subfolder") if keywords.get(key)}
    file = keywords.get("gguf_file") or "config.json"
    found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False, **hub)
    return extract_commit_hash(found, None)


def commits_of(sources: dict[str, Any], keywords: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the commits of base models that were loaded from the Hub or its cache."""
    named = {role: os.fspath(source) for role, source in sources.items() if not isinstance(source, nn.Module)}
    found = {role: commit_of(name, keywords[role]) for role, name in named.items()}
    return {role: commit for role, commit in found.items() if commit}


def locate_base_model(
    role: str, path: str, reference: dict[str, Any] | None, keywords: dict[str, Any], repository: dict[str, Any]
) -> str:
    """Say where a base model of a saved router is, and complete the keywords it is loaded with."""
    if keywords.get("name_or_path"):
        return str(keywords.pop("name_or_path"))
    if reference is None:
        raise ValueError(
            f"{role}_reference: the configuration of {path} does not say where the {role.upper()} is. Pass "
            f"{role}_name_or_path=..."
        )
    check_reference(role, reference, path)
    for key in ("revision", "gguf_file"):
        if reference.get(key):
            keywords.setdefault(key, reference[key])
    name, folder = reference.get("name_or_path"), reference.get("subfolder", "")
    if name is not None:
        if folder:
            keywords.setdefault("subfolder", folder)
        return str(name)
    place, there = folder_of_router(path, folder, repository)
    keywords.update(there)
    return place


def folder_of_router(path: str, folder: str, repository: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Say where a folder of a router's own repository is, wherever that is now, and how its files are fetched."""
    folder = os.path.join(repository.get("subfolder", ""), folder)
    if os.path.isdir(path):
        check_folder(path, folder)
        return os.path.join(path, folder), {}
    revision = {"revision": repository["revision"]} if repository.get("revision") else {}
    return path, {"subfolder": folder, **revision}


def check_unchanged(role: str, source: Any, found: PreTrainedConfig, saved: PreTrainedConfig) -> None:
    """Refuse a base model that is not the one a router was saved with."""
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        now, then = (getattr(config.get_text_config(), name, None) for config in (found, saved))
        if now != then:
            raise ValueError(
                f"{role}: {source} is not the model that this router was made for: {name} is {now}, but was {then}. "
                f"Pass the right one with {role}_name_or_path=... and {role}_revision=..."
            )


def check_same_tokenizer(role: str, source: Any, found: Any, saved: Any) -> None:
    """Refuse a base model that numbers its tokens otherwise than the router's tokenizer."""
    if found is not None and saved is not None and found.get_vocab() != saved.get_vocab():
        raise ValueError(
            f"{role}: {source} is not the model that this router was made for: its tokenizer has changed. Pass the "
            f"right one with {role}_name_or_path=... and {role}_revision=..."
        )


def shared_tokenizer(
    sources: dict[str, Any], keywords: dict[str, dict[str, Any]], configs: dict[str, Any], adapters: dict[str, Any]
) -> Any:
    """Return the tokenizer that both models share, or `None` when neither comes with one."""
    tokenizers = {}
    for role in ROLES:
        source = sources[role]
        name = str(source.name_or_path or "") if isinstance(source, nn.Module) else os.fspath(source)
        tokenizers[role] = own_tokenizer(name, keywords[role], adapters[role])
    check_tokenizers(tokenizers["slm"], tokenizers["llm"])
    tokenizer = tokenizers["llm"] if tokenizers["llm"] is not None else tokenizers["slm"]
    check_table_sizes(tokenizer, configs["slm"], configs["llm"])
    return tokenizer


def own_tokenizer(source: str, keywords: dict[str, Any], adapter: Any) -> Any:
    """Return the tokenizer of one model, or `None` when it comes with none."""
    if adapter is not None and os.path.isfile(os.path.join(adapter.folder, "tokenizer_config.json")):
        return load_tokenizer(adapter.folder, trust_remote_code=False)
    return load_tokenizer(source, **hub_keywords(keywords)) if source else None


class explained:  # noqa: N801 - reads as a statement: `with explained(...)`
    """Context in which a base model's loading error says which model it was and what to do."""

    def __init__(self, role: str, source: Any, keywords: dict[str, Any]):
        self.role, self.source, self.keywords = role, source, keywords

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and "contains custom code" in str(error):
            raise ValueError(
                f"{self.role}: {self.source} brings code of its own. If you trust it, pass "
                f"{self.role}_trust_remote_code=True; trust_remote_code is for the router alone."
            ) from error
        if isinstance(error, Exception) and self.role in ROLES and is_out_of_memory(error):
            try:
                config = AutoConfig.from_pretrained(self.source, **hub_keywords(self.keywords))
                needed = weight_bytes_of(config, self.keywords)
            except Exception:
                # There may be no memory left for that either: then the error stays what it is.
                return
            raise not_loaded(error, self.role, self.source, needed) from error
        if error is None or not (
            isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or is_broken_transfer(error)
        ):
            return
        revision = f" at revision {self.keywords['revision']}" if self.keywords.get("revision") else ""
        title = self.role[:3].upper() + ("'s adapter" if self.role.endswith("_adapter") else "")
        raise OSError(
            f"{self.role}: the {title} could not be loaded from {self.source}{revision}: {error}\n"
            f"If it has moved, pass {self.role}_name_or_path=... (and {self.role}_revision=...); if a file is "
            "damaged, download it anew with force_download=True."
        ) from error


class FetchedWith(dict[str, Any]):
    """Keywords for fetching files, whose token stays in this process: it is neither shown nor pickled."""

    def __repr__(self) -> str:
        return repr(self._without_secret())

    def __reduce__(self) -> tuple[type[FetchedWith], tuple[dict[str, Any]]]:
        return FetchedWith, (self._without_secret(),)

    def __copy__(self) -> FetchedWith:
        return FetchedWith(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> FetchedWith:
        return FetchedWith(self)

    def _without_secret(self) -> dict[str, Any]:
        return {key: value for key, value in self.items() if key != "token"}
