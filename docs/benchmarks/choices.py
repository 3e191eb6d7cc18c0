"""What each choice of `citer-plus` brings: `python docs/benchmarks/choices.py LABELS VALIDATION OUT [NAME=LABELS
...]`.

Trains variants of the objective on LABELS, three seeds each, and measures on validation problems which share of LLM
tokens reaches 90, 95 and 98 % of the LLM's accuracy. NAME=LABELS adds the objective as it is on labels of another
policy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from citer_hf import DEMO_PAIR, CiterForCausalLM
from citer_hf.data.examples import read_examples
from citer_hf.evaluation.evaluate import evaluate
from citer_hf.evaluation.results import cost_at
from citer_hf.training.labels import SLM_RIGHT, Labels
from citer_hf.training.objectives import OBJECTIVES, Objective
from citer_hf.training.train import TrainOptions, train_router

SHARES = (0.01, 0.02, 0.03, 0.045, 0.06, 0.09, 0.14, 0.25)
LEVELS = (0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)
PLUS = OBJECTIVES["citer-plus"]


def one_action(labels: Labels) -> torch.Tensor:
    """Look at the outcome of the SLM's token alone."""
    return torch.where(labels.case == SLM_RIGHT, 1, labels.rollout)


def weighted(weight: float) -> Objective:
    """Let a token that needs the LLM count for several."""

    def loss(log_odds: torch.Tensor, label: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        weights = torch.where(label == 0, weight, 1.0)
        return weights * functional.binary_cross_entropy_with_logits(log_odds, label, reduction="none")

    return replace(PLUS, loss=loss)


VARIANTS = {
    "as it is": PLUS,
    "no log-probabilities": replace(PLUS, router={"type": "mlp"}),
    "the SLM's outcome alone": replace(PLUS, targets=one_action),
    "critical tokens weighted 5 times": weighted(5),
    "critical tokens weighted 20 times": weighted(20),
}


def trials(labels: Labels, others: dict[str, Labels]) -> Iterator[tuple[str, Objective, Labels]]:
    """Give name, objective and labels of everything that is tried."""
    for name, objective in VARIANTS.items():
        yield name, objective, labels
    for name, other in others.items():
        yield name, PLUS, other


def main() -> None:
    """Train, measure, and print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path)
    parser.add_argument("validation")
    parser.add_argument("out", type=Path, help="directory for the results, with which an interrupted run goes on")
    parser.add_argument("others", nargs="*", help="NAME=LABELS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    problems = read_examples(options.validation, needs=("answer",))
    others = {name: Labels.load(path) for name, _, path in (one.partition("=") for one in options.others)}
    routers = {}
    for name, objective, labels in trials(Labels.load(options.labels), others):
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                router, _ = train_router(labels, objective, TrainOptions(seed=seed), Path(folder))
            routers[f"{name}, seed {seed}"] = router
    results = evaluate(model, problems, "math", routers=routers, shares=SHARES, max_new_tokens=160, out=options.out)
    for name in dict.fromkeys(name.rpartition(", seed")[0] for name in routers):
        curves = [results.methods[f"{name}, seed {seed}"] for seed in SEEDS]
        found = [[cost_at(results.ends, curve, level) or 1.0 for level in LEVELS] for curve in curves]
        means = [f"{statistics.mean(of):.1%} ({statistics.stdev(of):.1%})" for of in zip(*found, strict=True)]
        print(" | ".join([name, *means]), flush=True)


if __name__ == "__main__":
    main()
