"""How `generate` drives two models: which cache it makes, which rows are finished, where the record starts."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
)
from transformers.generation import StoppingCriteriaList

from .batch import decode_rows
from .batch_support import rows_can_part
from .cache import CiterCache, Routing
from .compat import CACHE, cache_of, with_both_names, with_cache_name
from .decoding import Decoding, Stops
from .kv_layers import all_grow, growing_cache
from .one_sequence import decode_one_row
from .routers import as_threshold
from .schedule import waiting_policy
from .static import asks_for_static, decode_static, decodes_statically, warn_of_dynamic_cache

# Keywords of `forward` that an assistant model does not know.
OWN_KEYWORDS = ("router_threshold", "finished_rows")
# Keywords of `_sample` and of `forward` that our own loops understand.
KNOWN_KEYWORDS = frozenset(
    {
        "attention_mask",
        "logits_to_keep",
        CACHE,
        "position_ids",
        "router_threshold",
        "streamer",
        "synced_gpus",
        "use_cache",
    }
)
CACHE_IMPLEMENTATIONS = ("dynamic", "offloaded", "quantized", "static")


class FinishedRows(StoppingCriteriaList):
    """The stopping criteria of one `generate` call, which also remember the rows that have stopped."""

    mask: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.mask = done if self.mask is None else self.mask | done
        return done


class FinishedBeams:
    """The rows of a beam search whose result can no longer change."""

    def __init__(self, num_beams: int):
        self.num_beams = num_beams
        self.mask: torch.Tensor | None = None


_finished_beams: ContextVar[FinishedBeams | None] = ContextVar("finished_beams", default=None)


class CiterGenerationMixin(GenerationMixin):
    """The hooks of transformers' `generate` that a pair of models needs."""

    @wraps(GenerationMixin.generate)
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(INPUTS_EMBEDS_ERROR)
        check_cache_implementation(kwargs.get("cache_implementation"))
        return with_both_names(super().generate(inputs, *args, **with_cache_name(kwargs)))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: continuous batching (`generate_batch`) needs paged caches, which hold one model."""
        raise ValueError(
            "generate_batch: continuous batching keeps one model's keys and values in pages, and a pair has two "
            "models. Use generate() with a padded batch."
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        threshold = model_kwargs.get("router_threshold")
        if threshold is not None:
            as_threshold(threshold, threshold.numel() if isinstance(threshold, torch.Tensor) else None)
        waiting_policy(model_kwargs.get("waiting_rows"))
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != "waiting_rows"})

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE)
        if given is not None:
            check_cache(given)
        elif generation_config.use_cache is not False:
            check_cache_implementation(generation_config.cache_implementation)
            model_kwargs[CACHE] = self._make_cache(generation_config)
            if generation_config.cache_implementation == "static":
                wanted = check_max_cache_len(generation_config.max_cache_len)
                model_kwargs[CACHE].max_cache_len = max(max_cache_length, wanted)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _make_cache(self, generation_config: GenerationConfig) -> CiterCache:
        def one(config: PreTrainedConfig) -> Any:
            if generation_config.cache_implementation == "quantized":
                options = copy.deepcopy(generation_config.cache_config) or {}
                return QuantizedCache(**{"backend": "quanto", **options, "config": config})
            if generation_config.cache_implementation == "offloaded":
                return DynamicCache(config=config, offloading=True)
            return growing_cache(config)

        config: Any = self.config
        return CiterCache(config, slm=one(config.slm_config), llm=one(config.llm_config))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of one step; see transformers."""
        finished = kwargs.pop("finished_rows", None)
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **with_cache_name(kwargs))
        if finished is not None and finished.mask is not None:
            model_inputs["finished_rows"] = finished.mask
        return model_inputs

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        waiting_rows = kwargs.pop("waiting_rows", None)
        begin_record(input_ids, generation_config, kwargs)
        decoding = self._plan(input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        together = input_ids.shape[0] > 1 and (
            waiting_rows == 1 or decoding is None or not rows_can_part(self, decoding)
        )
        if asks_for_static(kwargs.get(CACHE)) and decodes_statically(decoding, self):
            logits = self._prefill(input_ids, generation_config, kwargs).logits
            with self._optimize_model_for_decode():
                return decode_static(self, decoding, logits, waiting_policy(waiting_rows))
        if decoding is not None and not together:
            logits = self._prefill(input_ids, generation_config, kwargs).logits
            with self._optimize_model_for_decode():
                if input_ids.shape[0] == 1:
                    return decode_one_row(self, decoding, logits)
                return decode_rows(self, decoding, logits, waiting_policy(waiting_rows))
        finished = FinishedRows(stopping_criteria)
        return super()._sample(
            input_ids, logits_processor, finished, generation_config, finished_rows=finished, **kwargs
        )

    def _plan(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        kwargs: dict[str, Any],
    ) -> Decoding | None:
        """Return what our own loops need to know, or `None` where only transformers' loop does what is asked for."""
        cache = kwargs.get(CACHE)
        wants_states = generation_config.output_attentions or generation_config.output_hidden_states
        if cache is None or kwargs.get("use_cache") is False or kwargs.get("synced_gpus") or wants_states:
            return None
        if generation_config.is_assistant or stopping_criteria.max_length is None or self._forward_is_observed():
            return None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if any(one is not None and one.dim() != 2 for one in (mask, positions)) or set(kwargs) - KNOWN_KEYWORDS:
            return None
        threshold = kwargs.get("router_threshold")
        threshold = as_threshold(self.config.router_threshold if threshold is None else threshold, len(input_ids))
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.to(input_ids.device)
        return Decoding(
            input_ids=input_ids,
            processors=logits_processor,
            stops=Stops(stopping_criteria),
            settings=generation_config,
            cache=cache,
            threshold=threshold,
            attention_mask=mask,
            position_ids=positions,
            streamer=kwargs.get("streamer"),
            runs_plain_models=all(map(is_plain, (self.slm, self.llm))) and all_grow(cache.slm) and all_grow(cache.llm),
        )

    def _forward_is_observed(self) -> bool:
        """Whether somebody has a stake in every call of `forward`: a hook, a compiled or a changed method."""
        cls: Any = type(self)
        hooks = self._forward_hooks or self._forward_pre_hooks
        changed = "forward" in vars(self) or getattr(self, "_compiled_call_impl", None) is not None
        overridden = cls.forward is not cls.forward_of_the_pair or (
            cls.prepare_inputs_for_generation is not CiterGenerationMixin.prepare_inputs_for_generation
        )
        return bool(hooks) or changed or overridden

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("waiting_rows", None)
        begin_record(input_ids, generation_config, kwargs)
        return super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("waiting_rows", None)
        if asks_for_static(kwargs.get(CACHE)):
            warn_of_dynamic_cache("beams reorder their rows at every token")
        finished = FinishedBeams(generation_config.num_beams)
        begin_record(input_ids, generation_config, kwargs, follows_beams=True)
        token = _finished_beams.set(finished)
        try:
            output = super()._beam_search(
                input_ids, logits_processor, stopping_criteria, generation_config, finished_rows=finished, **kwargs
            )
        finally:
            _finished_beams.reset(token)
        if cache_of(output) is not None:
            cache_of(output).routing.follow_beams(output.beam_indices)
        return output

    @staticmethod
    def _beam_search_has_unfinished_sequences(
        is_early_stop_heuristic_unsatisfied: torch.Tensor,
        is_sent_finished: torch.Tensor,
        next_token_hits_stopping_criteria: torch.Tensor,
        early_stopping: bool | str,
    ) -> Any:
        finished = _finished_beams.get()
        if finished is not None:
            full = is_sent_finished.all(dim=1) & (early_stopping is True)
            cannot_improve = ~is_early_stop_heuristic_unsatisfied.reshape(-1)
            finished.mask = (full | cannot_improve).repeat_interleave(finished.num_beams)
        return GenerationMixin._beam_search_has_unfinished_sequences(
            is_early_stop_heuristic_unsatisfied, is_sent_finished, next_token_hits_stopping_criteria, early_stopping
        )

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        threshold = (model_kwargs or {}).get("router_threshold")
        for processor in processors:
            # Classifier-free guidance runs the model a second time, and knows nothing of thresholds.
            if getattr(processor, "model", None) is self and threshold is not None:
                processor.model = partial(self.__call__, router_threshold=threshold)
        return processors

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit: a pair of models has no layers of its own to leave early. Pass "
                "assistant_model=model.slm, or prompt_lookup_num_tokens=..., instead."
            )
        model_kwargs = {key: value for key, value in model_kwargs.items() if key not in OWN_KEYWORDS}
        return super()._get_candidate_generator(generation_config, *args, model_kwargs=model_kwargs, **kwargs)


