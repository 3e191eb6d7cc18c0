"""Everything that depends on a version of transformers, torch or huggingface_hub; each shim names what ends it."""

import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

# ---- the cache's name: ends when transformers 5.24 is the oldest supported --------------------------------
# Since 5.24, `forward`, `generate`, the keywords of a model in `generate`, and outputs call `cache` what they called
# `past_key_values` before. Users may say either on every version; CACHE is the name that transformers knows here.
CACHE_NAMES = ("cache", "past_key_values")
_knows_cache = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE, OTHER_NAME = CACHE_NAMES if _knows_cache else reversed(CACHE_NAMES)


def given_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given under one of its two names, or `None`."""
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "cache, past_key_values: got both, expected one of them. They are two names of the same argument; "
            "transformers calls it `cache` since 5.24."
        )
    return past_key_values if cache is None else cache


def with_cache_name(kwargs: Mapping[str, Any], name: str = CACHE) -> dict[str, Any]:
    """Return keywords in which the cache, under whichever name it was given, has this name."""
    cache = given_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
    others = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}
    return others if cache is None else {**others, name: cache}


def cache_name(model: nn.Module) -> str | None:
    """Return what `forward` of a model calls its cache (code of its own may know either name), or `None`."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, OTHER_NAME) if name in parameters), None)


def cache_argument(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    return {cache_name(model) or CACHE: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in an output of any model, or `None`."""
    return getattr(output, CACHE, None)


# A base class that gives an output its cache under the other name, too, without a notice.
BothCacheNames: Any = type("BothCacheNames", (), {OTHER_NAME: property(cache_of)})


@dataclass
class CiterGenerateOutput(BothCacheNames, GenerateDecoderOnlyOutput):
    """What `generate` of a pair returns, with its cache as `cache` and `past_key_values`; see transformers."""


@dataclass
class CiterBeamOutput(BothCacheNames, GenerateBeamDecoderOnlyOutput):
    """What a beam search of a pair returns, with its cache as `cache` and `past_key_values`; see transformers."""


def with_both_names(output: Any) -> Any:
    """Return what `generate` of transformers returns, with the cache under both names."""
    classes = {GenerateDecoderOnlyOutput: CiterGenerateOutput, GenerateBeamDecoderOnlyOutput: CiterBeamOutput}
    return classes[type(output)](**output) if type(output) in classes else output


# ---- an emptied cache: ends when transformers 5.18 is the oldest supported --------------------------------


def reset_cache(cache: Cache) -> None:
    """Empty a cache; before 5.18, layers that grow are filled with zeros instead, and keep their length."""
    cache.reset()
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


# ---- what base models take: never ends, since models may have code of their own -------------------------

# Not given to a model whose `forward` has `**kwargs` and does not name them; the last two are for the loss alone.
ONLY_BY_NAME = ("position_ids", "logits_to_keep", "num_items_in_batch", "shift_labels")


class Keywords(NamedTuple):
    """The keywords that `forward` of a base model takes."""

    named: frozenset[str]
    takes_any: bool
    cache: str

    def take(self, key: str) -> bool:
        return key in self.named or (self.takes_any and key not in ONLY_BY_NAME)


def keywords_of(model: nn.Module) -> Keywords:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return Keywords(frozenset(parameters), takes_any, cache_name(model) or CACHE)


# ---- the HTTP library of huggingface_hub: ends when huggingface_hub 2 is the oldest supported -------------


def http_library() -> Any:
    """Return httpx2, or httpx where huggingface_hub is older than 2."""
    return importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


# ---- errors of other libraries ----------------------------------------------------------------------------


def is_broken_transfer(error: BaseException) -> bool:
    """Return True if a download broke off: huggingface_hub uses httpx, from 2 on httpx2. Ends with 2 as the oldest."""
    return any(base.__module__.partition(".")[0] in ("httpx", "httpx2", "requests") for base in type(error).__mro__)


def not_compiled() -> tuple[type[Exception], ...]:
    """Return what the compiler raises where it cannot compile; torch 2.7 as the oldest ends the second name."""
    errors: Any = torch._dynamo.exc
    limits = (getattr(errors, name, None) for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"))
    return (errors.TorchDynamoException, *filter(None, limits))


ALLOCATION_FAILED = re.compile(
    r"(can't|can ?not|could not|couldn't|failed to|unable to) allocate|out of memory|not enough memory|bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that memory ran out: torch, Python and the system each have their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and ALLOCATION_FAILED.search(str(error)) is not None
