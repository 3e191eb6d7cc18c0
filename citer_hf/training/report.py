"""What is said of a trained router: how well it knows, on held-out questions, when the SLM is good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from citer_hf.model.routers import defer
from citer_hf.runs import new_figure, save_figure

from .labels import Labels
from .router_trainer import TrainedRouter, router_inputs

__all__ = ["draw_training", "report_on"]

SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
BINS = 10
# The threshold to start with sends this share of the tokens that need the LLM there.
RECALL = 0.95


def report_on(trained: TrainedRouter, labels: Labels) -> dict[str, Any]:
    """Measure a router on the questions that were held out."""
    from sklearn.metrics import roc_auc_score

    scores = torch.sigmoid(trained.log_odds)
    both = 0 < float(trained.label.mean()) < 1
    held_out = torch.isin(labels.question, torch.unique(labels.question[trained.validation]))
    with torch.no_grad():
        everywhere = torch.sigmoid(
            trained.router.log_odds(router_inputs(labels, trained.spec, held_out.nonzero()[:, 0]))  # type: ignore[operator]
        )
    ordered = everywhere.sort().values
    thresholds = [above(ordered, share) for share in SHARES]
    critical = scores[trained.label == 0].sort().values
    return {
        "questions": len(torch.unique(labels.question[trained.validation])),
        "tokens": len(scores),
        "prefer_llm": 1 - float(trained.label.mean()),
        "auc": float(roc_auc_score(trained.label.numpy(), scores.numpy())) if both else None,
        "calibration_error": calibration_error(scores, trained.label),
        "loss": trained.loss,
        "learning_rate": trained.learning_rate,
        "llm_share": [
            {"threshold": threshold, "llm_share": float(defer(everywhere, threshold).float().mean())}
            for threshold in thresholds
        ],
        "router_threshold": above(critical, RECALL) if len(critical) else 0.5,
    }


def above(ordered: torch.Tensor, share: float) -> float:
    """Return the smallest threshold that sends at least a share of scores to the LLM."""
    last = ordered[min(int(share * len(ordered)), len(ordered) - 1)]
    return float(torch.nextafter(last, torch.tensor(2.0)))


def calibration_error(scores: torch.Tensor, label: torch.Tensor) -> float:
    """Return the expected calibration error: how far `p_slm` is from what it promises, over bins of equal width."""
    bins = (scores * BINS).long().clamp(max=BINS - 1)
    error = 0.0
    for number in range(BINS):
        inside = bins == number
        if bool(inside.any()):
            gap = (scores[inside].mean() - label[inside].mean()).abs()
            error += float(gap) * float(inside.float().mean())
    return error


def draw_training(trained: TrainedRouter, objective: str, path: Path) -> None:
    """Draw the losses of training and validation by epoch; nothing where matplotlib is not installed."""
    try:
        figure = new_figure((6, 4))
    except ImportError:
        return
    axes: Any = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "--")):
        entries = [entry for entry in trained.history if key in entry]
        color = "#0072B2" if key == "loss" else "#D55E00"
        axes.plot([one["epoch"] for one in entries], [one[key] for one in entries], style, color=color, label=label)
    axes.axhline(trained.loss, color="#555555", linewidth=0.8, linestyle=":", label="weights that are kept")
    axes.set(xlabel="epoch", ylabel="loss per token", title=f"router trained with {objective}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)
