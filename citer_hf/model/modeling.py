"""CiterForCausalLM: a small and a large language model that generate as one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache import CiterCache
from .compat import CACHE, BothCacheNames, cache_name, given_cache
from .compiled import CompiledSteps
from .configuration import CiterConfig, check_threshold_value
from .forward import below, in_one_piece, keep, marginal, real_text, to_device
from .generation import INPUTS_EMBEDS_ERROR, CiterGenerationMixin, check_cache, check_threshold_tensor
from .hidden_states import Watched, hidden_size_of, mark_initialized, set_heard, watch, watched
from .loading import CiterLoadingMixin
from .memory import explained, is_out_of_memory
from .pair import check_pair
from .routers import CUSTOM_ROUTER, build_router
from .sharing import CiterSharingMixin

MODELS = ("slm", "llm")
SLM_OUTPUTS = ("output_hidden_states", "output_attentions")


@dataclass
class CiterOutputWithPast(BothCacheNames, CausalLMOutputWithPast):
    """What `CiterForCausalLM.forward` returns.

    Args:
        loss: Language modelling loss, a number, when labels were given.
        logits: `[batch, kept, vocabulary]`, each position's from the model that writes its token.
        past_key_values: The `CiterCache`, with the record in its `routing`; `cache` is another name of it.
        hidden_states: The SLM's, when asked for.
        attentions: The SLM's, when asked for.
        router_scores: `p_slm` of the kept positions, `[batch, kept]`.
        routed_to_llm: Whether the LLM writes the token that follows each kept position, bool `[batch, kept]`.
    """

    router_scores: torch.FloatTensor | None = None
    routed_to_llm: torch.BoolTensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return what is there as the tuple of every causal language model, which has no place for routing."""
        return tuple(self[key] for key in self.keys() if key not in ("router_scores", "routed_to_llm"))


