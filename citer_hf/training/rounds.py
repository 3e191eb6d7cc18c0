"""Rounds of policy optimisation: train on the labels, roll out again with the new router, and so on (section 3.2)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from citer_hf.data.checkers import Checker
from citer_hf.evaluation.decoding import with_router
from citer_hf.model.routers import build_router
from citer_hf.runs import alone, atomic_write, wait_for_all

from .labels import Labels
from .objectives import Objective
from .outcomes import Policy, judge_states
from .rollouts import RollOut
from .router_trainer import TrainedRouter, TrainingSettings, router_inputs, train_router
from .units import Workplace

__all__ = ["Rounds", "train_in_rounds"]

# A round's roll-outs send this share of the tokens to the LLM: a policy that cannot finish an answer says nothing
# about the token it began with.
POLICY_SHARE = 1 / 3


@dataclass(frozen=True)
class Rounds:
    """How often, and with what, the labels are made anew."""

    count: int
    rollouts: int | None
    checker: Checker | None


def train_in_rounds(
    model: Any,
    tokenizer: Any,
    labels: Labels,
    objective: Objective,
    settings: TrainingSettings,
    rounds: Rounds,
    place: Workplace,
    **arguments: Any,
) -> tuple[TrainedRouter, Labels]:
    """Train, and before every further round replace the outcomes of roll-outs by those with the new router."""
    for number in range(1, rounds.count + 1):
        file = place.folder / f"round-{number}.pt"
        if not file.exists() and place.state.is_main_process:
            place.report(f"training, round {number}", 0, 1)
            with alone():
                save(train_router(labels, objective, place.folder / f"round-{number}", settings, **arguments), file)
        wait_for_all()
        trained = load(file, labels)
        place.report(f"training, round {number}", 1, 1)
        if number < rounds.count:
            labels = relabel(model, tokenizer, labels, objective, trained, rounds, place, number)
    return trained, labels


def relabel(
    model: Any,
    tokenizer: Any,
    labels: Labels,
    objective: Objective,
    trained: TrainedRouter,
    rounds: Rounds,
    place: Workplace,
    number: int,
) -> Labels:
    """Roll out again with a new router."""
    assert rounds.checker is not None
    with torch.no_grad():
        scores = trained.router.log_odds(router_inputs(labels, trained.spec, torch.arange(len(labels.case))))  # type: ignore[operator]
    middle = scores.sort().values[int(POLICY_SHARE * len(scores))]
    tokens = torch.isin(labels.case, torch.tensor(objective.relabelled)).nonzero()[:, 0]
    if rounds.rollouts is not None and rounds.rollouts < len(tokens):
        unsure = (scores[tokens] - middle).abs().argsort(stable=True)
        tokens = tokens[unsure[: rounds.rollouts]].sort().values
    policy = Policy(
        threshold=float(torch.sigmoid(middle)),
        max_new_tokens=labels.info["max_new_tokens"],
        batch_tokens=labels.info["batch_tokens"],
    )
    pair = with_router(model, trained.router.to(model.slm.device))
    rollout, llm_rollout = labels.rollout.clone(), labels.llm_rollout.clone()
    actions = [labels.question, labels.position, labels.slm_token, labels.llm_token]
    states = []
    for question, position, by_slm, by_llm in torch.stack([one[tokens].long() for one in actions], dim=1).tolist():
        states.append((RollOut(question, position, by_slm), RollOut(question, position, by_llm)))
    when = f", round {number + 1}"
    found = judge_states(pair, tokenizer, labels.questions, states, policy, rounds.checker, place, when)
    for token, (taken, instead) in zip(tokens.tolist(), states, strict=True):
        rollout[token] = int(found[taken].correct)
        if not found[taken].correct:
            llm_rollout[token] = int(found[instead].correct)
    return replace(labels, rollout=rollout, llm_rollout=llm_rollout)


def save(trained: TrainedRouter, file: Path) -> None:
    """Keep the router of a round, complete or not at all."""
    content = {
        "router": trained.router.state_dict(),
        "spec": json.dumps(trained.spec),
        "validation": trained.validation,
        "log_odds": trained.log_odds,
        "label": trained.label,
        "learning_rate": trained.learning_rate,
        "loss": trained.loss,
        "history": json.dumps(trained.history),
    }
    with atomic_write(file) as beside:
        torch.save(content, beside)


def load(file: Path, labels: Labels) -> TrainedRouter:
    """Return the router of a round."""
    content = torch.load(file, weights_only=True)
    spec = json.loads(content["spec"])
    router = build_router(spec, labels.hidden.shape[1])
    router.load_state_dict(content["router"])
    return TrainedRouter(
        router=router.eval(),
        spec=spec,
        validation=content["validation"],
        log_odds=content["log_odds"],
        label=content["label"],
        learning_rate=content["learning_rate"],
        loss=content["loss"],
        history=json.loads(content["history"]),
    )
