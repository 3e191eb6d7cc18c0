"""CiterForCausalLM: a small and a large language model that generate as one."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache import CiterCache, check_cache
from .compat import CACHE, BothCacheNames, given_cache, keywords_of
from .compiled import CompiledSteps
from .configuration import CiterConfig, router_width
from .generation import CiterGenerationMixin
from .loading import CiterLoadingMixin
from .references import check_pair
from .routers import CUSTOM_ROUTER, UNTRAINED, as_threshold, as_veto, build_router, defer, marginal, takes_back
from .saving import CiterSharingMixin
from .schedule import SHARED_RATIO, Pace
from .support import is_shared

SLM_OUTPUTS = ("hidden_states", "attentions")


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
    routed_to_llm: torch.Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return what is there as the tuple of every causal language model, which has no place for routing."""
        return tuple(self[key] for key in self.keys() if key not in ("router_scores", "routed_to_llm"))


class SlmOutput(NamedTuple):
    """What `run_slm` returns, at the kept positions."""

    logits: torch.Tensor  # [batch, kept, vocabulary]
    hidden: torch.Tensor  # [batch, kept, H], the last hidden state, which routers see
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

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
        # `post_init` initialises what is new, and nothing that is given.
        for module in (module for given in (slm, llm, router) if given is not None for module in given.modules()):
            module._is_hf_initialized = True
        slm = slm if slm is not None else AutoModelForCausalLM.from_config(config.slm_config, trust_remote_code=False)
        llm = llm if llm is not None else AutoModelForCausalLM.from_config(config.llm_config, trust_remote_code=False)
        check_pair(slm, llm)
        self.slm, self.llm = slm, llm
        config.slm_config, config.llm_config = slm.config, llm.config
        config._attn_implementation_internal = slm.config._attn_implementation
        self.vocab_size = config.vocab_size
        self.router = router if router is not None else build_router(config.router, router_width(slm.config))
        if hasattr(self.router, "bind"):
            self.router.bind(slm)  # type: ignore[operator]
        if router is not None and config.router["type"] == CUSTOM_ROUTER:
            config.router["class"] = type(router).__name__
        self._is_stateful = bool(slm._is_stateful or llm._is_stateful)
        self._keywords = {type(model): keywords_of(model) for model in (slm, llm)}
        self.generation_config = GenerationConfig.from_dict(llm.generation_config.to_dict())
        # Otherwise transformers drops `router_threshold` from these settings when they are loaded again.
        self.generation_config._from_model_config = False
        # What earlier generations have measured and compiled: it changes their speed, never their text.
        # Processes that share a model must call it together, and so their clocks must not decide.
        self.pace = Pace(SHARED_RATIO if is_shared(slm) or is_shared(llm) else None)
        self.compiled_steps = CompiledSteps()
        for model in (slm, llm):
            model.requires_grad_(False)
            model.eval()
        install_hook(slm)
        self.post_init()

    @property
    def default_veto(self) -> float:
        """Return the veto without a keyword: that of the generation settings, or else the configuration's."""
        veto = getattr(self.generation_config, "llm_veto", None)
        return self.config.llm_veto if veto is None else veto

    @property
    def default_threshold(self) -> float:
        """Return the threshold without a keyword: that of the generation settings, or else the configuration's."""
        threshold = getattr(self.generation_config, "router_threshold", None)
        return self.config.router_threshold if threshold is None else threshold

    def _init_weights(self, module: nn.Module) -> None:
        # The base models initialise themselves; what is left is the router. The 0.02 of a language model would make
        # every fresh score 0.5 up to rounding.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    @property
    def base_model(self) -> nn.Module:
        """The SLM, which processes every token: what transformers asks of a base model (embeddings) is there."""
        return self.slm

    def train(self, mode: bool = True) -> "CiterForCausalLM":
        """Set the router to training or evaluation; the base models stay in evaluation."""
        if mode:
            self.config.router.pop(UNTRAINED, None)
        super().train(mode)
        self.slm.eval()
        self.llm.eval()
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.slm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.slm.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary tables of both models; the arguments are those of transformers."""
        self.llm.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        embeddings = self.slm.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        install_hook(self.slm)
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
        llm_veto: float | torch.Tensor | None = None,
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
            past_key_values: The cache of the tokens before.
            labels: Targets, shifted inside, -100 where there is none, `[batch, tokens]`.
            use_cache: Whether to make and return a cache when none is given. Default: the configuration's.
            logits_to_keep: How many of the last positions to decide and return, 0 for all, or their indices.
            router_threshold: The SLM writes where `p_slm` reaches it: a number from 0 to 2, or `[batch]`. Default:
                the configuration's.
            llm_veto: The LLM takes back the SLM's token when it gives it less than this part of its best token's
                probability: a number from 0 to 1 (all logits are the LLM's), or `[batch]`. Default: the
                configuration's. Above 0, the LLM runs in every pass.
            finished_rows: Sequences that have ended, bool `[batch]`. They never cause a pass of the LLM.
            cache: Another name of `past_key_values`, which transformers uses since 5.24.
            kwargs: For both models, as far as their `forward` takes them; `output_hidden_states` and
                `output_attentions` for the SLM, `num_items_in_batch` for the loss.

        Raises:
            ValueError: for input embeddings, no input, an invalid threshold, a cache of another batch, or two caches.
            TypeError: for a cache that is not a `CiterCache`.
        """
        if kwargs.pop("inputs_embeds", None) is not None or input_ids is None:
            raise ValueError("input_ids: expected token ids. inputs_embeds fit one of the two models at most.")
        past_key_values = given_cache(past_key_values, cache)
        if past_key_values is not None:
            check_cache(past_key_values, input_ids.shape[0])
        elif self.config.use_cache if use_cache is None else use_cache:
            past_key_values = CiterCache(self.config)
        threshold = self.config.router_threshold if router_threshold is None else router_threshold
        threshold = as_threshold(threshold, input_ids.shape[0])
        veto = as_veto(self.config.llm_veto if llm_veto is None else llm_veto, input_ids.shape[0])

        # 1. The SLM processes the new tokens, and the router scores its state: [batch, kept].
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        wanted = [f"output_{name}" for name in SLM_OUTPUTS if getattr(self.config, f"output_{name}")]
        slm_cache = None if past_key_values is None else past_key_values.slm
        slm = self.run_slm(input_ids, slm_cache, logits_to_keep, **{**dict.fromkeys(wanted, True), **inputs})
        scores = self.router(slm.hidden, slm.logits)
        to_llm, may_veto = defer(scores, threshold), vetoes(veto, threshold, scores)
        if finished_rows is not None:
            to_llm &= ~finished_rows.to(to_llm.device)[:, None]
            may_veto &= ~finished_rows.to(to_llm.device)[:, None]
        if past_key_values is not None:
            past_key_values.add_tokens(input_ids, position_ids)

        # 2. The LLM catches up where it decides a token that anybody asks for: [batch, kept, vocabulary].
        logits, llm_logits = slm.logits, None
        vetoed, agreed = torch.zeros_like(to_llm), torch.zeros_like(to_llm)
        if self.training or self._needs_llm(to_llm | may_veto, past_key_values):
            llm_logits = self.catch_up(input_ids, past_key_values, logits_to_keep, **inputs)
            tokens = slm.logits.argmax(-1)
            agreed = to_llm & (tokens == llm_logits.argmax(-1))
            vetoed = ~to_llm & may_veto & takes_back(tokens, llm_logits, veto)
            to_llm = to_llm | vetoed
            # A veto of 1 leaves nothing but the LLM's own tokens.
            by_llm = to_llm | vetoes(veto, threshold, scores, above=1.0)
            logits = torch.where(by_llm[..., None], llm_logits, slm.logits)

        # 3. The record of decisions, and the loss.
        if past_key_values is not None:
            real = torch.ones_like(to_llm)
            if attention_mask is not None and attention_mask.dim() == 2:
                real &= keep(attention_mask[:, -input_ids.shape[1] :], logits_to_keep).to(real.device).bool()
            if finished_rows is not None:
                real &= ~finished_rows.to(real.device)[:, None]
            first = past_key_values.get_seq_length() - scores.shape[1] + 1
            past_key_values.routing.add(first, scores.detach(), to_llm, vetoed, agreed, real)
            past_key_values.routing.slm_calls += 1
        loss = None
        if labels is not None:
            predicted = logits if llm_logits is None or not self.training else marginal(scores, slm.logits, llm_logits)
            loss = self.loss_function(predicted, labels, vocab_size=self.vocab_size, **kwargs)
        return CiterOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: past_key_values},
            hidden_states=slm.hidden_states,
            attentions=slm.attentions,
            router_scores=scores,
            routed_to_llm=to_llm,
        )

    # `generate` calls `forward` for every token where a subclass has changed it.
    forward_of_the_pair = forward

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

    def run_slm(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **inputs: Any,
    ) -> SlmOutput:
        """Run the SLM alone.

        Args:
            input_ids: New tokens, `[batch, tokens]`.
            cache: A cache of the SLM, such as `CiterCache.slm`.
            logits_to_keep: As in `forward`.
            inputs: `attention_mask`, `position_ids` and others, as far as the SLM's `forward` takes them.

        Returns:
            Logits and last hidden state at the kept positions.
        """
        captured: list[torch.Tensor] = []
        if torch.compiler.is_dynamo_compiling():
            head = self.slm.get_output_embeddings()
            setattr(head, CAPTURED, captured)
            output = self._run("slm", input_ids, cache, logits_to_keep, inputs)
            setattr(head, CAPTURED, None)
        else:
            # Somebody may have put another head on the SLM.
            install_hook(self.slm)
            token = capture.set(captured)
            try:
                output = self._run("slm", input_ids, cache, logits_to_keep, inputs)
            finally:
                capture.reset(token)
        if not captured:
            raise ValueError(f"slm: {type(self.slm).__name__} does not call its output embeddings. Choose another.")
        logits, hidden = output.logits, captured[-1]
        if "logits_to_keep" not in self._keywords[type(self.slm)].named:
            logits, hidden = keep(logits, logits_to_keep), keep(hidden, logits_to_keep)
        states, attentions = (getattr(output, name, None) for name in SLM_OUTPUTS)
        return SlmOutput(logits[..., : self.vocab_size], hidden, states, attentions)

    def run_llm(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **inputs: Any,
    ) -> torch.Tensor:
        """Run the LLM alone; the arguments are those of `run_slm`.

        Returns:
            Logits at the kept positions, `[batch, kept, vocabulary]`, on the SLM's device.
        """
        logits: torch.Tensor = self._run("llm", input_ids, cache, logits_to_keep, inputs).logits
        if "logits_to_keep" not in self._keywords[type(self.llm)].named:
            logits = keep(logits, logits_to_keep)
        # Where all of the SLM's weights are offloaded, its output is where its input is.
        device = input_ids.device if self.slm.device.type == "meta" else self.slm.device
        return logits[..., : self.vocab_size].to(device)

    def catch_up(
        self, input_ids: torch.Tensor, cache: CiterCache | None, logits_to_keep: int | torch.Tensor = 0, **inputs: Any
    ) -> torch.Tensor:
        """Run the LLM over everything that it has not seen, up to `input_ids`; return the logits of `run_llm`."""
        inputs = {key: value for key, value in inputs.items() if not key.startswith("output_")}
        if cache is None:
            return self.run_llm(input_ids, None, logits_to_keep, **inputs)
        kept = input_ids.shape[1]
        input_ids, inputs["position_ids"] = cache.unseen_tokens()
        # Kept positions are counted within the new tokens, which are the last of those that the LLM processes now.
        earlier = input_ids.shape[1] - kept
        if earlier and isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep + earlier
        elif earlier:
            logits_to_keep = logits_to_keep or kept
        logits = self.run_llm(input_ids, cache.llm, logits_to_keep, **inputs)
        cache.mark_seen()
        cache.routing.llm_calls += 1
        return logits

    def _run(
        self, role: str, input_ids: torch.Tensor, cache: Cache | None, kept: int | torch.Tensor, inputs: dict[str, Any]
    ) -> Any:
        model: PreTrainedModel = getattr(self, role)
        if type(model) not in self._keywords:
            self._keywords[type(model)] = keywords_of(model)
        keywords = self._keywords[type(model)]
        batch, tokens = input_ids.shape
        if batch > 1 and not isinstance(kept, torch.Tensor) and 0 < kept < tokens:
            # Indices let the model copy the last positions of several sequences before its head multiplies them.
            kept = torch.arange(tokens - kept, tokens, device=input_ids.device)
        own = {"input_ids": input_ids, keywords.cache: cache, "use_cache": cache is not None}
        own |= {"logits_to_keep": kept, "return_dict": True}
        inputs = {key: value for key, value in (inputs | own).items() if keywords.take(key)}
        device = model.device
        if device != input_ids.device and device.type != "meta":
            inputs = send_to_device(inputs, device)
        return model(**inputs)


