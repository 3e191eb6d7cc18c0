"""Routers: which kinds there are, and the one place where a score becomes a decision."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

SLM_ALONE, LLM_ALONE = 0.0, 2.0


def as_dial(name: str, value: Any, highest: float, meaning: str, batch_size: int | None) -> Any:
    """Return a number from 0 to `highest`, or with a `batch_size` also one per sequence, `[batch_size, 1]`."""
    if isinstance(value, torch.Tensor) and batch_size is not None:
        # A traced graph cannot depend on values.
        traced = torch.compiler.is_compiling()
        in_range = traced or bool(((value >= 0) & (value <= highest)).all())
        if value.shape == (batch_size,) and value.dtype != torch.bool and in_range:
            return value[:, None]
    elif isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= highest:
        return float(value)
    several = "" if batch_size is None else f", or a tensor [{batch_size}] of such numbers, one per sequence"
    raise ValueError(f"{name}: expected a number from 0 {meaning}{several}; got {value!r}.")


def as_threshold(value: Any, batch_size: int | None = None) -> Any:
    """Return a valid `router_threshold`: a number, or with a `batch_size` also one per sequence, `[batch_size, 1]`."""
    meaning = "(the SLM alone) to 2 (above 1: the LLM alone)"
    return as_dial("router_threshold", value, LLM_ALONE, meaning, batch_size)


def as_veto(value: Any, batch_size: int | None = None) -> Any:
    """Return a valid `llm_veto`, as `as_threshold` returns a threshold."""
    return as_dial("llm_veto", value, 1.0, "(no veto) to 1 (every token is the LLM's own)", batch_size)


def defer(scores: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Return True where the LLM writes the token: where the score does not reach the threshold of `as_threshold`."""
    return scores < (threshold.to(scores) if isinstance(threshold, torch.Tensor) else threshold)


def takes_back(tokens: torch.Tensor, llm_logits: torch.Tensor, veto: float | torch.Tensor) -> torch.Tensor:
    """Return True where the LLM gives a token less than `veto` of its best token's probability: `[batch, tokens]`."""
    own = llm_logits.gather(-1, tokens[..., None])[..., 0] - llm_logits.amax(-1)
    return own.float().exp() < (veto.to(own.device) if isinstance(veto, torch.Tensor) else veto)


def marginal(scores: torch.Tensor, slm_logits: torch.Tensor, llm_logits: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of every token when the router draws the writer (Co-LLM's marginal likelihood)."""
    tiny = torch.finfo(torch.float32).tiny
    p_slm = scores.float()[..., None]
    by_slm = slm_logits.float().log_softmax(-1) + p_slm.clamp_min(tiny).log()
    by_llm = llm_logits.float().log_softmax(-1) + (1 - p_slm).clamp_min(tiny).log()
    return torch.logaddexp(by_slm, by_llm)


class Router(nn.Module):
    """Base class of the routers: the probability that the SLM's next token is good enough.

    A new kind is one subclass and one line in `ROUTERS`. A kind that needs more of the SLM than its outputs has a
    method `bind(slm)`, which `CiterForCausalLM` calls when the pair is made.

    Args:
        hidden_size: Width H of the SLM's last hidden state.
    """

    def __init__(self, hidden_size: int):
        super().__init__()

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Score one or many positions.

        Args:
            hidden: Last hidden state of the SLM, after the final norm, `[..., H]`.
            logits: Logits of the SLM at the same positions, `[..., V]`.

        Returns:
            `p_slm`, fp32 unless the user has cast the router, in [0, 1], `[...]`.
        """
        raise NotImplementedError


def moved(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return inputs with the type of a weight, and on its device unless its values are offloaded."""
    return inputs.to(weight.dtype) if weight.device.type == "meta" else inputs.to(weight)


class MlpRouter(Router):
    """The router of CITER: `H → 2H → H → 1` and a sigmoid (section 3.1)."""

    def __init__(self, hidden_size: int, batch_norm: bool = False, dropout: float = 0.1, top_logprobs: int = 0):
        super().__init__(hidden_size)
        fp32 = torch.float32
        self.top_logprobs = top_logprobs
        self.expand = nn.Linear(hidden_size + top_logprobs, 2 * hidden_size, dtype=fp32)
        self.norm = nn.BatchNorm1d(2 * hidden_size, dtype=fp32) if batch_norm else None
        self.contract = nn.Linear(2 * hidden_size, hidden_size, dtype=fp32)
        self.score = nn.Linear(hidden_size, 1, dtype=fp32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        inputs = moved(hidden, self.expand.weight)
        if self.top_logprobs:
            inputs = torch.cat([inputs, top_logprobs(logits, self.top_logprobs).to(inputs)], dim=-1)
        return torch.sigmoid(self.log_odds(inputs))

    def log_odds(self, inputs: torch.Tensor) -> torch.Tensor:
        expanded = self.expand(inputs)
        if self.norm is not None:
            expanded = self.norm(expanded.reshape(-1, expanded.shape[-1])).view_as(expanded)
        contracted = self.contract(self.dropout(torch.relu(expanded)))
        return self.score(self.dropout(contracted)).squeeze(-1)


class LinearRouter(Router):
    """One linear layer and a sigmoid, the router of Co-LLM."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.score = nn.Linear(hidden_size, 1, dtype=torch.float32)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.log_odds(moved(hidden, self.score.weight)))

    def log_odds(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.score(inputs).squeeze(-1)


# A log-probability below this says no more than this does, and would drown the others.
LEAST_LOGPROB = -15.0


def top_logprobs(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the largest log-probabilities, largest first, none below `LEAST_LOGPROB`."""
    largest = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]), dim=-1).values
    if largest.shape[-1] < count:
        largest = nn.functional.pad(largest, (0, count - largest.shape[-1]), value=LEAST_LOGPROB)
    return largest.clamp_min(LEAST_LOGPROB)


