"""The two base models of a pair: where they are, loading them, and whether they fit together."""

import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging
from transformers.utils.hub import cached_file, convert_file_size_to_int, extract_commit_hash

from .compat import cache_name, is_broken_transfer
from .configuration import table_size
from .slots import SlotCache

logger = logging.get_logger(__name__)

ROLES = ("slm", "llm")
# Where a repository is and how it is fetched: these concern the files, not the model.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What a reference to a base model may hold, besides the reference to its adapter.
REFERENCE_KEYS = ("revision", "subfolder", "variant", "gguf_file")
REPOSITORY_ID = re.compile(r"[\w-][\w.-]*(/(?!\.\.?$)[\w.-]+)?")
# Attribute of a base model that was loaded by its name: the reference to it, and the size of its vocabulary table.
LOADED_FROM = "_citer_loaded_from"
PLAIN = ("F64", "F32", "F16", "BF16")
# What PEFT adds to the name of a weight that it wraps.
WRAPPERS = re.compile(r"\.(token_adapter|base_layer|original_module)(?=\.)")


def split_keywords(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Divide the keywords of a pair among its models."""
    for key, dtype in kwargs.items():
        if key.endswith("dtype") and isinstance(dtype, str) and dtype != "auto" and not hasattr(torch, dtype):
            raise ValueError(f"{key}: expected 'auto', or a dtype of torch such as 'bfloat16', got {dtype!r}.")
    shared = {key: value for key, value in kwargs.items() if key.partition("_")[0] not in ROLES}
    keywords = {}
    for role in ROLES:
        own = {key[4:]: value for key, value in kwargs.items() if key.startswith(f"{role}_")}
        keywords[role] = {**shared, **own}
        if role == "slm" and "quantization_config" not in own:
            keywords[role].pop("quantization_config", None)
    return keywords


def file_keywords(keywords: dict[str, Any], *more: str) -> dict[str, Any]:
    """Select what says where any file of a repository is."""
    names = (*HUB_KEYWORDS, "revision", "subfolder", *more)
    return {key: keywords[key] for key in names if keywords.get(key) is not None}


def hub_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """Select what says where a model's configuration and tokenizer are, and how they are loaded."""
    return file_keywords(keywords, "gguf_file", "trust_remote_code")


class NotAPairError(ValueError):
    """Raised for two models that share no vocabulary: the one's tokens mean nothing to the other."""


def base_config(role: str, source: Any, keywords: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a base model, without loading its weights."""
    if isinstance(source, nn.Module):
        check_model(role, source)
        config: PreTrainedConfig = source.config
        if keywords.get("quantization_config") is not None:
            raise ValueError(f"{role}: expected a name or path with quantization_config, got a loaded model.")
    else:
        if str(source).startswith(("http://", "https://")):
            raise ValueError(f"{role}: {source} is no model. For an LLM on a server, pass citer_hf.RemoteLM(address).")
        with explained(role, source, keywords):
            config = AutoConfig.from_pretrained(source, **hub_keywords(keywords))
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if is_encoder or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{role}: {type(config).__name__} is of a model with an encoder. Choose a decoder-only language model."
        )
    return config


def load_models(
    sources: dict[str, Any], keywords: dict[str, dict[str, Any]], references: dict[str, dict[str, Any] | None]
) -> dict[str, PreTrainedModel]:
    """Load the two base models, the SLM first, so that the LLM's device map is planned with what is left."""
    models: dict[str, PreTrainedModel] = {}
    for role in ROLES:
        source, own = sources[role], keywords[role]
        if role == "llm" and own.get("max_memory") is not None:
            own["max_memory"] = memory_left(own["max_memory"], models["slm"])
        if isinstance(source, nn.Module):
            models[role] = source
            continue
        # Where there is no adapter: `adapters.py` attaches it.
        elsewhere = {key: own[key] for key in ("cache_dir", "local_files_only") if own.get(key)}
        elsewhere["subfolder"] = "no-adapter"
        with explained(role, source, own):
            models[role] = AutoModelForCausalLM.from_pretrained(source, **own, adapter_kwargs=elsewhere)
        setattr(models[role], LOADED_FROM, (references[role], table_size(models[role].config)))
    return models


def memory_left(max_memory: dict[Any, Any], slm: PreTrainedModel) -> dict[Any, Any]:
    taken: dict[Any, int] = {}
    for parameter in slm.parameters():
        device: Any = parameter.device.index if parameter.device.type == "cuda" else parameter.device.type
        taken[device] = taken.get(device, 0) + parameter.numel() * parameter.element_size()
    sizes = {device: convert_file_size_to_int(size) for device, size in max_memory.items()}
    return {device: max(size - taken.get(device, 0), 0) for device, size in sizes.items()}


class explained(NamedTuple):  # noqa: N801 - reads as a statement: `with explained(...)`
    """Context in which an error of loading names the model and what to do."""

    role: str
    source: Any
    keywords: dict[str, Any]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        role, source, keywords = self
        if error is None:
            return
        if isinstance(error, ValueError) and "contains custom code" in str(error):
            raise ValueError(
                f"{role}: {source} brings code of its own. If you trust it, pass {role}_trust_remote_code=True."
            ) from error
        is_of_file = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
        if is_of_file or is_broken_transfer(error):
            title = {"router": "router", "slm": "SLM", "llm": "LLM"}.get(role, f"{role[:3].upper()}'s adapter")
            revision = f" at revision {keywords['revision']}" if keywords.get("revision") else ""
            moved = "" if role == "router" else f" If it has moved, pass {role}_name_or_path=..."
            raise OSError(
                f"{role}: the {title} could not be loaded from {source}{revision}: {error}\nIf a file is missing, "
                f"damaged or cut short, save it again, or download it anew with force_download=True.{moved}"
            ) from error
        if isinstance(error, TypeError | ValueError) and not str(error).startswith(role):
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{role}: {source}: {error}") from error


def name_of(source: Any) -> str:
    """Return the name or path of a base model, which may be loaded."""
    return str(source.name_or_path or "") if isinstance(source, nn.Module) else os.fspath(source)


def reference_to(source: Any, keywords: dict[str, Any]) -> dict[str, Any] | None:
    """Return a reference to a base model, or `None` when the model has never been on disk."""
    name = name_of(source)
    reference = {"name_or_path": name}
    if os.path.isdir(name):
        reference["name_or_path"] = os.path.abspath(name)
    elif not isinstance(source, nn.Module):
        reference["revision"] = commit_of(name, keywords) or keywords.get("revision", "")
    elif REPOSITORY_ID.fullmatch(name):
        # transformers 5.24 does not note the commit: what lies in the cache is compared when the pair is saved.
        found = getattr(source.config, "_commit_hash", None)
        reference["revision"] = found or commit_of(name, {"cache_dir": keywords.get("cache_dir")}) or ""
    else:
        return None
    reference |= {key: keywords[key] for key in REFERENCE_KEYS[1:] if keywords.get(key)}
    return {key: value for key, value in reference.items() if value}


def cached_path(name: str, file: str, keywords: dict[str, Any]) -> str | None:
    """Return the path of a file of a directory or repository if the file is on this machine."""
    hub = {key: keywords[key] for key in ("cache_dir", "revision", "token", "subfolder") if keywords.get(key)}
    found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else str(found)


def commit_of(name: str, keywords: dict[str, Any]) -> str | None:
    """Return the commit that a repository's revision stands for, from the local cache."""
    return extract_commit_hash(cached_path(name, keywords.get("gguf_file") or "config.json", keywords), None)


def commits_of(sources: dict[str, Any], keywords: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    return {
        role: getattr(source.config, "_commit_hash", None)
        if isinstance(source, nn.Module)
        else commit_of(os.fspath(source), keywords[role])
        for role, source in sources.items()
    }


def bare_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names that they have without adapters."""
    return {WRAPPERS.sub("", key): tensor for key, tensor in model.state_dict().items()}


def difference(model: PreTrainedModel, reference: dict[str, Any], keywords: dict[str, Any]) -> str | None:
    """Return how a base model differs from what a reference leads to, or `None` where both are the same.

    One line of every tensor is compared, so that hardly anything is read.
    """
    tensors = bare_state(model).items()
    state = {key: one for key, one in tensors if type(one.data) is torch.Tensor and not one.is_meta}
    compared = False
    for file in weights_files(reference["name_or_path"], {**keywords, **reference}):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dictionary
                tensor = state.get(key, state.get(f"{model.base_model_prefix}.{key}"))
                stored = opened.get_slice(key)
                if tensor is None or not tensor.is_floating_point() or stored.get_dtype() not in PLAIN:
                    continue
                if list(tensor.shape) != list(stored.get_shape()):
                    return f"{key} is {list(tensor.shape)} now and {stored.get_shape()} there"
                middle = slice(len(tensor) // 2, len(tensor) // 2 + 1) if tensor.dim() > 1 else slice(None)
                if tensor.dim() > 0 and not torch.equal(stored[middle].to(tensor.dtype), tensor[middle].cpu()):
                    return f"{key} has other values"
                compared = True
    # A model without weights (`citer convert`), with weights that are offloaded, or loaded here from another format.
    if compared or not state or getattr(model, LOADED_FROM, None) == (reference, table_size(model.config)):
        return None
    return "it cannot be compared with what is there"


def weights_files(name: str, keywords: dict[str, Any]) -> list[str]:
    """Return the safetensors files of a directory or repository that are on this machine."""
    variant = f".{keywords['variant']}" if keywords.get("variant") else ""
    folder = os.path.dirname(cached_path(name, "config.json", keywords) or "")
    return [
        os.path.join(folder, file)
        for file in (sorted(os.listdir(folder)) if folder else [])
        if variant in file and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.replace(variant, "", 1))
    ]


def leads_out(name: str) -> bool:
    """Return True if a relative path could lead out of the directory that it is meant for."""
    return any(
        path.is_absolute() or bool(path.drive) or bool(path.root) or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def check_reference(role: str, reference: Any, router_path: str) -> None:
    """Raise an error for a reference that leads anywhere else than where a router may point."""
    values = [value for key, value in reference.items() if key != "adapter"] if isinstance(reference, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"{role}_reference: expected a dictionary of texts, got {reference!r}. Save the router again."
        )
    name, expected = reference.get("name_or_path"), ""
    if any(leads_out(reference.get(key, "")) for key in REFERENCE_KEYS):
        expected = "names in the repository"
    elif name is not None and os.path.isdir(router_path):
        expected = "" if os.path.isabs(name) or not leads_out(name) else "a repository id or an absolute path"
    elif name is not None and (REPOSITORY_ID.fullmatch(name) is None or os.path.exists(name)):
        expected = "the id of a repository on the Hub, and no directory of this machine"
    if expected:
        raise ValueError(
            f"{role}_reference: the router's configuration says {reference}, expected {expected}. It is not followed. "
            f"If you trust that place, pass {role}_name_or_path=... yourself."
        )


def resolve(role: str, path: str, reference: Any, repository: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a reference of the router at `path` leads to, and the keywords for loading from there."""
    check_reference(role, reference, path)
    keywords = {key: reference[key] for key in REFERENCE_KEYS if reference.get(key)}
    if "name_or_path" in reference:
        return reference["name_or_path"], keywords
    # A folder of the router's own repository, wherever that is now.
    folder = os.path.join(repository.get("subfolder") or "", keywords.pop("subfolder", ""))
    if os.path.isdir(path):
        return os.path.join(path, folder), keywords
    revision = {"revision": repository["revision"]} if repository.get("revision") else {}
    return path, {**keywords, "subfolder": folder, **revision}


def check_model(role: str, model: Any) -> None:
    """Raise an error for anything but a causal language model of transformers."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{role}: expected a model id, a path or a transformers model, got {name}.")
    if model.config.is_encoder_decoder or not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"{role}: {name} is not a causal language model, such as AutoModelForCausalLM.from_pretrained gives."
        )


def check_pair(slm: PreTrainedModel, llm: PreTrainedModel) -> None:
    for role, model in (("slm", slm), ("llm", llm)):
        check_model(role, model)
        layers = SlotCache(model.config)
        if role == "slm" and getattr(model, "is_remote", False):
            raise ValueError("slm: it is remote. Load the SLM here: the router sees its hidden states.")
        if cache_name(model) is None or (len(layers) and all(layers.is_linear)):
            raise ValueError(f"{role}: {type(model).__name__} keeps no keys and values in a `cache`; choose another.")


def check_unchanged(role: str, source: Any, found: PreTrainedConfig, saved: PreTrainedConfig) -> None:
    """Raise an error for a base model that is not the one a router was saved with."""
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        now, then = (getattr(config.get_text_config(), name, None) for config in (found, saved))
        if now != then:
            raise ValueError(not_the_model(role, source, f"{name} is {now}, but was {then}"))


def not_the_model(role: str, source: Any, reason: str) -> str:
    return (
        f"{role}: {source} is not the model that this router was made for: {reason}. Pass the right one with "
        f"{role}_name_or_path=... and {role}_revision=..."
    )


def load_tokenizer(source: str, adapter: Any = None, **kwargs: Any) -> Any:
    """Load the tokenizer of a repository, or of an adapter that brings one; `None` when there is none."""
    # Importing tokenizers takes as long as all of this package.
    from transformers import AutoTokenizer

    if adapter is not None and os.path.isfile(os.path.join(adapter.folder, "tokenizer_config.json")):
        source, kwargs = adapter.folder, {"trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(source, **kwargs) if source else None
    # What is raised for a repository without a tokenizer depends on what else it lacks.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def first_difference(one: Any, other: Any) -> tuple[int, str | None, str | None] | None:
    """Return the first id at which two tokenizers differ, and its tokens; one may have added tokens at its end."""
    tokens = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (one, other)]
    fewer, longer = (tokens[0], other) if len(tokens[0]) < len(tokens[1]) else (tokens[1], one)
    end = max(fewer, default=-1)
    compared = (tokens[0].keys() | tokens[1].keys()) - {i for i in longer.get_added_vocab().values() if i > end}
    first = min((i for i in compared if tokens[0].get(i) != tokens[1].get(i)), default=None)
    return None if first is None else (first, tokens[0].get(first), tokens[1].get(first))


def shared_tokenizer(
    sources: dict[str, Any], keywords: dict[str, dict[str, Any]], configs: dict[str, Any], adapters: dict[str, Any]
) -> Any:
    """Return the tokenizer that both models share, or `None` when neither comes with one."""
    found: dict[str, Any] = {}
    for role in ROLES:
        source = sources[role]
        name = name_of(source)
        found[role] = load_tokenizer(name, adapters[role], **hub_keywords(keywords[role]))
        if name and found[role] is None:
            logger.warning(f"{role}: no tokenizer could be loaded from {name}; the pair has the other model's.")
    slm, llm = found["slm"], found["llm"]
    different = None if slm is None or llm is None else first_difference(slm, llm)
    if different is not None:
        raise NotAPairError(
            f"slm, llm: their tokenizers differ, first at token id {different[0]}: it is {different[1]!r} for the SLM "
            f"and {different[2]!r} for the LLM. Choose two models of the same family."
        )
    # Ids that one of the tables lacks are never generated, so that nothing that the pair needs may be among them.
    smaller = min(ROLES, key=lambda role: table_size(configs[role]))
    size = table_size(configs[smaller])
    fitting = [one for one in (llm, slm) if one is not None and max(one.get_vocab().values(), default=-1) < size]
    for one in (llm, slm):
        if one is None or one in fitting:
            continue
        beyond = [token for token, index in one.get_vocab().items() if index >= size]
        if not fitting or any(token == one.eos_token or token in str(one.chat_template) for token in beyond):
            raise NotAPairError(
                f"{smaller}: its vocabulary table has {size} rows, too few for the tokenizer, whose largest token id "
                f"is {max(one.get_vocab().values())}. Resize the model's token embeddings."
            )
    return fitting[0] if fitting else None