def vetoes(
    veto: float | torch.Tensor, threshold: float | torch.Tensor, scores: torch.Tensor, above: float = 1e-38
) -> torch.Tensor:
    """Return where there is a veto of at least so much, bool `[batch, kept]`; a threshold of 0 is the SLM alone."""
    both = (veto, above), (threshold, 1e-38)
    may = torch.ones_like(scores, dtype=torch.bool)
    for value, least in both:
        may &= value.to(scores.device) >= least if isinstance(value, torch.Tensor) else value >= least
    return may


def keep(values: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Select positions as `logits_to_keep` says, for models that do not know it."""
    if isinstance(logits_to_keep, torch.Tensor):
        return values[:, logits_to_keep]
    return values[:, -logits_to_keep:] if logits_to_keep else values


# The input of the SLM's output embeddings is its last hidden state. The hook stays, and acts for the thread that asks.
capture: ContextVar[list[torch.Tensor] | None] = ContextVar("capture", default=None)
# A compiler cannot trace a context variable. It traces in one thread only, and a list that is set and taken away again
# within one trace is never there when the model runs.
CAPTURED = "_citer_captured"


def capture_head_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    captured = module.__dict__.get(CAPTURED)
    if captured is None and not torch.compiler.is_dynamo_compiling():
        captured = capture.get()
    if captured is not None:
        captured.append(args[0])


def install_hook(slm: PreTrainedModel) -> None:
    head = slm.get_output_embeddings()
    if capture_head_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(capture_head_input)
