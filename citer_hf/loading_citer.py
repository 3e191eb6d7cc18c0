"""Loading: a pair from two models, a router repository from disk or the Hub."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

from .base_models_citer import (
    HUB_KEYWORDS,
    ROLES,
    base_config,
    check_keywords,
    check_same_tokenizer,
    check_unchanged,
    commit_of,
    hub_keywords,
    is_broken_transfer,
    load_models,
    locate_base_model,
    reference_to,
    shared_tokenizer,
    split_keywords,
)
from .configuration_citer import CiterConfig, check_threshold_value
from .pair_citer import load_tokenizer
from .paths_citer import check_folder
from .routing_citer import CUSTOM_ROUTER, ROUTERS, build_router

ROUTER_WEIGHTS = "model.safetensors"
# The router's own, which are never passed on to the base models.
REPOSITORY_KEYWORDS = ("revision", "subfolder", "variant", "trust_remote_code", "code_revision", "generation_config")


class CiterLoadingMixin:
    """`from_pair` and `from_pretrained` of `CiterForCausalLM`."""

    _tokenizer: Any = None
    _repository: tuple[str, dict[str, Any]] | None = None

    @classmethod
    def from_pair(
        cls,
        slm: str | os.PathLike[str] | PreTrainedModel,
        llm: str | os.PathLike[str] | PreTrainedModel,
        router: str | dict[str, Any] | os.PathLike[str] | nn.Module = "confidence",
        router_threshold: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make one model of a small and a large one.

        Args:
            slm: The small language model: repository id, path, or a loaded model.
            llm: The large language model, likewise. It must share the SLM's tokenizer.
            router: A kind (`mlp`, `linear`, `confidence`, `entropy`, `random`), a dictionary with a `type`, the path
                or repository id of a saved router, a file of CITER's or R2R's released code (`.pth`, `.pt`), or a
                module that maps (hidden, logits) to `p_slm`.
            router_threshold: The SLM writes a token when its score reaches this. Default: that of the saved router,
                otherwise 0.5.
            kwargs: For `from_pretrained` of both models; with the prefix `slm_` or `llm_` for one of them.
                `quantization_config` without a prefix is for the LLM alone.

        Raises:
            ValueError: when the models, the router, the threshold or a keyword do not fit.
            OSError: when a model cannot be loaded.
        """
        sources: dict[str, Any] = {"slm": slm, "llm": llm}
        keywords = split_keywords(kwargs)
        configs = {role: base_config(role, sources[role], keywords[role]) for role in ROLES}
        for role in ROLES:
            check_keywords(role, keywords[role], kwargs, configs[role])
        chosen = choose_router(router, router_threshold, {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs})
        needs_weights(chosen.spec, chosen.module, configs["slm"])
        tokenizer = shared_tokenizer(sources, keywords, configs)
        models = load_models(sources, keywords)
        config = CiterConfig(
            slm_config=models["slm"].config,
            llm_config=models["llm"].config,
            router=chosen.spec,
            router_threshold=chosen.threshold,
            slm_reference=reference_to(slm, keywords["slm"]),
            llm_reference=reference_to(llm, keywords["llm"]),
        )
        model: Any = cls(config, slm=models["slm"], llm=models["llm"], router=chosen.module)  # type: ignore[call-arg]
        if chosen.weights is not None:
            load_router_weights(model.router, chosen.weights, chosen.name)
        model._tokenizer = tokenizer
        return place(model.eval(), keywords)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a router repository and the two base models that it refers to or holds.

        Args:
            pretrained_model_name_or_path: Path or repository id of the router.
            model_args: As in transformers.
            config: A configuration to use instead of the repository's.
            kwargs: As for any transformers model, for both base models; with the prefix `slm_` or `llm_` for one of
                them, `slm_name_or_path` and `slm_revision` say where it is now. `quantization_config` without a
                prefix is for the LLM alone, `revision`, `subfolder` and `trust_remote_code` for the router alone.
                `router_threshold` replaces the saved one; `router` is an instance of a router class of one's own.

        Raises:
            OSError: when the router or a base model cannot be found or read.
            ValueError: when what is found does not fit together, or a keyword is unknown.
        """
        path = pretrained_model_name_or_path
        router = kwargs.pop("router", None)
        if not isinstance(config, CiterConfig) and type(config).__name__ != CiterConfig.__name__:
            config, kwargs = cls._load_config(config or path, kwargs)
        else:
            config = copy.deepcopy(config)
        assert isinstance(config, PreTrainedConfig)
        config.router_threshold = check_threshold_value(kwargs.pop("router_threshold", config.router_threshold))
        if isinstance(config.router, nn.Module):
            router, config.router = config.router, {"type": CUSTOM_ROUTER}
        if config.slm_reference is None and config.llm_reference is None:
            model = cls._load_whole(path, *model_args, config=config, router=router, **kwargs)
        else:
            model = cls._load_referred(str(path), config, router, kwargs)
        if path is not None:
            names = (*HUB_KEYWORDS, "revision", "subfolder", "trust_remote_code")
            hub = {key: kwargs[key] for key in names if key in kwargs}
            (model[0] if isinstance(model, tuple) else model)._repository = (str(path), hub)
        return model

    @classmethod
    def _load_config(cls, source: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
        dtype: dict[str, Any] = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        # The configuration takes these for its own file; the weights and the base models need them too.
        hub = {key: kwargs[key] for key in (*HUB_KEYWORDS, *REPOSITORY_KEYWORDS) if key in kwargs}
        try:
            config, kwargs = CiterConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
        except Exception as error:
            told = isinstance(error, OSError) and str(source) in str(error)
            if told or not (isinstance(error, OSError) or is_broken_transfer(error)):
                raise
            raise OSError(f"{source}: the configuration of the router could not be loaded: {error}") from error
        return config, {**kwargs, **dtype, **hub}

    @classmethod
    def _load_whole(cls, path: Any, *model_args: Any, config: Any, router: nn.Module | None, **kwargs: Any) -> Any:
        """Load a repository whose `model.safetensors` holds all three parts, as every transformers model loads."""
        own = sorted(key for key in kwargs if key.startswith(("slm_", "llm_")) or key == "quantization_config")
        if own:
            raise ValueError(
                f"{own[0]}: this repository holds the router and both models in one file, which load together. To "
                "load one of them with settings of its own, save the model with save_base_models=True first."
            )
        if router is not None:
            model_args = (None, None, router)
        if path is not None and os.path.isdir(path):
            check_folder(str(path))
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        # Who asks for the report of what was loaded is told there.
        asked = wants_info or kwargs.get("state_dict") is not None or kwargs.get("ignore_mismatched_sizes", False)
        if not asked:
            problems = [*info["missing_keys"], *info["unexpected_keys"]]
            refuse_wrong_tensors([key for key in problems if key.startswith("router.")], str(path))
        return (model, info) if wants_info else model

    @classmethod
    def _load_referred(cls, path: str, config: Any, router: nn.Module | None, kwargs: dict[str, Any]) -> Any:
        """Load a repository that holds the router and refers to its base models, or holds them in folders."""
        kwargs = dict(kwargs)
        repository = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
        repository |= {key: kwargs.pop(key) for key in REPOSITORY_KEYWORDS if key in kwargs}
        generation_config = repository.pop("generation_config", None)
        if config.name_or_path == path and not os.path.isdir(path):
            # A push while this loads must not mix two states of the repository.
            repository["revision"] = commit_of(path, repository) or repository.get("revision")
        wants_info = kwargs.pop("output_loading_info", False)
        for key in [key for key in kwargs if key.startswith("_") or key in ("adapter_kwargs", "state_dict")]:
            del kwargs[key]
        for key in ("attn_implementation", "experts_implementation"):
            if getattr(config, f"_{key}", None) is not None:
                kwargs.setdefault(key, getattr(config, f"_{key}"))

        keywords = split_keywords(kwargs)
        sources: dict[str, Any] = {}
        moved = [role for role in ROLES if keywords[role].get("name_or_path")]
        for role in ROLES:
            # Nobody is asked whether code of a model may run that the user has not chosen by name.
            keywords[role].setdefault("trust_remote_code", False)
            sources[role] = locate_base_model(
                role, path, getattr(config, f"{role}_reference"), keywords[role], repository
            )
        configs = {role: base_config(role, sources[role], keywords[role]) for role in ROLES}
        for role in ROLES:
            check_keywords(role, keywords[role], kwargs, configs[role])
            check_unchanged(role, sources[role], configs[role], getattr(config, f"{role}_config"))
        has_weights = needs_weights(config.router, router, configs["slm"])
        weights = router_state_dict(path, repository) if has_weights else None
        if weights is not None and router is None:
            check_router_weights(config.router, configs["slm"], weights, path)
        files = {key: repository[key] for key in (*HUB_KEYWORDS, "revision", "subfolder") if key in repository}
        for role in ROLES:
            if role not in moved and not may_have_changed(getattr(config, f"{role}_reference"), keywords[role]):
                continue
            found = load_tokenizer(sources[role], **hub_keywords(keywords[role]))
            saved = load_tokenizer(path, trust_remote_code=False, **files)
            check_same_tokenizer(role, sources[role], found, saved)
        models = load_models(sources, keywords)

        config.slm_config, config.llm_config = models["slm"].config, models["llm"].config
        model: Any = cls(config, slm=models["slm"], llm=models["llm"], router=router)  # type: ignore[call-arg]
        if weights is not None:
            load_router_weights(model.router, weights, path)
        model.generation_config = generation_config or saved_generation_config(path, files) or model.generation_config
        model.config.name_or_path = model.name_or_path = path
        model.eval()
        model = place(model, keywords)
        info: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, info | {"error_msgs": []}) if wants_info else model

    def load_tokenizer(self) -> Any:
        """Return the pair's shared tokenizer, or `None` when neither model came with one."""
        if self._tokenizer is None and self._repository is not None:
            path, hub = self._repository
            # Where nobody has said that code may run, nobody is asked.
            self._tokenizer = load_tokenizer(path, **{"trust_remote_code": False, **hub})
        return self._tokenizer

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # Named with its anchor: mixtures of experts have routers too.
        return {**super()._get_dtype_plan(dtype), r"^router\.": torch.float32}  # type: ignore[misc]


