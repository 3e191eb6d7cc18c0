"""The pair that a command is for: the options that name and load it."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig

from .model.modeling import CiterForCausalLM
from .model.references import ROLES, base_config, split_keywords
from .options import Options
from .runs import import_extra, is_address, option, process_state
from .scale.remote import remote_llm

KEYWORD = re.compile(r"([A-Za-z]\w*)=(.*)", re.DOTALL)
QUANTIZATIONS: dict[str, Any] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
# What accelerate plans by itself.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class LoadingOptions:
    """Options of every command that loads two models."""

    slm: Sequence[str] = option(
        (), "A keyword of loading for the SLM, such as revision=v2. Without MODEL: its name or path.", "KEY=VALUE"
    )
    llm: Sequence[str] = option(
        (), "The same for the LLM; or http://HOST:PORT/v1#NAME, a vLLM or SGLang server that has it.", "KEY=VALUE"
    )
    slm_quantization: str | None = option(None, "Quantize the SLM: nf4 or int8.", "NAME")
    llm_quantization: str | None = option(None, "Quantize the LLM: nf4 or int8.", "NAME")
    dtype: str = option("auto", "Precision of both models, such as bfloat16.")
    device_map: str = option("auto", "Where the models go, such as auto, cpu or cuda:0.", flag="--device-map --device")
    trust_remote_code: bool = option(False, "Run code that the repository brings.")

    @property
    def names(self) -> list[Any]:
        """The names of the SLM and the LLM of a pair that is no router repository."""
        return [next((one for one in own if not KEYWORD.fullmatch(one)), None) for own in (self.slm, self.llm)]

    def keywords(self) -> Options:
        found: Options = {"dtype": self.dtype, "device_map": self.device_map}
        found |= {"trust_remote_code": True} if self.trust_remote_code else {}
        for role in ROLES:
            if (name := getattr(self, f"{role}_quantization")) is not None:
                if name not in QUANTIZATIONS:
                    raise ValueError(f"--{role}-quantization: expected {' or '.join(QUANTIZATIONS)}, got {name!r}.")
                import_extra("bitsandbytes", "bnb")
                found[f"{role}_quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[name])
            given = filter(None, map(KEYWORD.fullmatch, getattr(self, role)))
            found |= {f"{role}_{key}": json_or_text(value) for key, value in (pair.groups() for pair in given)}
        for key in ("device_map", "slm_device_map", "llm_device_map"):
            check_device(found.get(key))
        return found


@dataclass(frozen=True)
class PairOptions(LoadingOptions):
    """Options of every command that loads a pair."""

    model: str | None = option(None, "A router's directory or repository id, or `demo`.", "MODEL", argument=True)
    revision: str | None = option(None, "Branch, tag or commit of MODEL.", "NAME")
    router: str | None = option(
        None, "Without MODEL: kind, directory or repository id of the router. [default: confidence]", "ROUTER"
    )

    def __post_init__(self) -> None:
        named = [None if is_address(name) else name for name in self.names]
        given = [self.revision] if self.model is None else [*named, self.router]
        if (self.model is None and None in self.names) or given.count(None) < len(given):
            raise ValueError(
                "MODEL, --slm, --llm: expected MODEL (a router's directory or id, or `demo`), perhaps with --revision "
                "or --llm name_or_path=X; or without MODEL both --slm X and --llm Y, perhaps with --router. An LLM "
                "on a server is --llm http://host:8000/v1#NAME in either case."
            )

    def keywords(self) -> Options:
        return super().keywords() | ({"revision": self.revision} if self.revision is not None else {})

    def configs(self) -> list[PreTrainedConfig]:
        """Return the configurations of both models, without loading the models."""
        keywords, pair, found = self.keywords(), None, []
        if self.model is not None:
            where = {key: keywords.pop(key) for key in ("revision", "trust_remote_code") if key in keywords}
            pair = AutoConfig.from_pretrained(place_of(self.model), **where)
        of_both = split_keywords(keywords)
        for role, name in zip(ROLES, self.names, strict=True):
            if is_address(name):  # nothing is asked of a server
                of_both[role] = {"name_or_path": keywords.get("llm_config") or str(name).partition("#")[2]}
            own, reference = of_both[role], getattr(pair, f"{role}_reference", None) or {}
            own = own if "name_or_path" in own else {"name_or_path": name, **reference, **own}
            is_saved = pair is not None and (own["name_or_path"] is None or not getattr(self, role))
            found.append(getattr(pair, f"{role}_config") if is_saved else base_config(role, own["name_or_path"], own))
        return found


@dataclass(frozen=True)
class TwoModels(LoadingOptions):
    """Options of a command that is for two models before they are a pair."""

    small: str | None = option(
        None, "The SLM: its name or path. Without LLM: a router, or `demo`.", "SLM", argument=True
    )
    large: str | None = option(None, "The LLM, likewise; or http://HOST:PORT/v1#NAME.", "LLM", argument=True)

    def __post_init__(self) -> None:
        if self.names[0] is None:
            raise ValueError("SLM, LLM: expected the names or paths of two models; or a router's, or `demo`, alone.")

    @property
    def names(self) -> list[Any]:
        found = [given or named for given, named in zip((self.small, self.large), super().names, strict=True)]
        return found if None in found[:1] or found[1] else [place_of(str(found[0])), None]


def json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def check_device(name: Any) -> None:
    """Raise an error when torch cannot use a device."""
    try:
        if isinstance(name, str) and name not in DEVICE_MAPS:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device-map: expected auto or a device, got {name!r}. {error}") from error


def place_of(model: str) -> str:
    """Return the directory or repository id that a user means."""
    from .demo import DEMO_PAIR

    return str(DEMO_PAIR) if model == "demo" else model


@contextmanager
def known_keywords(wanted: LoadingOptions) -> Iterator[None]:
    """Turn the error of a model that does not know a keyword of the user's into one that is the user's."""
    try:
        yield
    except TypeError as error:
        if not any(map(KEYWORD.fullmatch, (*wanted.slm, *wanted.llm))):
            raise
        raise ValueError(str(error)) from error


def models_of(wanted: LoadingOptions, keywords: Options) -> list[Any]:
    """Return the SLM and the LLM as they are named; one on a server takes its own keywords out of `keywords`."""
    slm, llm = wanted.names
    if not is_address(llm) and keywords.keys() & {"llm_config", "llm_logprobs", "llm_timeout"}:
        raise ValueError("--llm config, logprobs, timeout: they need an LLM on a server, --llm http://HOST/v1#NAME.")
    return [slm, remote_llm(llm, keywords)]


def load_pair(options: Options) -> CiterForCausalLM:
    """Load a pair; under `accelerate launch`, each process on a device of its own."""
    wanted, state = PairOptions(**options), process_state()
    keywords = wanted.keywords()
    if state.num_processes > 1 and wanted.device_map == "auto":
        keywords["device_map"] = {"": state.device} if state.device.type != "cpu" else "cpu"
    with known_keywords(wanted):
        slm, llm = models_of(wanted, keywords)
        if wanted.model is not None:
            keywords |= {} if llm is None else {"llm_name_or_path": llm}
            return CiterForCausalLM.from_pretrained(place_of(wanted.model), **keywords)
        return CiterForCausalLM.from_pair(slm, llm, router=wanted.router or "confidence", **keywords)
