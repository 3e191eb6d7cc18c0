"""What a router is trained to do: what is wanted of every token, and the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .labels import BOTH_WRONG, LLM_RIGHT, SLM_RIGHT, TOP_LOGPROBS, Labels


class NothingToLearn(ValueError):  # noqa: N818 - says what there is
    pass


@dataclass(frozen=True)
class Objective:
    router: dict[str, Any]
    # [tokens]: 1 where the SLM's token is wanted, 0 for the LLM's, -1 for a token that does not count.
    targets: Callable[[Labels], torch.Tensor]
    # From log-odds, targets and both models' log-probabilities of the reference, [tokens] each.
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    relabelled: tuple[int, ...] = ()
    # Columns of the labels with the verdicts that the targets and the loss are made of.
    needs: tuple[str, ...] = ()

    def check(self, name: str, labels: Labels) -> None:
        """Raise a `NothingToLearn` when the labels hold none of the verdicts that the objective needs."""
        everywhere = torch.ones_like(labels.case, dtype=torch.bool)
        wanted = {"rollout": labels.case != SLM_RIGHT, "llm_rollout": labels.rollout == 0}
        for column in self.needs:
            values, where = getattr(labels, column), wanted.get(column, everywhere)
            known = values.isfinite() if values.is_floating_point() else values >= 0
            if where.any() and not known[where].any():
                verdicts = "roll-outs" if column == "rollout" else "the LLM's verdicts"
                raise NothingToLearn(
                    f"labels: the objective {name!r} needs {verdicts} (column {column!r}), and those in "
                    f"{labels.directory} hold none. Make labels with `citer label`, without --rollouts 0, or choose "
                    "another --objective."
                )


def preference_loss(log_odds: torch.Tensor, label: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the preference between two actions (CITER, equation 5: Bradley-Terry)."""
    return functional.binary_cross_entropy_with_logits(log_odds, label, reduction="none")


def co_llm_loss(
    log_odds: torch.Tensor, label: torch.Tensor, slm_logprob: torch.Tensor, llm_logprob: torch.Tensor
) -> torch.Tensor:
    """Negative log of the marginal likelihood `p_slm · P_SLM(y) + (1 - p_slm) · P_LLM(y)` (Co-LLM)."""
    by_slm = functional.logsigmoid(log_odds) + slm_logprob
    return -torch.logaddexp(by_slm, functional.logsigmoid(-log_odds) + llm_logprob)


def slm_is_right(labels: Labels) -> torch.Tensor:
    """Return where the SLM's token is the reference: the shortcut; for Co-LLM, it only serves the report."""
    return (labels.case == SLM_RIGHT).long()


def citer_targets(labels: Labels) -> torch.Tensor:
    """Return the paper's preferences: the shortcut's cases, and in case 3 the outcome of the roll-out."""
    return torch.where(labels.case == BOTH_WRONG, labels.rollout, slm_is_right(labels))


def citer_plus_targets(labels: Labels) -> torch.Tensor:
    """Return which action's outcome is better, wherever the SLM's token differs from the reference, also in case 2."""
    outcome = torch.where((labels.rollout == 0) & (labels.llm_rollout == 0), 1, labels.rollout)
    return torch.where(labels.case == SLM_RIGHT, 1, outcome)


def citer_s_targets(labels: Labels) -> torch.Tensor:
    """Return preferences without the long-term effect: case 3 by which model finds the reference token likelier."""
    likelier = (labels.slm_logprob >= labels.llm_logprob).long()
    return torch.where(labels.case == BOTH_WRONG, likelier, slm_is_right(labels))


def acceptance_targets(labels: Labels) -> torch.Tensor:
    """Return where the LLM, asked for its likeliest token, would leave the SLM's as it is (greedy verification)."""
    return torch.where(labels.llm_token >= 0, (labels.slm_token == labels.llm_token).long(), -1)


def query_targets(labels: Labels) -> torch.Tensor:
    """Return a preference at each prompt's last token: the LLM where it answers rightly and the SLM does not."""
    preferred = (labels.slm_correct | ~labels.llm_correct)[labels.question].long()
    return torch.where(labels.position == 0, preferred, -1)


MLP_PLUS = {"type": "mlp", "top_logprobs": TOP_LOGPROBS}
OBJECTIVES = {
    "citer": Objective({"type": "mlp"}, citer_targets, preference_loss, (BOTH_WRONG,), ("rollout",)),
    "citer-plus": Objective(
        MLP_PLUS, citer_plus_targets, preference_loss, (LLM_RIGHT, BOTH_WRONG), ("rollout", "llm_rollout")
    ),
    "acceptance": Objective(MLP_PLUS, acceptance_targets, preference_loss, needs=("llm_token",)),
    "citer-s": Objective({"type": "mlp"}, citer_s_targets, preference_loss, needs=("llm_logprob",)),
    "co-llm": Objective({"type": "linear"}, slm_is_right, co_llm_loss, needs=("llm_logprob",)),
}
# One decision per question (RouteLLM's setting): no router of a pair, but a baseline of evaluations.
QUERY = Objective({"type": "mlp"}, query_targets, preference_loss)