class ChosenRouter:
    """What the `router` argument of `from_pair` means.

    Args:
        spec: The configuration's `router` dictionary.
        threshold: The threshold to start with.
        module: The router itself, when an instance was given.
        weights: Its weights, when it was saved.
        name: Where from, for messages.
    """

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
    """Interpret the `router` argument of `from_pair`.

    Args:
        router: A kind, a dictionary, a path or repository id, a router file, or a module.
        threshold: The threshold that was given, if any.
        hub: Keywords for fetching files.

    Raises:
        ValueError: when it is none of these.
        OSError: when a saved router cannot be read.
    """
    start = check_threshold_value(0.5 if threshold is None else threshold)
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


def place(model: Any, keywords: dict[str, dict[str, Any]]) -> Any:
    """Put the router where the SLM's head is, and note the devices of both models under `hf_device_map`.

    Args:
        model: The pair.
        keywords: The keywords that its models were loaded with.
    """
    device = model.slm.get_output_embeddings().weight.device
    if device.type != "meta":
        model.router.to(device)
    maps = {role: getattr(getattr(model, role), "hf_device_map", None) for role in ROLES}
    if any(maps.values()) or any(keywords[role].get("device_map") is not None for role in ROLES):
        model.hf_device_map = {"router": device}
        for role, device_map in maps.items():
            for name, where in (device_map or {"": getattr(model, role).device}).items():
                model.hf_device_map[f"{role}.{name}".rstrip(".")] = where
    return model


