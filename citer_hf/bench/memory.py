"""Out of memory, said in words that help."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from citer_hf.model.memory import GB, is_out_of_memory, weight_bytes, weight_bytes_of

from .costs import cost_of_model

__all__ = ["DoesNotFitError", "both_models", "explain_out_of_memory", "loading", "one_model", "who_ran"]

# Up to the settings that help, which have other names here.
SAID_BY_THE_PAIR = re.compile(r"(SLM|LLM): out of memory .*?(?= What helps:)", re.DOTALL)


class DoesNotFitError(OSError):
    """A model did not fit."""


@contextmanager
def explain_out_of_memory(device: str, available: int, describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn an allocation that failed into an error which says what did not fit and what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = SAID_BY_THE_PAIR.search(str(error))
        sentence = f"out of memory: {describe(error)}." if said is None else said[0]
        raise DoesNotFitError(
            f"--device {device}: {sentence} There were {available / GB:.3g} GB before the models were loaded. What "
            "helps: --dtype bfloat16 (half of float32); a smaller --batch-size, --prompt-length or --max-new-tokens; "
            "a quantized model, or another --device (auto spreads the models over all there are)."
        ) from error


def who_ran(error: Exception, slm: Any, llm: Any) -> str | None:
    """Say which model was running when something was raised: no hook that would cost time needs to know it before."""
    names, found = {id(slm): "SLM", id(llm): "LLM"}, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # The innermost one: an LLM that is assisted calls the SLM.
        found = names.get(id(frame.f_locals.get("self")), found)
    return found


def loading(slm: PreTrainedConfig, llm: PreTrainedConfig, dtype: str) -> str:
    """Say that a pair could not be loaded, and what it needs."""
    small, large = (weight_bytes_of(config, {"dtype": dtype}) / GB for config in (slm, llm))
    return f"the pair could not be loaded; its weights need about {small:.3g} GB (SLM) and {large:.3g} GB (LLM)"


def one_model(name: str, model: Any, tokens: int) -> str:
    """Say that one model did not fit while it generated alone, and what it needs."""
    weights, cache = weights_and_cache(model, tokens)
    return (
        f"the {name} while generating; it needs about {(weights + cache) / GB:.3g} GB ({weights / GB:.3g} of weights "
        f"and {cache / GB:.3g} of keys and values) and room to compute in"
    )


def both_models(slm: Any, llm: Any, tokens: int) -> str:
    """Say that the pair did not fit while both were generating, and what each model needs."""
    small, large = weights_and_cache(slm, tokens), weights_and_cache(llm, tokens)
    return (
        f"both models while generating; they need about {sum(small + large) / GB:.3g} GB (SLM: {small[0] / GB:.3g} of "
        f"weights and {small[1] / GB:.3g} of keys and values, LLM: {large[0] / GB:.3g} and {large[1] / GB:.3g}) and "
        "room to compute in"
    )


def weights_and_cache(model: Any, tokens: int) -> tuple[float, float]:
    """Bytes of a loaded model's weights, and of its cache with this many tokens."""
    return weight_bytes(model), float(cost_of_model(model).kv_bytes_per_token) * tokens
