"""Loading: a pair from two models, a router repository from disk or the Hub."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .adapter_files import Adapter, saved_adapter, split_off_adapter
from .adapters import adapter_layers, attach_adapter, unwrapped
from .compat import is_broken_transfer
from .configuration import CiterConfig
from .pair import load_tokenizer
from .paths import check_folder
from .references import (
    HUB_KEYWORDS,
    ROLES,
    FetchedWith,
    base_config,
    check_keywords,
    check_same_tokenizer,
    check_unchanged,
    commit_of,
    commits_of,
    load_models,
    locate_base_model,
    own_tokenizer,
    reference_to,
    shared_tokenizer,
    split_keywords,
)
from .routers import CUSTOM_ROUTER, as_threshold
from .saved_router import (
    check_router_weights,
    choose_router,
    load_router_weights,
    needs_weights,
    refuse_wrong_tensors,
    router_state_dict,
)

# The router's own, which are never passed on to the base models.
REPOSITORY_KEYWORDS = ("revision", "subfolder", "variant", "trust_remote_code", "code_revision", "generation_config")


class CiterLoadingMixin:
    """`from_pair` and `from_pretrained` of `CiterForCausalLM`."""

    _tokenizer: Any = None
    _repository: tuple[str, dict[str, Any]] | None = None
    # Of the base models, as far as they are known: what was loaded may be another one than what is referred to.
    _commits: dict[str, str] = {}

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
                `quantization_config` without a prefix is for the LLM alone. `slm_adapter_name_or_path` and
                `slm_adapter_revision` name an adapter (PEFT) for the SLM.

        Raises:
            ValueError: when the models, the router, the threshold or a keyword do not fit.
            OSError: when a model cannot be loaded.
        """
        sources: dict[str, Any] = {role: unwrapped(role, model) for role, model in (("slm", slm), ("llm", llm))}
        keywords = split_keywords(kwargs)
        adapters: dict[str, Adapter | None] = {}
        for role in ROLES:
            sources[role], adapters[role] = split_off_adapter(role, sources[role], keywords[role])
        configs = {role: base_config(role, sources[role], keywords[role]) for role in ROLES}
        for role in ROLES:
            check_keywords(role, keywords[role], kwargs, configs[role])
        chosen = choose_router(router, router_threshold, {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs})
        needs_weights(chosen.spec, chosen.module, configs["slm"])
        tokenizer = shared_tokenizer(sources, keywords, configs, adapters)
        models = load_models(sources, keywords)
        attach_adapters(models, adapters)
        config = CiterConfig(
            slm_config=models["slm"].config,
            llm_config=models["llm"].config,
            router=chosen.spec,
            router_threshold=chosen.threshold,
            slm_reference=reference_to(sources["slm"], keywords["slm"]),
            llm_reference=reference_to(sources["llm"], keywords["llm"]),
        )
        model: Any = cls(config, slm=models["slm"], llm=models["llm"], router=chosen.module)  # type: ignore[call-arg]
        if chosen.weights is not None:
            load_router_weights(model.router, chosen.weights, chosen.name)
        model._tokenizer, model._commits = tokenizer, commits_of(sources, keywords)
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
                them, `slm_name_or_path` and `slm_revision` say where it is now, `slm_adapter_name_or_path` and
                `slm_adapter_revision` where its adapter is. `quantization_config` without a
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
        config.router_threshold = as_threshold(kwargs.pop("router_threshold", config.router_threshold))
        if isinstance(config.router, nn.Module):
            router, config.router = config.router, {"type": CUSTOM_ROUTER}
        if config.slm_reference is None and config.llm_reference is None:
            model = cls._load_whole(path, *model_args, config=config, router=router, **kwargs)
        else:
            model = cls._load_referred(str(path), config, router, kwargs)
        if path is not None:
            names = (*HUB_KEYWORDS, "revision", "subfolder", "trust_remote_code")
            hub = FetchedWith({key: kwargs[key] for key in names if key in kwargs})
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
        if (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path"):
            raise ValueError(
                f"{path}: an adapter for the pair as a whole loads with PeftModel.from_pretrained(pair, adapter) of "
                "PEFT, after CiterForCausalLM.from_pretrained."
            )
        for key in [key for key in kwargs if key.startswith("_") or key in ("adapter_kwargs", "state_dict")]:
            del kwargs[key]
        for key in ("attn_implementation", "experts_implementation"):
            if getattr(config, f"_{key}", None) is not None:
                kwargs.setdefault(key, getattr(config, f"_{key}"))

        keywords = split_keywords(kwargs)
        sources: dict[str, Any] = {}
        adapters: dict[str, Adapter | None] = {}
        moved = [role for role in ROLES if keywords[role].get("name_or_path")]
        for role in ROLES:
            # Nobody is asked whether code of a model may run that the user has not chosen by name.
            keywords[role].setdefault("trust_remote_code", False)
            reference = getattr(config, f"{role}_reference")
            sources[role] = locate_base_model(role, path, reference, keywords[role], repository)
            if role in moved and not keywords[role].get("adapter_name_or_path"):
                # It may be an adapter that is for the same model.
                sources[role], adapters[role] = split_off_adapter(role, sources[role], keywords[role])
            if adapters.get(role) is None:
                of_adapter = (reference or {}).get("adapter")
                adapters[role] = saved_adapter(role, path, of_adapter, sources[role], keywords[role], repository)
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
            found = own_tokenizer(sources[role], keywords[role], adapters[role])
            saved = load_tokenizer(path, trust_remote_code=False, **files)
            check_same_tokenizer(role, sources[role], found, saved)
        models = load_models(sources, keywords)
        attach_adapters(models, adapters)

        config.slm_config, config.llm_config = models["slm"].config, models["llm"].config
        model: Any = cls(config, slm=models["slm"], llm=models["llm"], router=router)  # type: ignore[call-arg]
        if weights is not None:
            load_router_weights(model.router, weights, path)
        model.generation_config = generation_config or saved_generation_config(path, files) or model.generation_config
        model.config.name_or_path = model.name_or_path = path
        model._commits = commits_of(sources, keywords)
        model.eval()
        model = place(model, keywords)
        info: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, info | {"error_msgs": []}) if wants_info else model

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse an adapter for both models at once: it would match layers of both, and its names fit neither."""
        raise ValueError(
            "load_adapter: a pair has two models. Load the adapter into one of them: model.slm.load_adapter(...) or "
            "model.llm.load_adapter(...)."
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the weights that both models share between their own layers."""
        # A tied layer that PEFT has wrapped is not found by its name; what was tied before still is.
        if not any(adapter_layers(getattr(self, role)) for role in ROLES):
            super().tie_weights(*args, **kwargs)  # type: ignore[misc]

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


def place(model: Any, keywords: dict[str, dict[str, Any]]) -> Any:
    """Put the router where the SLM's head is, and note the devices of both models under `hf_device_map`."""
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


def attach_adapters(models: dict[str, PreTrainedModel], adapters: dict[str, Adapter | None]) -> None:
    """Put the adapters into the models that have one."""
    for role, adapter in adapters.items():
        if adapter is not None:
            attach_adapter(role, models[role], adapter)


def may_have_changed(reference: dict[str, Any], keywords: dict[str, Any]) -> bool:
    """Say whether a base model that is where the router says may be another one than when the router was saved."""
    if not reference.get("name_or_path"):
        return False
    commit = reference.get("revision", "")
    return len(commit) != 40 or keywords.get("revision") != commit


def saved_generation_config(path: str, hub: dict[str, Any]) -> GenerationConfig | None:
    """Return a repository's generation settings, or `None` when it has none."""
    try:
        return GenerationConfig.from_pretrained(path, **hub)
    except OSError:
        return None