def needs_weights(spec: dict[str, Any], module: nn.Module | None, slm_config: PreTrainedConfig) -> bool:
    """Say whether a router has weights, and refuse one that does not fit the SLM, before gigabytes are read.

    Args:
        spec: The configuration's `router` dictionary.
        module: The router itself, when an instance was given; it is taken at its word.
        slm_config: The SLM's configuration.

    Raises:
        ValueError: for an unknown kind or option, or a router made for another hidden size.
    """
    if module is None:
        with torch.device("meta"):
            module = build_router(spec, slm_config.get_text_config().hidden_size)
    return bool(module.state_dict())


def router_state_dict(path: str, repository: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the weights of a saved router.

    Args:
        path: Path or repository id.
        repository: Keywords for fetching files.

    Raises:
        OSError: when the file is missing or damaged.
    """
    hub = {key: repository[key] for key in (*HUB_KEYWORDS, "revision", "subfolder") if repository.get(key)}
    if os.path.isdir(path):
        check_folder(path)
    try:
        file = cached_file(path, ROUTER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub)
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
    """Refuse weights that do not fit, before memory is taken for a router as large as a configuration claims.

    Args:
        spec: The configuration's `router` dictionary.
        slm_config: The SLM's configuration.
        weights: The router's tensors.
        name: Where they are from.

    Raises:
        ValueError: which names a tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        router = build_router(spec, slm_config.get_text_config().hidden_size)
    refuse_misfits(router.state_dict(), weights, name)


def refuse_misfits(expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], name: str) -> None:
    """Refuse weights that do not fit a router.

    Args:
        expected: The router's own tensors.
        weights: Those of the file.
        name: Where they are from.

    Raises:
        ValueError: which names a tensor that is missing, unknown or of another shape.
    """
    refuse_wrong_tensors([f"router.{key}" for key in expected.keys() ^ weights.keys()], name)
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{name}: the tensor router.{key} has the shape {list(tensor.shape)}, but this router needs "
                f"{list(expected[key].shape)}. Was it trained with another SLM?"
            )


