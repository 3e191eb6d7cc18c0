"""Out of memory, said in words that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

from citer_hf.memory_citer import GB, is_out_of_memory, weight_bytes

from .costs import cost_of_config, cost_of_model

__all__ = ["DoesNotFitError", "both_models", "explain_out_of_memory", "loading", "one_model"]


class DoesNotFitError(OSError):
    """A model did not fit."""


@contextmanager
def explain_out_of_memory(device: str, available: int, describe: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed into an error which says what did not fit and what helps.

    Args:
        device: Where it was to fit.
        available: Bytes that were free before any model was loaded.
        describe: Says which model it was and what it needed; called only then.

    Raises:
        DoesNotFitError: in the place of whatever was raised.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            f"--device {device}: out of memory: {describe()}, and there were {available / GB:.3g} GB. What helps: "
            "--dtype bfloat16 (half of float32); a smaller --batch-size, --prompt-length or --max-new-tokens; a "
            "quantized model, or another --device (auto spreads the models over all there are)."
        ) from error


def loading(slm: PreTrainedConfig, llm: PreTrainedConfig, dtype: str, available: int) -> str:
    """Say which model did not fit while the two were loaded, and what it needs.

    Args:
        slm: Configuration of the SLM, which is loaded first.
        llm: Configuration of the LLM.
        dtype: The precision asked for.
        available: Bytes that were free.
    """
    needed = {"SLM": config_bytes(slm, dtype), "LLM": config_bytes(llm, dtype)}
    which = "SLM" if needed["SLM"] > available else "LLM"
    beside = f", beside the SLM's {needed['SLM'] / GB:.3g} GB" if which == "LLM" else ""
    return f"the {which} could not be loaded; its weights need about {needed[which] / GB:.3g} GB{beside}"


def config_bytes(config: PreTrainedConfig, dtype: str) -> float:
    """Bytes of a model's weights in a precision; `auto` is that of the configuration."""
    own = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    return float(cost_of_config(config, bits=8 * own.itemsize).resident_bytes)


def one_model(name: str, model: Any, tokens: int) -> str:
    """Say that one model did not fit while it generated alone, and what it needs.

    Args:
        name: `SLM` or `LLM`.
        model: The model.
        tokens: Tokens in its cache at the end, all rows together.
    """
    weights, cache = weights_and_cache(model, tokens)
    return (
        f"the {name} while generating; it needs about {(weights + cache) / GB:.3g} GB ({weights / GB:.3g} of weights "
        f"and {cache / GB:.3g} of keys and values) and room to compute in"
    )


def both_models(slm: Any, llm: Any, tokens: int) -> str:
    """Say that the pair did not fit while both were generating, and what each model needs.

    Args:
        slm: The SLM.
        llm: The LLM.
        tokens: Tokens in each cache at the end, all rows together.
    """
    small, large = weights_and_cache(slm, tokens), weights_and_cache(llm, tokens)
    return (
        f"both models while generating; they need about {sum(small + large) / GB:.3g} GB (SLM: {small[0] / GB:.3g} of "
        f"weights and {small[1] / GB:.3g} of keys and values, LLM: {large[0] / GB:.3g} and {large[1] / GB:.3g}) and "
        "room to compute in"
    )


def weights_and_cache(model: Any, tokens: int) -> tuple[float, float]:
    """Bytes of a loaded model's weights, and of its cache with this many tokens."""
    return weight_bytes(model), float(cost_of_model(model).kv_bytes_per_token) * tokens