INPUTS_EMBEDS_ERROR = (
    "inputs_embeds: the two models have an embedding space each, so that one tensor of embeddings cannot be read by "
    "both. Pass input_ids."
)


def begin_record(
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    follows_beams: bool = False,
) -> None:
    """Begin a new record of routing in the cache, at the first token that this call generates."""
    cache = model_kwargs.get(CACHE)
    if cache is None:
        return
    mask = model_kwargs.get("attention_mask")
    # transformers drops a mask that is all ones, and notes its length: with a cache it is that of the whole text.
    length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", 0)
    cache.routing = Routing(max(length, input_ids.shape[1]), follows_beams)


def is_plain(model: PreTrainedModel) -> bool:
    """Say whether a forward pass only computes: no weights are moved in, unpacked or gathered on the way."""
    moved = any(hasattr(module, "_hf_hook") for module in (model, *model.children()))
    return not (moved or getattr(model, "is_quantized", False) or getattr(model, "_tp_size", None))


def check_cache(cache: Any) -> None:
    """Refuse a cache that has no room for the LLM."""
    # By name: a repository's own copy of this file has a class of its own.
    if type(cache).__name__ != CiterCache.__name__:
        raise TypeError(
            f"past_key_values: expected a CiterCache, got {type(cache).__name__}, which has no room for the LLM's "
            "keys and values. Make one with `from citer_hf import CiterCache; CiterCache(model.config)`."
        )


def check_cache_implementation(name: str | None) -> None:
    """Refuse a kind of cache that two models cannot share."""
    if name is not None and name not in CACHE_IMPLEMENTATIONS:
        raise ValueError(
            f"cache_implementation: expected one of {list(CACHE_IMPLEMENTATIONS)}, got {name!r}, which a pair of "
            "models does not support. Leave it out for a dynamic cache."
        )


def check_max_cache_len(length: int | None) -> int:
    """Return the room that a static cache has at least."""
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(
            f"max_cache_len: expected a number of tokens from 1, got {length!r}. Leave it out for as many as the text "
            "may need."
        )
    return length or 0