def may_have_changed(reference: dict[str, str], keywords: dict[str, Any]) -> bool:
    """Say whether a base model that is where the router says may be another one than when the router was saved.

    It may not in the router's own repository, nor at the commit that the router was saved with.

    Args:
        reference: What the router's configuration says.
        keywords: The keywords that the model is loaded with.
    """
    if not reference.get("name_or_path"):
        return False
    commit = reference.get("revision", "")
    return len(commit) != 40 or keywords.get("revision") != commit


def load_router_weights(router: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Put saved weights into a router, all of them and nothing else.

    Args:
        router: The router.
        weights: Its tensors.
        name: Where they are from.

    Raises:
        ValueError: which names a tensor that is missing, unknown or of another shape.
    """
    refuse_misfits(router.state_dict(), weights, name)
    router.load_state_dict(weights)


def refuse_wrong_tensors(names: list[str], path: str) -> None:
    """Refuse a weights file with missing or unknown router tensors.

    Args:
        names: The tensors that are in the file or in the router, but not in both.
        path: Where the file is from.

    Raises:
        ValueError: which names them.
    """
    if names:
        raise ValueError(
            f"{path}: its weights file does not fit its router: {sorted(names)} are missing or not known. Save the "
            "router again; nothing is initialised at random in their place."
        )


def saved_generation_config(path: str, hub: dict[str, Any]) -> GenerationConfig | None:
    """Return a repository's generation settings, or `None` when it has none.

    Args:
        path: Path or repository id.
        hub: Keywords for fetching files.
    """
    try:
        return GenerationConfig.from_pretrained(path, **hub)
    except OSError:
        return None
