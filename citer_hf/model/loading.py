"""Loading: a pair from two models, a router repository from disk or the Hub."""

import contextlib
import copy
import os
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .adapters import Adapter, adapter_layers, attach_adapter, saved_adapter, split_off_adapter, unwrapped
from .configuration import CiterConfig, router_width
from .references import (
    HUB_KEYWORDS,
    ROLES,
    base_config,
    check_unchanged,
    commit_of,
    commits_of,
    explained,
    file_keywords,
    first_difference,
    hub_keywords,
    load_models,
    load_tokenizer,
    name_of,
    not_the_model,
    reference_to,
    resolve,
    shared_tokenizer,
    split_keywords,
)
from .routers import CUSTOM_ROUTER, ROUTERS, UNTRAINED, as_threshold, as_veto, build_router

logger = logging.get_logger(__name__)

ROUTER_WEIGHTS = "model.safetensors"
# Of pairs whose router needs no training: with a veto, they reach the LLM's accuracy (BiLD, arXiv 2302.07863).
UNTRAINED_VETO = {"confidence": 0.3, "entropy": 0.3}
# The router's own, which are never passed on to the base models.
REPOSITORY_KEYWORDS = ("revision", "subfolder", "variant", "trust_remote_code", "code_revision", "generation_config")


Pair = TypeVar("Pair", bound="CiterLoadingMixin")