class CiterForCausalLM(CiterLoadingMixin, CiterSharingMixin, CiterGenerationMixin, PreTrainedModel):
    """Two causal language models and a router that decides, token by token, which of them writes (CITER, section 3).

    Args:
        config: The configuration. Both models are built from it with fresh weights, unless they are given.
        slm: The small language model.
        llm: The large language model.
        router: A router of a class of one's own; by default the one that `config.router` describes.

    Raises:
        ValueError: when the two models cannot work as a pair, or the router does not fit the SLM.
    """

    config_class = CiterConfig
    config: CiterConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # No gradient ever flows through the frozen base models, so that there is nothing to checkpoint.
    supports_gradient_checkpointing = False

    slm: PreTrainedModel
    llm: PreTrainedModel
    router: nn.Module

    def __init__(
        self,
        config: CiterConfig,
        slm: PreTrainedModel | None = None,
        llm: PreTrainedModel | None = None,
        router: nn.Module | None = None,
    ):
        super().__init__(config)
        for given in (slm, llm, router):
            if given is not None:
                mark_initialized(given)
        slm = slm if slm is not None else AutoModelForCausalLM.from_config(config.slm_config, trust_remote_code=False)
        llm = llm if llm is not None else AutoModelForCausalLM.from_config(config.llm_config, trust_remote_code=False)
        check_pair(slm, llm)
        self.slm, self.llm = slm, llm
        config.slm_config, config.llm_config = slm.config, llm.config
        config._attn_implementation_internal = slm.config._attn_implementation
        self.vocab_size = config.vocab_size
        self.router = router if router is not None else build_router(config.router, hidden_size_of(slm))
        if hasattr(self.router, "bind"):
            self.router.bind(slm)  # type: ignore[operator]
        if router is not None and config.router["type"] == CUSTOM_ROUTER:
            config.router["class"] = type(router).__name__
        self._is_stateful = bool(slm._is_stateful or llm._is_stateful)
        self._accepted = {
            name: frozenset(inspect.signature(getattr(self, name).forward).parameters) for name in MODELS
        }
        self._cache_names = {name: cache_name(getattr(self, name)) or CACHE for name in MODELS}
        self.generation_config = GenerationConfig.from_dict(llm.generation_config.to_dict())
        self.compiled_steps = CompiledSteps()
        self._freeze_base_models()
        watch(slm)
        self.post_init()

    def _freeze_base_models(self) -> None:
        for model in (self.slm, self.llm):
            model.requires_grad_(False)
            model.eval()

    def _init_weights(self, module: nn.Module) -> None:
        # The base models initialise themselves; what is left is the router. The 0.02 of a language model would make
        # every fresh score 0.5 up to rounding.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    @property
    def base_model(self) -> nn.Module:
        """The SLM, which reads every token: what transformers asks of a base model is there."""
        return self.slm

    def train(self, mode: bool = True) -> CiterForCausalLM:
        """Set the router to training or evaluation; the base models stay in evaluation."""
        super().train(mode)
        self.slm.eval()
        self.llm.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the SLM's input embeddings."""
        return self.slm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the SLM's input embeddings."""
        self.slm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the SLM's output embeddings."""
        return self.slm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the SLM's output embeddings."""
        self.slm.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary tables of both models.

        Args:
            new_num_tokens: Rows of the new tables; `None` only returns the SLM's embeddings.
            args: As in transformers, for both models.
            kwargs: As in transformers, for both models.
        """
        self.llm.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        embeddings = self.slm.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        watch(self.slm)
        self.vocab_size = self.config.vocab_size
        return embeddings

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: CiterCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        router_threshold: float | torch.Tensor | None = None,
        finished_rows: torch.Tensor | None = None,
        cache: CiterCache | None = None,
        **kwargs: Any,
    ) -> CiterOutputWithPast:
        """Run the SLM, score its state, and run the LLM where a kept position needs it (CITER, section 3).

        In evaluation the loss is that of the routed logits. In training it is the marginal likelihood over the two
        writers, `p_slm · P_SLM(y) + (1 - p_slm) · P_LLM(y)`, which has a gradient with respect to the router
        (Co-LLM's objective); the base models are frozen.

        Args:
            input_ids: New tokens, `[batch, tokens]`.
            attention_mask: 1 for tokens and 0 for padding on the left, `[batch, cached + tokens]`.
            position_ids: Positions of the new tokens, `[batch or 1, tokens]`.
            past_key_values: What was read before.
            labels: Targets, shifted inside, -100 where there is none, `[batch, tokens]`.
            use_cache: Whether to make and return a cache when none is given. Default: the configuration's.
            logits_to_keep: How many of the last positions to decide and return, 0 for all, or their indices.
            router_threshold: The SLM writes where `p_slm` reaches it: a number or `[batch]`. Default: the
                configuration's.
            finished_rows: Rows whose text has ended, bool `[batch]`. They never cause a pass of the LLM.
            cache: Another name of `past_key_values`, which transformers uses since 5.24.
            kwargs: For both models' `forward`; `output_hidden_states` and `output_attentions` for the SLM's.

        Raises:
            ValueError: for input embeddings, no input, a threshold that means nothing, a cache of another batch, or
                two caches.
            TypeError: for a cache that is not a `CiterCache`.
            torch.OutOfMemoryError: when a model runs out of memory (on a CPU, torch's `RuntimeError`); it says which
                model, what that needs, and what helps.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError(INPUTS_EMBEDS_ERROR)
        if input_ids is None:
            raise ValueError("input_ids: expected token ids [batch, tokens], got None.")
        past_key_values = given_cache(past_key_values, cache)
        if past_key_values is not None:
            check_cache(past_key_values)
            past_key_values.check_batch_size(input_ids.shape[0])
        elif self.config.use_cache if use_cache is None else use_cache:
            past_key_values = CiterCache(self.config)
        threshold = self._threshold(router_threshold, input_ids.shape[0], past_key_values)
        inputs = {"attention_mask": attention_mask, "use_cache": past_key_values is not None}

        if not torch.compiler.is_compiling():
            # Somebody may have put another head on the SLM.
            watch(self.slm)
        slm_cache = None if past_key_values is None else past_key_values.slm
        slm_kwargs = {**{name: True for name in SLM_OUTPUTS if getattr(self.config, name)}, **kwargs}
        slm_output, hidden = self._run_slm(input_ids, position_ids, slm_cache, logits_to_keep, inputs, slm_kwargs)
        slm_logits = slm_output.logits[..., : self.vocab_size]
        scores = self.router(hidden, slm_logits)
        to_llm = below(scores, threshold)
        if finished_rows is not None:
            to_llm &= ~finished_rows.to(to_llm.device)[:, None]
        if past_key_values is not None:
            past_key_values.add_tokens(input_ids, position_ids)

        logits, llm_logits = slm_logits, None
        if self.training or self._needs_llm(to_llm, past_key_values):
            llm_logits = self._catch_up(input_ids, position_ids, past_key_values, logits_to_keep, inputs, kwargs)
            logits = torch.where(to_llm[..., None], llm_logits, slm_logits)
        if past_key_values is not None:
            first = past_key_values.get_seq_length() - scores.shape[1] + 1
            unfinished = real_text(to_llm, attention_mask, finished_rows, input_ids.shape[1], logits_to_keep)
            past_key_values.routing.add(first, scores.detach(), to_llm, unfinished)

        loss = None
        if labels is not None:
            predicted = logits if llm_logits is None or not self.training else marginal(scores, slm_logits, llm_logits)
            loss = self.loss_function(predicted, labels, vocab_size=self.vocab_size, **kwargs)
        return CiterOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: past_key_values},
            hidden_states=slm_output.hidden_states,
            attentions=slm_output.attentions,
            router_scores=scores,
            routed_to_llm=to_llm,
        )

    # What a subclass that changes `forward` is told by: `generate` then calls it for every token.
    forward_of_the_pair = forward

    def _threshold(
        self, threshold: float | torch.Tensor | None, batch_size: int, cache: CiterCache | None
    ) -> float | torch.Tensor:
        if threshold is None:
            threshold = self.config.router_threshold
        if not isinstance(threshold, torch.Tensor):
            return check_threshold_value(threshold)
        if threshold.shape != (batch_size,):
            raise ValueError(
                f"router_threshold: expected a number or a tensor [{batch_size}], one per row of input_ids, got a "
                f"tensor {list(threshold.shape)}."
            )
        # Reading the values waits for the device: once per text, not once per token.
        if cache is None or cache.get_seq_length() == 0:
            check_threshold_tensor(threshold)
        return threshold.to(self._device_near(threshold))[:, None]

    def _needs_llm(self, to_llm: torch.Tensor, cache: CiterCache | None) -> bool:
        # An exported graph cannot depend on what the router decides. Another thread's compilation is none of ours.
        traced = type(to_llm) is not torch.Tensor
        if torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and traced):
            return True
        if cache is not None:
            # Chunks of a prompt keep their last position too, but nobody asks for the token that follows it.
            undecided = cache.routing.start - (cache.get_seq_length() - to_llm.shape[1] + 1)
            if undecided > 0:
                to_llm = to_llm[:, undecided:]
        return to_llm.shape[1] > 0 and bool(to_llm.any())

    def _run_slm(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Any,
        logits_to_keep: int | torch.Tensor,
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, torch.Tensor]:
        """Return the SLM's output with the kept logits, and its last hidden state there, `[batch, kept, H]`."""
        captured: list[torch.Tensor] = []
        if torch.compiler.is_dynamo_compiling():
            head = self.slm.get_output_embeddings()
            set_heard(head, captured)
            output = self._call("slm", input_ids, position_ids, cache, logits_to_keep, inputs, kwargs)
            set_heard(head, None)
            return self._kept(output, captured[-1], logits_to_keep)
        token = watched.set(Watched(captured, bool(kwargs.get("output_hidden_states"))))
        try:
            output = self._call("slm", input_ids, position_ids, cache, logits_to_keep, inputs, kwargs)
        finally:
            watched.reset(token)
        return self._kept(output, captured[-1], logits_to_keep)

    def _kept(self, output: Any, hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> tuple[Any, torch.Tensor]:
        if "logits_to_keep" not in self._accepted["slm"]:
            output.logits = keep(output.logits, logits_to_keep)
            hidden = keep(hidden, logits_to_keep)
        return output, hidden

    def _catch_up(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: CiterCache | None,
        logits_to_keep: int | torch.Tensor,
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Let the LLM read everything it has not seen, and return its logits at the kept positions."""
        length = input_ids.shape[1]
        if cache is not None:
            input_ids, position_ids = cache.unseen_tokens()
        # What is kept is counted within the new tokens, which are the last of those that the LLM reads now.
        earlier = input_ids.shape[1] - length
        if earlier and isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep + earlier
        elif earlier:
            logits_to_keep = logits_to_keep or length
        kwargs = {key: value for key, value in kwargs.items() if key not in SLM_OUTPUTS}
        own_cache = None if cache is None else cache.llm
        logits = self._run_llm(input_ids, position_ids, own_cache, logits_to_keep, inputs, kwargs)
        if cache is not None:
            cache.mark_seen()
            cache.routing.llm_calls += 1
        return logits

    def _run_llm(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Any,
        logits_to_keep: int | torch.Tensor,
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return the LLM's logits at the kept positions, on the SLM's device."""
        logits = self._call("llm", input_ids, position_ids, cache, logits_to_keep, inputs, kwargs).logits
        if "logits_to_keep" not in self._accepted["llm"]:
            logits = keep(logits, logits_to_keep)
        return logits[..., : self.vocab_size].to(self._device_near(input_ids))

    def _device_near(self, inputs: torch.Tensor) -> torch.device:
        """Return where the SLM's output is: where its input is, when all of its weights are offloaded."""
        device: torch.device = self.slm.device
        return inputs.device if device.type == "meta" else device

    def _call(
        self,
        name: str,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Any,
        logits_to_keep: int | torch.Tensor,
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        model, accepted = getattr(self, name), self._accepted[name]
        inputs = {**inputs, self._cache_names[name]: cache}
        if "position_ids" in accepted:
            inputs["position_ids"] = position_ids
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = in_one_piece(logits_to_keep, input_ids)
        device = model.device
        if device != input_ids.device and device.type != "meta":
            input_ids = input_ids.to(device)
            inputs = {key: to_device(value, device) for key, value in inputs.items()}
        try:
            return model(input_ids=input_ids, return_dict=True, **inputs, **kwargs)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            rows, tokens = input_ids.shape
            # A cache tells how long its text is as far as the pass has come.
            length = max(tokens, 0 if cache is None else int(cache.get_seq_length()))
            raise explained(error, name, model, rows, tokens, length) from error