class ConfidenceRouter(Router):
    """The probability of the SLM's most likely token; needs no training."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return torch.exp(logits.amax(-1) - logits.logsumexp(-1))


class EntropyRouter(Router):
    """One minus the entropy of the SLM's distribution as a fraction of the largest possible; needs no training."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        log_probs = logits.float().log_softmax(-1)
        # A logit of -inf is a token that cannot be: 0 · log 0 = 0.
        entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
        return (1 - entropy / math.log(max(logits.shape[-1], 2))).clamp(0, 1)


class RandomRouter(Router):
    """A score that says nothing, spread evenly over [0, 1]: threshold τ sends about the share τ to the LLM."""

    def __init__(self, hidden_size: int, seed: int = 0):
        super().__init__(hidden_size)
        self.seed = seed

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        hidden = hidden.float()
        index = torch.arange(1, hidden.shape[-1] + 1, device=hidden.device, dtype=torch.float32)
        direction = torch.sin(index * index + self.seed)
        length = hidden.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        # Unit vectors project with a spread of about 0.7. Sixteen periods of that are evenly spread also when the
        # states differ little, and still leave rounding errors far too small to change a decision.
        return ((hidden @ direction) / length * 16).remainder(1.0).clamp(0, 1)


class R2RBlock(nn.Module):
    """A residual block: layer norm, linear, GELU, linear, added to what came in."""

    def __init__(self, size: int, inner_size: int, out_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, dtype=torch.float32)
        self.expand = nn.Linear(size, inner_size, dtype=torch.float32)
        self.contract = nn.Linear(inner_size, out_size, dtype=torch.float32)
        self.skip = nn.Linear(size, out_size, dtype=torch.float32) if out_size != size else None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(self.expand(self.norm(values)))
        return self.contract(inner) + (values if self.skip is None else self.skip(values))


class R2RRouter(Router):
    """The router of R2R: one minus the probability that the SLM's token leads the text astray."""

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int | None = None,
        top_logits: int = 100,
        blocks: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(hidden_size)
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.top_logits = top_logits
        blocks = blocks or [(hidden_size, 4 * hidden_size, hidden_size)]
        first, last = blocks[0][0], blocks[-1][2]
        self.logits_projection = nn.Linear(top_logits, hidden_size, dtype=torch.float32)
        self.combined_projection = nn.Linear(2 * hidden_size + self.embedding_size, first, dtype=torch.float32)
        self.input_projection = nn.Linear(first, first, dtype=torch.float32)
        self.blocks = nn.Sequential(*(R2RBlock(*sizes) for sizes in blocks))
        self.norm = nn.LayerNorm(last, dtype=torch.float32)
        self.score = nn.Linear(last, 1, dtype=torch.float32)
        # In a tuple, so that the SLM does not become a part of its router.
        self._bound: tuple[Any, ...] = ()

    def bind(self, slm: Any) -> None:
        """Take the embeddings of tokens from this model."""
        width = slm.get_input_embeddings().weight.shape[-1]
        if width != self.embedding_size:
            raise ValueError(f"router: expected an SLM with embeddings of {self.embedding_size}, got {width}.")
        self._bound = (slm,)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        like = self.combined_projection.weight
        largest = logits.topk(min(self.top_logits, logits.shape[-1]), dim=-1).values
        largest = nn.functional.pad(largest, (0, self.top_logits - largest.shape[-1]))
        token = moved(self._embedded(logits.argmax(-1)), like)
        inputs = torch.cat([moved(hidden, like), token, self.logits_projection(moved(largest, like))], dim=-1)
        values = self.blocks(self.input_projection(self.combined_projection(inputs)))
        # R2R compares the probability itself: the complement of its sigmoid, not the sigmoid of the negative.
        return 1 - torch.sigmoid(self.score(self.norm(values)).squeeze(-1))

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self._bound:
            raise RuntimeError("router: it reads the SLM's embeddings; call router.bind(slm) before it scores.")
        table = self._bound[0].get_input_embeddings()
        if table.weight.device.type != "meta":
            tokens = tokens.to(table.weight.device)
        # Called, not indexed: weights may be offloaded. Some tables scale what they give, R2R takes what they store.
        return table(tokens) / getattr(table, "embed_scale", 1)


ROUTERS: dict[str, type[Router]] = {
    "mlp": MlpRouter,
    "linear": LinearRouter,
    "confidence": ConfidenceRouter,
    "entropy": EntropyRouter,
    "random": RandomRouter,
    "r2r": R2RRouter,
}
CUSTOM_ROUTER = "custom"
# In a configuration's `router`: its weights are still the random ones that `from_pair` made.
UNTRAINED = "untrained"


def build_router(spec: dict[str, Any], hidden_size: int) -> Router:
    """Build the router that a configuration's `router` describes, with fresh weights."""
    options = {key: value for key, value in spec.items() if key not in ("type", "hidden_size", UNTRAINED)}
    trained_for = spec.get("hidden_size", hidden_size)
    if trained_for != hidden_size:
        raise ValueError(f"router: expected an SLM with a hidden size of {trained_for}, got {hidden_size}.")
    if spec["type"] == CUSTOM_ROUTER:
        raise ValueError(f"router: it has a class of its own ({spec.get('class')}), pass router=YourClass(...).")
    if spec["type"] not in ROUTERS:
        raise ValueError(
            f"router: unknown kind {spec['type']!r}; expected one of {sorted(ROUTERS)}, a saved router or a module."
        )
    return ROUTERS[spec["type"]](hidden_size, **options)