class CiterLoadingMixin:
    """`from_pair` and `from_pretrained` of `CiterForCausalLM`."""

    _tokenizer: Any = None
    # Where the router was loaded from, and with which keywords, but for the token, which is written down nowhere.
    _repository: tuple[str, dict[str, Any]] | None = None
    # Of the base models, as far as they are known: what was loaded may be another one than what is referred to.
    _commits: dict[str, str | None] = {}

    @classmethod
    def from_pair(
        cls: type[Pair],
        slm: str | os.PathLike[str] | PreTrainedModel,
        llm: str | os.PathLike[str] | PreTrainedModel,
        router: str | dict[str, Any] | os.PathLike[str] | nn.Module = "confidence",
        router_threshold: float | None = None,
        llm_veto: float | None = None,
        **kwargs: Any,
    ) -> Pair:
        """Make one model of a small and a large one.

        The pair has the LLM's tokenizer and generation settings, and ends at the end tokens of either model.

        Args:
            slm: The small language model: repository id, path, or a loaded model.
            llm: The large language model, likewise. It must share the SLM's tokenizer, but for tokens that were added
                to one of them; ids beyond the smaller vocabulary table are never generated.
            router: A kind (`mlp`, `linear`, `confidence`, `entropy`, `random`), a dictionary with a `type`, the path
                or repository id of a saved router, or a module that maps (hidden, logits) to `p_slm`.
            router_threshold: The SLM writes a token when its score reaches this. Default: that of the saved router,
                otherwise 0.5.
            llm_veto: The LLM takes back an SLM's token when it gives it less than this part of its best token's
                probability. Default: that of the saved router, otherwise 0.3 for `confidence` and `entropy`, which
                need no training, and 0 for other routers.
            kwargs: For `from_pretrained` of both models; with the prefix `slm_` or `llm_` for one of them.
                `quantization_config` without a prefix is for the LLM alone. `slm_adapter_name_or_path` and
                `slm_adapter_revision` name an adapter (PEFT) for the SLM.

        Raises:
            ValueError: when the models, the router, the threshold or a keyword do not fit.
            TypeError: for a keyword that a model does not know.
            OSError: when a model cannot be loaded.
        """
        sources: dict[str, Any] = {role: unwrapped(role, model) for role, model in (("slm", slm), ("llm", llm))}
        keywords = split_keywords(kwargs)
        adapters: dict[str, Adapter | None] = {}
        for role in ROLES:
            sources[role], adapters[role] = split_off_adapter(role, sources[role], keywords[role])
        configs = {role: base_config(role, sources[role], keywords[role]) for role in ROLES}
        hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
        spec, dials, module = choose_router(router, router_threshold, llm_veto, configs["slm"], hub)
        tokenizer = shared_tokenizer(sources, keywords, configs, adapters)
        references = {role: reference_to(sources[role], keywords[role]) for role in ROLES}
        models = load_models(sources, keywords, references)
        for role in ROLES:
            attach_adapter(role, models[role], adapters[role])
        slm_config, llm_config = models["slm"].config, models["llm"].config
        given: dict[str, Any] = {f"{role}_reference": references[role] for role in ROLES}
        config = CiterConfig(slm_config, llm_config, spec, **dials, **given)
        model: Any = cls(config, **models, router=module)  # type: ignore[call-arg]
        if module is None and model.router.state_dict():
            config.router[UNTRAINED] = True
        model._tokenizer, model._commits = tokenizer, commits_of(sources, keywords)
        end_at_union(model)
        if model.slm.num_parameters() > model.llm.num_parameters():
            logger.warning("slm, llm: the SLM is larger than the LLM. Were they swapped?")
        return ready(model, keywords)

    @classmethod
    def from_pretrained(
        cls: type[Pair],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Pair:
        """Load a router repository and the two base models that it refers to or holds.

        Args:
            pretrained_model_name_or_path: Path or repository id of the router.
            model_args: As in transformers.
            config: A configuration to use instead of the repository's.
            kwargs: As for any transformers model, for both base models; with the prefix `slm_` or `llm_` for one of
                them, `slm_name_or_path` and `slm_revision` say where it is now (`llm_name_or_path` may be a
                `RemoteLM`), `slm_adapter_name_or_path` and `slm_adapter_revision` where its adapter is.
                `quantization_config` without a prefix is for the LLM alone, `revision`, `subfolder` and
                `trust_remote_code` for the router alone. `router_threshold` and `llm_veto` replace the saved ones;
                `router` is an instance of a router class of one's own.

        Raises:
            OSError: when the router or a base model cannot be found or read.
            ValueError: when what is found does not fit together.
            TypeError: for a keyword that a model does not know.
        """
        path = None if pretrained_model_name_or_path is None else os.fspath(pretrained_model_name_or_path)
        router = kwargs.pop("router", None)
        if type(config).__name__ == CiterConfig.__name__:
            config = copy.deepcopy(config)
        else:
            # The configuration takes keywords for its own file; the weights and the base models need them too.
            source = os.fspath(config or path or "")
            own_file = ("dtype", "torch_dtype", *HUB_KEYWORDS, *REPOSITORY_KEYWORDS)
            kept = {key: kwargs[key] for key in own_file if key in kwargs}
            rest = {key: value for key, value in kwargs.items() if key not in ("dtype", "torch_dtype")}
            with explained("router", source, kwargs):
                config, kwargs = read_config(source, rest)
            kwargs |= kept
        assert isinstance(config, PreTrainedConfig)
        config.router_threshold = as_threshold(kwargs.pop("router_threshold", config.router_threshold))
        config.llm_veto = as_veto(kwargs.pop("llm_veto", config.llm_veto))
        if isinstance(config.router, nn.Module):
            router, config.router = config.router, {"type": CUSTOM_ROUTER}
        if config.slm_reference is None and config.llm_reference is None:
            # All three parts are in one file, which loads as every transformers model does.
            model_args = model_args if router is None else (None, None, router)
            loaded = super().from_pretrained(path, *model_args, config=config, **kwargs)  # type: ignore[misc]
        else:
            loaded = cls._load_referred(str(path), config, router, kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if path is not None:
            where = file_keywords(kwargs, "trust_remote_code")
            token = where.pop("token", None)
            model._repository = (path, where)
            if isinstance(token, str):
                model._tokenizer = load_tokenizer(path, **{"trust_remote_code": False, **where}, token=token)
        return loaded

    @classmethod
    def _load_referred(cls, path: str, config: Any, router: nn.Module | None, kwargs: dict[str, Any]) -> Any:
        """Load a repository that holds the router and refers to its base models, or holds them in folders."""
        repository = {key: kwargs[key] for key in (*HUB_KEYWORDS, *REPOSITORY_KEYWORDS) if key in kwargs}
        generation_config = repository.pop("generation_config", None)
        if config.name_or_path == path and not os.path.isdir(path):
            # A push while this loads must not mix two states of the repository.
            repository["revision"] = commit_of(path, repository) or repository.get("revision")
        if (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path"):
            raise ValueError(f"{path}: load an adapter of the pair with PeftModel.from_pretrained(pair, adapter).")
        chosen = {key: getattr(config, f"_{key}", None) for key in ("attn_implementation", "experts_implementation")}
        shared = {key: value for key, value in chosen.items() if value is not None} | kwargs
        for key in (*REPOSITORY_KEYWORDS, "output_loading_info", "adapter_kwargs", "state_dict"):
            shared.pop(key, None)

        # 1. Where both models and their adapters are.
        keywords = split_keywords({key: value for key, value in shared.items() if not key.startswith("_")})
        sources: dict[str, Any] = {}
        adapters: dict[str, Adapter | None] = {}
        moved = [role for role in ROLES if keywords[role].get("name_or_path")]
        for role in ROLES:
            # Nobody is asked whether code of a model may run that the user has not chosen by name.
            own = keywords[role] = {"trust_remote_code": False, **keywords[role]}
            reference = getattr(config, f"{role}_reference")
            if role in moved:
                given = own.pop("name_or_path")
                sources[role] = given if isinstance(given, nn.Module) else os.fspath(given)
            else:
                sources[role], there = resolve(role, path, reference, repository)
                # A folder of the router's repository is where it is; of another model, another state may be asked for.
                keywords[role] = own = {**own, **there} if "name_or_path" not in reference else there | own
            if role in moved and not own.get("adapter_name_or_path"):
                # It may be an adapter that is for the same model.
                sources[role], adapters[role] = split_off_adapter(role, sources[role], own)
            if adapters.get(role) is None:
                of_adapter = (reference or {}).get("adapter")
                adapters[role] = saved_adapter(role, path, of_adapter, sources[role], own, repository)

        # 2. Whether they are what the router was made for, and the router's weights, before gigabytes are loaded.
        configs = {role: base_config(role, sources[role], keywords[role]) for role in ROLES}
        for role in ROLES:
            check_unchanged(role, sources[role], configs[role], getattr(config, f"{role}_config"))
        router = load_router(config.router, configs["slm"], path, repository, router)
        files = file_keywords(repository)
        references: dict[str, dict[str, Any] | None] = {}
        for role in ROLES:
            stated = getattr(config, f"{role}_reference") or {}
            references[role] = {key: value for key, value in stated.items() if key != "adapter"}
            if role in moved or "name_or_path" in stated:
                references[role] = reference_to(sources[role], keywords[role])
                commit = stated.get("revision", "")
                if role in moved or len(commit) != 40 or keywords[role].get("revision") != commit:
                    found = load_tokenizer(name_of(sources[role]), adapters[role], **hub_keywords(keywords[role]))
                    saved = load_tokenizer(path, trust_remote_code=False, **files)
                    if found is not None and saved is not None and first_difference(found, saved) is not None:
                        raise ValueError(not_the_model(role, sources[role], "its tokenizer has changed"))

        # 3. The models.
        models = load_models(sources, keywords, references)
        for role in ROLES:
            attach_adapter(role, models[role], adapters[role])
            setattr(config, f"{role}_reference", references[role])
        model: Any = cls(config, **models, router=router)  # type: ignore[call-arg]
        with contextlib.suppress(OSError):
            model.generation_config = generation_config or GenerationConfig.from_pretrained(path, **files)
        if getattr(model.llm, "is_remote", False):
            model.llm.make_exact(model.generation_config)
        model.config.name_or_path = model.name_or_path = path
        model._commits = commits_of(sources, keywords)
        model = ready(model, keywords)
        info: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, {**info, "error_msgs": []}) if kwargs.get("output_loading_info") else model

    @property
    def router_is_untrained(self) -> bool:
        """Whether the router's weights are the random ones that `from_pair` made; `train()` ends it."""
        model: Any = self
        return bool(model.config.router.get(UNTRAINED))

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error: an adapter for both models at once would match layers of both."""
        raise ValueError("load_adapter: a pair has two models. Call model.slm.load_adapter or model.llm.load_adapter.")

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


def read_config(source: str, keywords: dict[str, Any]) -> tuple[CiterConfig, dict[str, Any]]:
    """Return the configuration of a repository, and the keywords that it does not take.

    `CiterConfig.from_pretrained` loses the token before transformers 5.22.
    """
    found, rest = CiterConfig.get_config_dict(source, **keywords)
    config, rest = CiterConfig.from_dict(found, return_unused_kwargs=True, **rest)
    return config, rest


def choose_router(
    router: Any, threshold: float | None, veto: float | None, slm_config: PreTrainedConfig, hub: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], nn.Module | None]:
    """Return the specification, threshold and veto and, unless its weights are to be made, the module of a router."""
    given = {"router_threshold": threshold, "llm_veto": veto}
    dials = {name: value for name, value in given.items() if value is not None}
    as_threshold(dials.get("router_threshold", 0.5))
    as_veto(dials.get("llm_veto", 0.0))
    if isinstance(router, nn.Module):
        return {"type": CUSTOM_ROUTER}, dials, router
    name = "" if isinstance(router, dict) else os.fspath(router)
    if name in ROUTERS or ("/" not in name and not os.path.exists(name)):
        spec = dict(router) if isinstance(router, dict) else {"type": name}
        with torch.device("meta"):
            build_router(spec, router_width(slm_config))
        return spec, {"llm_veto": UNTRAINED_VETO.get(spec["type"], 0.0), **dials}, None
    if os.path.isfile(name):
        raise ValueError(
            f"router: {name} is a file, expected the path or repository id of a saved router. Convert a router of "
            f"released code first: citer convert {name} --slm ... --llm ... --out my-router"
        )
    with explained("router", name, hub):
        saved, _ = read_config(name, hub)
    spec = {"hidden_size": router_width(saved.slm_config), **saved.router}
    saved_dials = {name: getattr(saved, name) for name in (*given, "calibration")}
    return spec, {**saved_dials, **dials}, load_router(spec, slm_config, name, hub)


def load_router(
    spec: dict[str, Any], slm_config: PreTrainedConfig, path: str, hub: dict[str, Any], router: nn.Module | None = None
) -> nn.Module | None:
    """Return the router of a repository with its weights, in a module of the user's if there is one."""
    with torch.device("meta"):
        own = build_router(spec, router_width(slm_config)) if router is None else None
    module: nn.Module = router if own is None else own  # type: ignore[assignment]
    if not module.state_dict():
        return router
    with explained("router", path, hub):
        file = cached_file(path, ROUTER_WEIGHTS, **file_keywords(hub))
        tensors = {key: value for key, value in load_state_dict(file).items() if key.startswith("router.")}
    # fp32, as every router is that this package makes.
    weights = {key[7:]: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    try:
        module.load_state_dict(weights, strict=True, assign=router is None)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights in {ROUTER_WEIGHTS} do not fit its router: {error}") from error
    return module


def with_saved_router(model: Any, source: str) -> Any:
    """Return a pair with the router and the dials of another repository; both models are shared."""
    saved, other = CiterConfig.from_pretrained(source), copy.copy(model)
    for role in ROLES:
        check_unchanged(
            role, getattr(model, role).name_or_path, getattr(model, role).config, getattr(saved, f"{role}_config")
        )
    router = load_router(saved.router, model.slm.config, source, {})
    router = router or build_router(saved.router, router_width(model.slm.config))
    other._modules = {**model._modules, "router": router.eval().to(model.slm.get_output_embeddings().weight.device)}
    other.config, other.generation_config = copy.copy(model.config), copy.copy(model.generation_config)
    for settings in (other.config, other.generation_config):
        settings.router_threshold, settings.llm_veto = saved.router_threshold, saved.llm_veto
    other.config.router, other.config.calibration = saved.router, saved.calibration
    # Measured and compiled with another router.
    other.pace, other.compiled_steps = type(model.pace)(model.pace.fixed_ratio), type(model.compiled_steps)()
    return other


def end_at_union(model: Any) -> None:
    """Let a pair end at the end tokens of both models, with a warning where the LLM lacks some of the SLM's."""
    settings = model.generation_config
    slm, llm = (
        [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        for ids in (model.slm.generation_config.eos_token_id, settings.eos_token_id)
    )
    missing = [index for index in slm if index not in llm]
    if missing:
        logger.warning(f"slm: it ends at the tokens {missing} and the LLM does not; the pair ends at those of both.")
        settings.eos_token_id = [*llm, *missing]


def ready(model: Any, keywords: dict[str, dict[str, Any]]) -> Any:
    """Put the router where the SLM's head is, and note the devices of both models under `hf_device_map`."""
    if model.router_is_untrained:
        logger.warning(
            f"router: the weights of this {model.config.router['type']!r} router are random, so that its choices mean "
            "nothing. Train it (`citer train`), or pass the path or repository id of a trained router."
        )
    model.eval()
    device = model.slm.get_output_embeddings().weight.device
    if device.type != "meta":
        model.router.to(device)
    maps = {role: getattr(getattr(model, role), "hf_device_map", None) for role in ROLES}
    if any(maps.values()) or any(keywords[role].get("device_map") is not None for role in ROLES):
        parts = {role: maps[role] or {"": getattr(model, role).device} for role in ROLES}
        model.hf_device_map = {"router": device} | {
            f"{role}.{name}".rstrip("."): where for role in ROLES for name, where in parts[role].items()
        }
    return model
