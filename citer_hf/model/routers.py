"""The routers, and the record of what they decided."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, overload

import torch
from torch import nn

from .r2r_router import R2RRouter
from .router_base import Router

SLM_ALONE, LLM_ALONE = 0.0, 2.0


@overload
def as_threshold(value: Any, batch_size: None = None) -> float: ...


@overload
def as_threshold(value: Any, batch_size: int) -> float | torch.Tensor: ...


def as_threshold(value: Any, batch_size: int | None = None) -> float | torch.Tensor:
    """Return a valid `router_threshold`: the SLM writes a token when its score reaches it.

    Args:
        value: A number from 0 (the SLM alone) to 2 (above 1: the LLM alone), or a tensor of one per sequence.
        batch_size: Number of sequences; without it, only a number is valid.

    Returns:
        A number, or a tensor `[batch_size, 1]`.

    Raises:
        ValueError: for anything else, a bool and a string included.
    """
    if isinstance(value, torch.Tensor) and batch_size is not None:
        # A traced graph cannot depend on values.
        traced = torch.compiler.is_compiling()
        in_range = traced or bool(((value >= SLM_ALONE) & (value <= LLM_ALONE)).all())
        if value.shape == (batch_size,) and value.dtype != torch.bool and in_range:
            return value[:, None]
    elif isinstance(value, Real) and not isinstance(value, bool) and SLM_ALONE <= float(value) <= LLM_ALONE:
        return float(value)
    several = "" if batch_size is None else f", or a tensor [{batch_size}] of such numbers, one per sequence"
    raise ValueError(
        f"router_threshold: expected a number from 0 (the SLM alone) to 2 (above 1: the LLM alone){several}; got "
        f"{value!r}."
    )


def defer(scores: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Return True where the LLM writes the token: where the score does not reach the threshold of `as_threshold`."""
    return scores < (threshold.to(scores) if isinstance(threshold, torch.Tensor) else threshold)


MlpWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class MlpRouter(Router):
    """The router of CITER: `H → 2H → H → 1` and a sigmoid (section 3.1)."""

    def __init__(
        self,
        hidden_size: int,
        batch_norm: bool = False,
        dropout: float = 0.1,
        top_logprobs: int = 0,
        **options: Any,
    ):
        super().__init__(hidden_size, **options)
        fp32 = torch.float32
        self.top_logprobs = top_logprobs
        self.expand = nn.Linear(hidden_size + top_logprobs, 2 * hidden_size, dtype=fp32)
        self.norm = nn.BatchNorm1d(2 * hidden_size, dtype=fp32) if batch_norm else None
        self.contract = nn.Linear(2 * hidden_size, hidden_size, dtype=fp32)
        self.score = nn.Linear(hidden_size, 1, dtype=fp32)
        self.dropout = nn.Dropout(dropout)
        self._folded: tuple[tuple[Any, ...], MlpWeights] | None = None

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        inputs = hidden.to(self.expand.weight)
        if self.top_logprobs:
            inputs = torch.cat([inputs, top_logprobs(logits, self.top_logprobs).to(inputs)], dim=-1)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.sigmoid(self.log_odds(inputs))
        weight, bias, vector, offset = self.folded()
        hidden = torch.relu(nn.functional.linear(inputs, weight, bias))
        return torch.sigmoid(nn.functional.linear(hidden, vector, offset).squeeze(-1))

    def log_odds(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logit of `p_slm`, layer by layer."""
        expanded = self.expand(inputs)
        if self.norm is not None:
            expanded = self.norm(expanded.reshape(-1, expanded.shape[-1])).view_as(expanded)
        contracted = self.contract(self.dropout(torch.relu(expanded)))
        return self.score(self.dropout(contracted)).squeeze(-1)

    def folded(self) -> MlpWeights:
        """Return the evaluation form: weight `[2H, H]` and bias `[2H]`, and after the ReLU `[1, 2H]` and offset
        `[1]`."""
        # One by one: what goes through all of a module's tensors takes as long as the router itself.
        layers = (self.expand, self.contract, self.score)
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        if self.norm is not None:
            tensors += [*self.norm.parameters(), *self.norm.buffers()]
        state = tuple([(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors])
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, self._fold())
        return self._folded[1]

    @torch.no_grad()
    def _fold(self) -> MlpWeights:
        weight: torch.Tensor = self.expand.weight
        bias: torch.Tensor = self.expand.bias
        if self.norm is not None:
            assert self.norm.running_mean is not None and self.norm.running_var is not None
            scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            weight = scale[:, None] * weight
            bias = scale * (bias - self.norm.running_mean) + self.norm.bias
        vector = self.score.weight @ self.contract.weight
        offset = self.score.weight @ self.contract.bias + self.score.bias
        return weight, bias, vector, offset


class LinearRouter(Router):
    """One linear layer and a sigmoid, the router of Co-LLM."""

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__(hidden_size, **options)
        self.score = nn.Linear(hidden_size, 1, dtype=torch.float32)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.log_odds(hidden.to(self.score.weight)))

    def log_odds(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logit of `p_slm`."""
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

    def __init__(self, hidden_size: int, seed: int = 0, **options: Any):
        super().__init__(hidden_size, **options)
        self.seed = seed

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        hidden = hidden.float()
        index = torch.arange(1, hidden.shape[-1] + 1, device=hidden.device, dtype=torch.float32)
        direction = torch.sin(index * index + self.seed)
        length = hidden.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        # Unit vectors project with a spread of about 0.7. Sixteen periods of that are evenly spread also when the
        # states differ little, and still leave rounding errors far too small to change a decision.
        return ((hidden @ direction) / length * 16).remainder(1.0).clamp(0, 1)


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
    """Build the router that a configuration describes, with fresh weights.

    Args:
        spec: The configuration's `router`: `{"type": kind, ...options}`.
        hidden_size: Width H of the SLM's last hidden state.

    Raises:
        ValueError: for an unknown kind or option, or a router made for another hidden size.
    """
    options = {key: value for key, value in spec.items() if key not in ("type", "hidden_size", UNTRAINED)}
    trained_for = spec.get("hidden_size", hidden_size)
    if trained_for != hidden_size:
        raise ValueError(
            f"router: it was made for an SLM with a hidden size of {trained_for}, but this SLM's is {hidden_size}. "
            "Use the SLM that the router was trained with, or train a router for this one."
        )
    if spec["type"] == CUSTOM_ROUTER:
        raise ValueError(
            f"router: this repository holds a router of a class of its own ({spec.get('class', 'unknown')}). "
            "Pass an instance: from_pretrained(..., router=MyRouter(...))."
        )
    if spec["type"] not in ROUTERS:
        raise ValueError(
            f"router: unknown kind {spec['type']!r}; expected one of {sorted(ROUTERS)}, the path or repository id "
            "of a saved router, or a torch.nn.Module."
        )
    return ROUTERS[spec["type"]](hidden_size, **options)


SCORES, TO_LLM, UNFINISHED = range(3)


class Routing:
    """What was decided, token by token, since a cache was made or `generate` was last called.

    Everything stays on the device, as the steps left it, until it is asked for.

    Args:
        start: Index in the text of the first token to decide; earlier tokens need no decision and get no record.
        follows_beams: Whether rows are running beams, whose order is put right at the end by `follow_beams`.
    """

    def __init__(self, start: int = 0, follows_beams: bool = False):
        self.start = start
        self.follows_beams = follows_beams
        self.llm_calls = 0
        # A step: index of its first token, then p_slm, who writes, and who is still unfinished, each [batch, tokens].
        self._steps: list[tuple[int, tuple[torch.Tensor, ...]]] = []

    def add(self, first: int, scores: torch.Tensor, to_llm: torch.Tensor, unfinished: torch.Tensor) -> None:
        """Record one step."""
        skip = self.start - first
        if skip > 0:
            first, scores, to_llm, unfinished = self.start, scores[:, skip:], to_llm[:, skip:], unfinished[:, skip:]
        if scores.shape[1] > 0:
            self._steps.append((first, (scores, to_llm, unfinished)))

    @property
    def to_llm(self) -> torch.Tensor:
        """Whether the LLM wrote each token, bool `[batch, generated]`; False after the end of a row."""
        return self._joined(TO_LLM) & self._joined(UNFINISHED)

    @property
    def scores(self) -> torch.Tensor:
        """`p_slm` of each token, float `[batch, generated]`."""
        return self._joined(SCORES)

    @property
    def unfinished(self) -> torch.Tensor:
        """Whether each token is a real one and not padding after the end of its row, bool `[batch, generated]`."""
        return self._joined(UNFINISHED)

    @property
    def llm_share(self) -> float:
        """Share of the real tokens that the LLM wrote; 0.0 when there are none."""
        real = int(self.unfinished.sum())
        return int(self.to_llm.sum()) / real if real else 0.0

    def by_llm(self, index: int, row: int = 0) -> bool:
        """Say whether the LLM wrote one token, without joining the record: for streams, which ask for the newest."""
        place = self.start + index
        for first, records in reversed(self._steps):
            if first <= place < first + records[TO_LLM].shape[1]:
                return bool(records[TO_LLM][row, place - first])
        raise IndexError(f"index: no token number {index} has been decided yet.")

    def __len__(self) -> int:
        return sum(records[SCORES].shape[1] for _, records in self._steps)

    def __repr__(self) -> str:
        return f"Routing(tokens={len(self)}, llm_share={self.llm_share:.3f}, llm_calls={self.llm_calls})"

    def crop(self, length: int) -> None:
        """Forget the decisions about tokens that were taken back."""
        while self._steps and self._steps[-1][0] > length:
            self._steps.pop()
        if self._steps:
            first, records = self._steps[-1]
            self._steps[-1] = (first, tuple(record[:, : length + 1 - first] for record in records))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if self.follows_beams:
            return
        self._steps = [
            (first, tuple(record.index_select(0, rows.to(record.device)) for record in records))
            for first, records in self._steps
        ]

    def follow_beams(self, beam_indices: torch.Tensor) -> None:
        """Turn the record of running beams, row by row and step by step, into that of the returned sequences."""
        if not self._steps:
            return
        first, records = self._steps[0]
        rows = beam_indices.long().to(records[SCORES].device)
        length = min(rows.shape[1], len(self))
        rows, ended = rows[:, :length].clamp_min(0), rows[:, :length] < 0
        scores, to_llm, unfinished = (self._joined(part)[:, :length].gather(0, rows) for part in range(3))
        self._steps = [(first, (scores, to_llm, unfinished & ~ended))]

    def _joined(self, part: int) -> torch.Tensor:
        if not self._steps:
            return torch.zeros((0, 0), dtype=torch.float32 if part == SCORES else torch.bool)
        return torch.cat([records[part] for _, records in self._steps], dim=1)
