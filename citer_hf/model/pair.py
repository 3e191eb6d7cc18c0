"""What two models must have in common to be a pair, checked before any weight is loaded where that is possible."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from .compat import cache_name
from .configuration import table_size


def check_config(role: str, config: PreTrainedConfig) -> None:
    """Refuse the configuration of a model that does not write text from left to right."""
    name = f"{role}: {type(config).__name__}"
    advice = "Choose a decoder-only causal language model."
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder; a pair needs two decoder-only causal language models. {advice}"
        )
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False
    if is_encoder:
        raise ValueError(f"{name} is an encoder (is_decoder is False), which does not generate text. {advice}")
    has_remote_head = AutoModelForCausalLM.__name__ in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_remote_head:
        raise ValueError(
            f"{name} has no causal language model in transformers, so it does not generate text. {advice}"
        )


def check_model(role: str, model: Any) -> None:
    """Refuse what is not a causal language model of transformers."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{role}: expected a model id, a path or a transformers model, got {name}.")
    if model.config.is_encoder_decoder or not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"{role}: {name} is not a causal language model: expected a decoder with a language modelling head, such "
            "as AutoModelForCausalLM.from_pretrained gives."
        )


def check_pair(slm: PreTrainedModel, llm: PreTrainedModel) -> None:
    """Refuse two models that cannot decode together."""
    for role, model in (("slm", slm), ("llm", llm)):
        check_model(role, model)
        name = f"{role}: {type(model).__name__}"
        layers = DynamicCache(config=model.config)
        if cache_name(model) is None or (len(layers) and all(layers.is_linear)):
            parameters = ", ".join(list(inspect.signature(model.forward).parameters)[:6])
            raise ValueError(
                f"{name} keeps no keys and values in a `cache` (or `past_key_values`) (its forward takes "
                f"{parameters}, ...), so that it cannot share a generation with another model."
            )


def load_tokenizer(source: str, **kwargs: Any) -> Any:
    """Load the tokenizer of a repository, or return `None` when it has none."""
    # Importing tokenizers takes as long as all of this package.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    # What is raised for a repository without a tokenizer depends on what else it lacks.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_tokenizers(slm_tokenizer: Any, llm_tokenizer: Any) -> None:
    """Refuse two tokenizers that number their tokens differently."""
    if slm_tokenizer is None or llm_tokenizer is None:
        return
    slm_tokens = {index: token for token, index in slm_tokenizer.get_vocab().items()}
    llm_tokens = {index: token for token, index in llm_tokenizer.get_vocab().items()}
    if slm_tokens == llm_tokens:
        return
    first = min(i for i in slm_tokens.keys() | llm_tokens.keys() if slm_tokens.get(i) != llm_tokens.get(i))
    raise ValueError(
        f"slm, llm: their tokenizers differ, first at token id {first}: it is {slm_tokens.get(first)!r} for the SLM "
        f"({len(slm_tokens)} tokens) and {llm_tokens.get(first)!r} for the LLM ({len(llm_tokens)} tokens). A pair "
        "must share one tokenizer; choose two models of the same family."
    )


def check_table_sizes(tokenizer: Any, slm_config: PreTrainedConfig, llm_config: PreTrainedConfig) -> None:
    """Refuse a model whose table has no row for some token of the shared tokenizer."""
    if tokenizer is None:
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    for role, config in (("slm", slm_config), ("llm", llm_config)):
        if largest >= table_size(config):
            raise ValueError(
                f"{role}: its vocabulary table has {table_size(config)} rows, too few for the tokenizer, whose "
                f"largest token id is {largest}. Resize the model's token embeddings, or use its own tokenizer."
            )
