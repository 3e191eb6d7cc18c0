"""A router learns from labels, with transformers' `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from citer_hf.model.routers import build_router

from .labels import Labels
from .objectives import Objective, Targets

__all__ = ["DEFAULTS", "NothingToLearn", "TrainedRouter", "TrainingSettings", "split_by_question", "train_router"]

# Beyond this, scores of a sigmoid in fp32 are soon equal, and thresholds could not tell them apart: nine tenths of the
# tokens stay below.
LARGEST_LOG_ODDS = 12.0


class NothingToLearn(ValueError):  # noqa: N818 - says what there is
    """All labels are equal."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a router is trained."""

    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: int = 25
    batch_size: int = 512
    weight_decay: float = 1e-4
    patience: int = 5
    validation: float = 0.125
    seed: int = 0


DEFAULTS = TrainingSettings()


@dataclass(frozen=True)
class TrainedRouter:
    """A router and how it came about."""

    router: nn.Module
    spec: dict[str, Any]
    validation: torch.Tensor
    log_odds: torch.Tensor
    label: torch.Tensor
    learning_rate: float
    loss: float
    history: list[dict[str, Any]] = field(repr=False)


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Tokens as the router sees them; a batch is taken from the tensors at once."""

    def __init__(self, columns: dict[str, torch.Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: values[indices] for name, values in self.columns.items()}


class RouterInTraining(nn.Module):
    """The router with its loss, as `Trainer` wants it."""

    def __init__(self, router: Any, objective: Objective):
        super().__init__()
        self.router, self.objective = router, objective

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        slm_logprob: torch.Tensor,
        llm_logprob: torch.Tensor,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the mean loss and the log-odds."""
        log_odds = self.router.log_odds(inputs)
        loss = self.objective.loss(log_odds, labels, slm_logprob, llm_logprob)
        return {"loss": loss.mean(), "logits": log_odds}


def train_router(
    labels: Labels,
    objective: Objective,
    folder: Path,
    settings: TrainingSettings = DEFAULTS,
    **arguments: Any,
) -> TrainedRouter:
    """Train a router on labels, once for every learning rate, and keep the weights with the best validation loss."""
    targets = objective.targets(labels)
    training, validation = split_by_question(labels, targets, settings.validation, settings.seed)
    check_labels(labels, targets, training)
    inputs = router_inputs(labels, objective.router, targets.tokens)
    mean, scale = inputs[training].mean(dim=0), inputs[training].std(dim=0).clamp_min(1e-4)
    columns = {
        "inputs": (inputs - mean) / scale,
        "labels": targets.label,
        "slm_logprob": labels.slm_logprob[targets.tokens],
        "llm_logprob": labels.llm_logprob[targets.tokens],
    }
    parts = [TokenDataset({name: values[part] for name, values in columns.items()}) for part in (training, validation)]
    tried = [
        fit(objective, labels.hidden.shape[1], parts, folder / f"{rate:g}", settings, rate, arguments)
        for rate in settings.learning_rates
    ]
    loss, rate, router, history = min(tried, key=lambda one: one[0])
    with torch.no_grad():
        log_odds = router.log_odds(columns["inputs"])
        large = log_odds.abs().sort().values[int(0.9 * len(log_odds))]
        shrink = min(1.0, LARGEST_LOG_ODDS / float(large))
        fold_into(router, mean, scale, shrink)
    return TrainedRouter(
        router=router,
        spec=dict(objective.router),
        validation=targets.tokens[validation],
        log_odds=log_odds[validation] * shrink,
        label=targets.label[validation],
        learning_rate=rate,
        loss=loss,
        history=history,
    )


def fit(
    objective: Objective,
    hidden_size: int,
    parts: list[TokenDataset],
    folder: Path,
    settings: TrainingSettings,
    learning_rate: float,
    arguments: dict[str, Any],
) -> tuple[float, float, Any, list[dict[str, Any]]]:
    """Train at one learning rate."""
    set_seed(settings.seed)
    router = build_router(dict(objective.router), hidden_size)
    trainer = Trainer(
        model=RouterInTraining(router, objective),
        args=training_arguments(folder, settings, learning_rate, len(parts[0]), **arguments),
        train_dataset=parts[0],
        eval_dataset=parts[1],
        data_collator=lambda batch: batch,
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    best = trainer.state.best_metric
    assert best is not None
    return float(best), learning_rate, router.cpu().eval(), trainer.state.log_history


def training_arguments(
    folder: Path, settings: TrainingSettings, learning_rate: float, tokens: int, **arguments: Any
) -> TrainingArguments:
    """Return the settings as `Trainer` wants them."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "learning_rate": learning_rate,
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": max(min(settings.batch_size, tokens // 16), 2),
            "per_device_eval_batch_size": 4096,
            "weight_decay": settings.weight_decay,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "label_names": ["labels"],
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": settings.seed,
            **arguments,
        }
    )


def router_inputs(labels: Labels, spec: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Return what a router's first layer reads, fp32 `[used, width]`."""
    inputs = labels.hidden[tokens].float()
    count = int(spec.get("top_logprobs", 0))
    return torch.cat([inputs, labels.top_logprobs[tokens, :count].float()], dim=1) if count else inputs


def split_by_question(labels: Labels, targets: Targets, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the tokens that count into training and validation, no question in both."""
    count = len(labels.questions)
    held_out = round(count * share)
    if not 0 < held_out < count:
        raise ValueError(
            f"labels: {labels.directory} has {count} questions, too few to hold out {share:.1%} of them for "
            "validation; label more examples."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    is_held_out = torch.zeros(count, dtype=torch.bool)
    is_held_out[order[:held_out]] = True
    of_validation = is_held_out[labels.question[targets.tokens]]
    return (~of_validation).nonzero()[:, 0], of_validation.nonzero()[:, 0]


def check_labels(labels: Labels, targets: Targets, training: torch.Tensor) -> None:
    """Refuse labels from which nothing can be learned."""
    values = torch.unique(targets.label[training]).tolist()
    if len(values) < 2:
        always = "none is known" if not values else f"all are {int(values[0])}"
        raise NothingToLearn(
            f"labels: of the {len(training)} labels for training in {labels.directory} {always}, so that there is "
            "nothing to learn. See its README.md: label more examples, or roll out with another policy "
            "(--router-threshold)."
        )


@torch.no_grad()
def fold_into(router: Any, mean: torch.Tensor, scale: torch.Tensor, shrink: float) -> None:
    """Let a router read plain inputs though it was trained on standardised ones, and scale its log-odds."""
    first, last = getattr(router, "expand", router.score), router.score
    first.weight.copy_(first.weight / scale)
    first.bias.copy_(first.bias - first.weight @ mean)
    last.weight.mul_(shrink)
    last.bias.mul_(shrink)
