"""What a router is trained to do: which tokens count, what is wanted of them, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .labels import BOTH_WRONG, LLM_RIGHT, SLM_RIGHT, TOP_LOGPROBS, Labels


@dataclass(frozen=True)
class Targets:
    """What is wanted of every token that counts."""

    tokens: torch.Tensor
    label: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """One way to train a router."""

    router: dict[str, object]
    targets: Callable[[Labels], Targets]
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    relabelled: tuple[int, ...] = ()


def preference_loss(
    log_odds: torch.Tensor, label: torch.Tensor, slm_logprob: torch.Tensor, llm_logprob: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the preference between two actions (CITER, equation 5: Bradley-Terry)."""
    return functional.binary_cross_entropy_with_logits(log_odds, label, reduction="none")


def co_llm_loss(
    log_odds: torch.Tensor, label: torch.Tensor, slm_logprob: torch.Tensor, llm_logprob: torch.Tensor
) -> torch.Tensor:
    """Negative log of the marginal likelihood `p_slm · P_SLM(y) + (1 - p_slm) · P_LLM(y)` (Co-LLM)."""
    by_slm = functional.logsigmoid(log_odds) + slm_logprob
    return -torch.logaddexp(by_slm, functional.logsigmoid(-log_odds) + llm_logprob)


def known(labels: Labels, label: torch.Tensor) -> Targets:
    """Keep the tokens whose label is known."""
    tokens = (label >= 0).nonzero()[:, 0]
    return Targets(tokens, label[tokens].float())


def citer_targets(labels: Labels) -> Targets:
    """Return the paper's preferences: the shortcut's cases, and in case 3 the outcome of the roll-out."""
    shortcut = (labels.case == SLM_RIGHT).long()
    return known(labels, torch.where(labels.case == BOTH_WRONG, labels.rollout, shortcut))


def citer_plus_targets(labels: Labels) -> Targets:
    """Return which action's outcome is better, wherever the SLM's token differs from the reference, also in case 2."""
    outcome = torch.where((labels.rollout == 0) & (labels.llm_rollout == 0), 1, labels.rollout)
    return known(labels, torch.where(labels.case == SLM_RIGHT, 1, outcome))


def citer_s_targets(labels: Labels) -> Targets:
    """Return preferences without the long-term effect: case 3 by which model finds the reference token likelier."""
    likelier = (labels.slm_logprob >= labels.llm_logprob).long()
    shortcut = (labels.case == SLM_RIGHT).long()
    return known(labels, torch.where(labels.case == BOTH_WRONG, likelier, shortcut))


def all_tokens(labels: Labels) -> Targets:
    """Return every token; the label only serves the report, it is whether the SLM's token is the reference."""
    return known(labels, (labels.case == SLM_RIGHT).long())


def query_targets(labels: Labels) -> Targets:
    """Return one preference per question, at its prompt's last token: the LLM where it is right and the SLM is
    wrong."""
    tokens = (labels.position == 0).nonzero()[:, 0]
    question = labels.question[tokens]
    return Targets(tokens, (labels.slm_correct[question] | ~labels.llm_correct[question]).float())


OBJECTIVES = {
    "citer": Objective({"type": "mlp"}, citer_targets, preference_loss, (BOTH_WRONG,)),
    "citer-plus": Objective(
        {"type": "mlp", "top_logprobs": TOP_LOGPROBS}, citer_plus_targets, preference_loss, (LLM_RIGHT, BOTH_WRONG)
    ),
    "citer-s": Objective({"type": "mlp"}, citer_s_targets, preference_loss),
    "co-llm": Objective({"type": "linear"}, all_tokens, co_llm_loss),
}
# One decision per question (RouteLLM's setting): no router of a pair, but a baseline of evaluations.
QUERY = Objective({"type": "mlp"}, query_targets, preference_loss)
