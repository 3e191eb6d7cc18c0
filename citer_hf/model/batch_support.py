"""Which batches may be decoded with rows that move at their own pace."""

import copy
import inspect
import sys
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import MaxTimeCriteria, RepetitionPenaltyLogitsProcessor, StopStringCriteria

from .decoding import Decoding
from .kv_layers import layers_can_part

# Kinds of layers whose masks `masks.py` can give.
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Processors that look at nothing but a row's logits, and those that look at the row's text too. Any other may look
# across rows, or count its calls, and needs rows that move together.
READ_NO_TEXT = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)
READ_TEXT = frozenset(
    {
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
    }
)


def rows_can_part(model: Any, decoding: Decoding) -> bool:
    """Say whether rows that move at their own pace get the texts, and the record, that they get together."""
    if decoding.streamer is not None or not ever_mixed(decoding.threshold):
        return False
    if not (processors_part_rows(decoding) and criteria_part_rows(decoding)):
        return False
    return all(
        not why_not_placed(part) and layers_can_part(cache)
        for part, cache in ((model.slm, decoding.cache.slm), (model.llm, decoding.cache.llm))
    )


def why_not_placed(model: PreTrainedModel) -> str:
    """Return why tokens of a model cannot be put at places of their own by masks and positions; "" if they can."""
    config = model.config.get_text_config()
    name, implementation = config.model_type, config._attn_implementation
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{name} takes no positions"
    if not set(getattr(config, "layer_types", None) or ()) <= LAYER_TYPES:
        return f"{name} has layers of other kinds than full and sliding attention"
    modules = {sys.modules.get(parent.__module__) for parent in type(model).__mro__}
    if not any(hasattr(module, "create_causal_mask") for module in modules) or getattr(config, "alibi", False):
        return f"{name} makes its masks by itself"
    if implementation not in ("sdpa", "eager"):
        return f"attention {implementation!r} takes no masks of rows that stand at different places"
    return ""


def processors_part_rows(decoding: Decoding) -> bool:
    return all(map(is_known, decoding.processors))


def criteria_part_rows(decoding: Decoding) -> bool:
    stops = decoding.stops
    # Without end tokens, transformers does not pad rows that have stopped: they go on until all have.
    return criteria_are_known(decoding) and (bool(stops.end_tokens) or not stops.others)


def criteria_are_known(decoding: Decoding) -> bool:
    """Say whether all stopping criteria look at a row's text and the clock, and at nothing else."""
    return all(type(one) in (MaxTimeCriteria, StopStringCriteria) for one in decoding.stops.others)


def ever_mixed(threshold: float | torch.Tensor) -> bool:
    """Say whether both models can write under a threshold; otherwise no row ever waits for another."""
    if isinstance(threshold, torch.Tensor):
        return bool(((threshold > 0) & (threshold <= 1)).any())
    return 0 < threshold <= 1


def is_known(processor: Any) -> bool:
    """Say whether a processor looks at a row's logits and text, and at nothing else."""
    return type(processor).__name__ in READ_NO_TEXT | READ_TEXT


def reads_no_text(processor: Any) -> bool:
    return type(processor).__name__ in READ_NO_TEXT


def processor_of_row(processor: Any, row: int) -> Any:
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = ignored[row : row + 1]
    return processor
