"""How `generate` drives two models: which cache it makes, which sequences are finished, where the record starts."""

from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import StoppingCriteriaList
from transformers.utils import logging

from .batch import Call, decode, sequences_of, why_not_decoded
from .cache import CiterCache, Routing, check_cache
from .compat import CACHE, CiterBeamOutput, CiterGenerateOutput, cache_of, with_both_names, with_cache_name
from .quality import dials_of
from .routers import SLM_ALONE, as_threshold, as_veto
from .sequence import Sequence
from .slots import SlotCache

logger = logging.get_logger(__name__)

# Keywords of `forward` that an assistant model does not know.
OWN_KEYWORDS = ("router_threshold", "llm_veto", "finished_rows")
# Those of generation settings, which hold what the keywords of `generate` do not say.
SETTINGS = ("router_threshold", "llm_veto", "max_drafts")
CACHE_IMPLEMENTATIONS = ("dynamic", "static")


class FinishedRows(StoppingCriteriaList):
    """The stopping criteria of one `generate` call, which also remember the rows that have stopped."""

    mask: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.mask = done if self.mask is None else self.mask | done
        return done


class CiterGenerationMixin(GenerationMixin):
    """The hooks of transformers' `generate` that a pair of models needs."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        router_threshold: float | torch.Tensor | None = None,
        llm_veto: float | torch.Tensor | None = None,
        max_drafts: int | None = None,
        quality: float | None = None,
        **kwargs: Any,
    ) -> CiterGenerateOutput | CiterBeamOutput | torch.LongTensor:
        """Generate text, each token with the model that the router chooses.

        This is `generate` of transformers, with its decoding modes, processors, streamers and stopping criteria, and
        four keywords of its own. Generation settings are the LLM's, unless the router repository has others.

        Args:
            inputs: Token ids of the prompts, `[batch, tokens]`, padded on the left; also called `input_ids`.
            generation_config: Settings; those that are not set are the model's. It may hold the first three.
            args: Further arguments of transformers' `generate`.
            router_threshold: A token is flagged, and decided by the LLM, when its score does not reach this: a number
                from 0 (the SLM alone) to 2 (above 1: the LLM's own text), or a tensor `[batch]`. Default: that of the
                generation settings, or else of the configuration.
            llm_veto: The LLM takes back a token that is not flagged when it gives it less than this part of its best
                token's probability: a number from 0 (no veto) to 1 (the LLM's own text), or `[batch]`. Default: as
                above. Above 0, the LLM processes every token before it is final.
            max_drafts: Most flagged tokens of a sequence that the SLM drafts past before the LLM is called; 0: the LLM
                is called at the first flagged token, as published (CITER, section 3). The text does not depend on it.
                Default: decided from measured times.
            quality: Part of the LLM's accuracy that the text is to keep, above 0; 1: the LLM's own text. It stands for
                the threshold and the veto that `citer calibrate --quality` found for it.
            kwargs: Any setting of `GenerationConfig`, `attention_mask`, `past_key_values` (a `CiterCache`; also called
                `cache`), and other keywords of transformers' `generate`.

        Returns:
            Token ids `[batch, length]`, prompts included; with `return_dict_in_generate=True` an output whose
            `past_key_values.routing` tells which model wrote each token.

        Raises:
            ValueError: for an invalid threshold, veto or setting, a quality that was not calibrated for this pair,
                input embeddings, or a veto in a mode that cannot have one, such as beams.
            TypeError: for a cache that is not a `CiterCache`.
        """
        own = {"router_threshold": router_threshold, "llm_veto": llm_veto, "max_drafts": max_drafts}
        given = {key: value for key, value in own.items() if value is not None}
        if quality is not None:
            if given.keys() & {"router_threshold", "llm_veto"}:
                raise ValueError("quality: it stands for router_threshold and llm_veto. Give either it or them.")
            given |= dials_of(self, quality)
        kwargs |= given
        return with_both_names(super().generate(inputs, generation_config, *args, **with_cache_name(kwargs)))

    def as_sequence(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[Sequence, str]:
        """Return the sequence that `generate` would decode for one prompt, to be submitted to an engine.

        Args:
            input_ids: The prompt, `[1, tokens]`.
            kwargs: Other keywords of `generate`, without streamer and tokenizer.

        Returns:
            The sequence, and why only transformers' loop can decode it; "" where an engine can.
        """

        def collect(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **kw: Any,
        ) -> Any:
            begin_record(input_ids, generation_config, kw)
            self._check_remote(logits_processor, generation_config, kw)
            call = Call(input_ids, logits_processor, stopping_criteria, generation_config, kw)
            (sequence,) = sequences_of(self, call)
            sequence.slot = -1
            return sequence, why_not_decoded(self, call)

        return self.generate(input_ids, custom_generate=collect, **kwargs)  # type: ignore[return-value]

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        own = {name: kwargs.pop(name, None) for name in SETTINGS}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        for name in SETTINGS:
            # Taken out of the settings of this call, so that an assistant model never gets it.
            of_settings = vars(generation_config).pop(name, None)
            if own[name] is not None:
                model_kwargs[name] = own[name]
            elif of_settings is not None:
                # A veto among the settings is left out where it cannot be; one by keyword is an error there.
                model_kwargs["default_veto" if name == "llm_veto" else name] = of_settings
        return generation_config, model_kwargs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: continuous batching (`generate_batch`) needs paged caches, which hold one model."""
        raise ValueError("generate_batch: its paged cache holds one model, not two. Use generate() instead.")

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        for name, check in (("router_threshold", as_threshold), ("llm_veto", as_veto), ("default_veto", as_veto)):
            value = model_kwargs.get(name)
            if value is not None:
                check(value, value.numel() if isinstance(value, torch.Tensor) else None)
        drafts = model_kwargs.get("max_drafts")
        if drafts is not None and (isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 0):
            raise ValueError(f"max_drafts: expected a number of flagged tokens from 0, got {drafts!r}.")
        ours = ("max_drafts", "default_veto")
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in ours})

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int
    ) -> Any:
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            check_cache(cache)
            for role, config in (("slm", self.slm.config), ("llm", self.llm.config)):
                # Made without a configuration, an empty cache knows no layers yet.
                if type(getattr(cache, role)) is SlotCache and not getattr(cache, role).layers:
                    setattr(cache, role, SlotCache(config))
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = CiterCache(self.config)
            kind = generation_config.cache_implementation
            if kind is not None and kind not in CACHE_IMPLEMENTATIONS:
                logger.warning_once(f"cache_implementation={kind!r}: a pair of models uses its dynamic cache instead.")
            if kind == "static":
                model_kwargs[CACHE].max_cache_len = max(length, generation_config.max_cache_len or 0)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch, length)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
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
        begin_record(input_ids, generation_config, kwargs)
        self._check_remote(logits_processor, generation_config, kwargs)
        call = Call(input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        reason = why_not_decoded(self, call)
        if not reason:
            return decode(self, call)
        kwargs = self._as_plain_citer(reason, kwargs)
        finished = FinishedRows(stopping_criteria)
        return super()._sample(
            input_ids, logits_processor, finished, generation_config, finished_rows=finished, **kwargs
        )

    def _as_plain_citer(self, reason: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return keywords for transformers' loop, which calls `forward` for every token and knows no veto."""
        kwargs = dict(kwargs)
        asked, default = kwargs.pop("llm_veto", None), kwargs.pop("default_veto", self.config.llm_veto)
        kwargs.pop("max_drafts", None)
        veto = torch.as_tensor(default if asked is None else asked)
        if asked is not None and bool((veto > 0).any()):
            raise ValueError(
                f"llm_veto: expected 0 here, got {asked!r}. A veto takes tokens back, which cannot be done: {reason}. "
                "Leave out either."
            )
        if bool((veto > 0).any()):
            logger.warning_once(f"llm_veto={default!r} of the configuration is left out: {reason}.")
        if getattr(kwargs.get(CACHE), "max_cache_len", None) is not None:
            kwargs[CACHE].max_cache_len = None
            logger.warning_once(f"cache_implementation='static': a dynamic cache is used instead, since {reason}.")
        return {**kwargs, "llm_veto": 0.0}

    def _check_remote(self, processors: Any, settings: GenerationConfig, kwargs: dict[str, Any]) -> None:
        threshold = kwargs.get("router_threshold")
        threshold = self.config.router_threshold if threshold is None else threshold
        if getattr(self.llm, "is_remote", False) and bool((torch.as_tensor(threshold) > SLM_ALONE).any()):
            self.llm.check_call(processors, settings)

    def forward_is_observed(self) -> bool:
        """Whether somebody has a stake in every call of `forward`: a hook, a compiled or a changed method."""
        cls: Any = type(self)
        hooks = self._forward_hooks or self._forward_pre_hooks
        changed = "forward" in vars(self) or getattr(self, "_compiled_call_impl", None) is not None
        overridden = cls.forward is not cls.forward_of_the_pair or (
            cls.prepare_inputs_for_generation is not CiterGenerationMixin.prepare_inputs_for_generation
        )
        return bool(hooks) or changed or overridden

    def _assisted_decoding(
        self, input_ids: torch.Tensor, *, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        reason = "an assistant model drafts, which transformers verifies in its own loop"
        kwargs = self._as_plain_citer(reason, kwargs)
        begin_record(input_ids, generation_config, kwargs)
        return super()._assisted_decoding(input_ids, generation_config=generation_config, **kwargs)

    def _beam_search(self, input_ids: torch.Tensor, *, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        self._check_remote((), generation_config, kwargs)
        kwargs = self._as_plain_citer("beams reorder their sequences at every token", kwargs)
        begin_record(input_ids, generation_config, kwargs, follows_beams=True)
        output = super()._beam_search(input_ids, generation_config=generation_config, **kwargs)
        if cache_of(output) is not None:
            cache_of(output).routing.follow_beams(output.beam_indices)
        return output

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        threshold = (model_kwargs or {}).get("router_threshold")
        dials = {"llm_veto": 0.0} if threshold is None else {"llm_veto": 0.0, "router_threshold": threshold}
        for processor in processors:
            # Classifier-free guidance runs the model a second time, and knows nothing of our keywords.
            if getattr(processor, "model", None) is self:
                processor.model = partial(self.__call__, **dials)
        return processors

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        model_kwargs = {key: value for key, value in model_kwargs.items() if key not in OWN_KEYWORDS}
        return super()._get_candidate_generator(generation_config, *args, model_kwargs=model_kwargs, **kwargs)


def begin_record(
    input_ids: torch.Tensor, generation_config: GenerationConfig, kwargs: dict[str, Any], follows_beams: bool = False
) -> None:
    """Begin a new record of routing in the cache, at the first token that this call generates."""
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    if cache is not None:
        # transformers drops a mask that is all ones, and notes its length: with a cache it is that of the whole text.
        length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", 0)
        cache.routing = Routing(max(length, input_ids.shape[1]), follows_beams)
