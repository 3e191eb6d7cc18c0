"""`train`: from labels to a router repository, with transformers' `Trainer` (CITER, section 3).

1. A router learns an objective from labels, once for every learning rate; the best by validation loss is kept.
2. Before every further round, the new router makes the roll-outs again (section 3.2).
3. The pair is saved with its new router, its provenance and its training curve.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from citer_hf import CiterForCausalLM, runs
from citer_hf.data.checkers import Checker, get_checker
from citer_hf.data.examples import read_examples
from citer_hf.evaluation.decode import with_router
from citer_hf.evaluation.evaluate import name_of
from citer_hf.model.routers import build_router, defer, hidden_size_of

from .label import Policy, least_sure
from .labels import Labels
from .objectives import OBJECTIVES, Objective, Targets

PROVENANCE = "provenance.json"
# A further round's roll-outs send this share of the tokens to the LLM: a policy that cannot finish an answer says
# nothing about the token it began with.
POLICY_SHARE = 1 / 3
# Beyond this, scores of a sigmoid in fp32 are soon equal, and thresholds could not tell them apart: nine tenths of the
# tokens stay below.
LARGEST_LOG_ODDS = 12.0
# LLM shares along the references for which the report has a threshold.
SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
BINS = 10
# The threshold to start with sends this share of the tokens that need the LLM there.
RECALL = 0.95


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train` and `citer train`."""

    objective: str = runs.option("citer-plus", "citer-plus, citer (the paper's), citer-s or co-llm.", metavar="NAME")
    rounds: int = runs.option(1, "Before every further round, roll out again with the new router.", metavar="N", min=1)
    data: Any = runs.option(None, "The data that was labelled, to be sure that it is the same.", metavar="FILE")
    checker: str | Checker | None = runs.option(
        None, "Of further rounds. [default: that of the labels]", metavar="NAME"
    )
    rollouts: int | None = runs.option(
        None, "Roll-outs of a further round, where the router is unsure.", metavar="N", min=0
    )
    learning_rates: tuple[float, ...] = runs.option(
        (1e-3, 3e-3, 1e-2), "Those to try; the best by validation is kept.", metavar="X,...", flag="--learning-rate"
    )
    epochs: int = runs.option(25, "At most.", metavar="N", min=1)
    batch_size: int = runs.option(512, "Tokens in a batch of the training.", metavar="N", min=2)
    patience: int = runs.option(5, "Epochs without a better loss before training stops.", metavar="N", min=1)
    validation: float = runs.option(0.125, "Share of the questions that is held out.", metavar="P")
    report_to: str = runs.option("none", "Logging of transformers' Trainer, such as tensorboard.", metavar="NAME")
    seed: int = runs.option(0, "Of everything that is drawn.")

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, got {self.objective!r}.")
        for name, least in (("rounds", 1), ("rollouts", 0), ("epochs", 1), ("batch_size", 2), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}.")
        if self.rounds > 1 and not OBJECTIVES[self.objective].relabelled:
            raise ValueError(f"rounds: {self.objective!r} makes no roll-outs, so that further rounds change nothing.")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates: expected numbers above 0, got {self.learning_rates!r}.")


class NothingToLearn(ValueError):  # noqa: N818 - says what there is
    """All labels are equal."""


@dataclass(frozen=True)
class TrainedRouter:
    """A router, its best validation loss with the learning rate that gave it, and the losses by epoch."""

    router: Any
    loss: float
    learning_rate: float
    history: list[dict[str, Any]]


def train(model: CiterForCausalLM, labels: Labels | str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Train a router for a pair, and save it as a router repository with its provenance and training curve.

    Under `accelerate launch`, one process trains and all make the roll-outs of further rounds. The same call resumes
    an interrupted run.

    Args:
        model: The pair that was labelled. It is not changed.
        labels: Labels, or their directory.
        out: Directory for the router, which does not exist yet or was interrupted. Logs are in its folder `logs`.
        options: The fields of `TrainOptions`, such as `objective`.

    Returns:
        What is in `provenance.json`: options, labels, validation, losses, versions and the sha256 of the router.

    Raises:
        ValueError: for options that cannot be used, labels of another pair or that are all equal, or a directory that
            was begun with other arguments.
        FileExistsError: when the directory holds something else.
        FileNotFoundError: when there are no labels.
    """
    settings, out = TrainOptions(**options), Path(out)
    labels = labels if isinstance(labels, Labels) else Labels.load(labels)
    labels.check_pair(model)
    if settings.data is not None:
        check_data(labels, settings.data)
    named = settings.checker or labels.info["checker"]
    check = named if callable(named) else get_checker(named) if settings.rounds > 1 else None
    check_logging(settings.report_to)
    objective = OBJECTIVES[settings.objective]
    divide(labels, objective, settings)
    data = str(settings.data) if isinstance(settings.data, str | Path) else None
    settings = replace(settings, data=data, checker=name_of(named) if callable(named) else settings.checker)
    shaping = {key: value for key, value in vars(settings).items() if key not in ("data", "report_to")}
    work = runs.Work(out, {**shaping, "labels_sha256": runs.sha256_of(labels.info)})
    with runs.progress_bar(work.process == 0) as progress:
        limits = (labels.options["max_new_tokens"], labels.options["batch_tokens"])
        policy = Policy(model, labels.questions, check, 0.0, *limits, work=work, progress=progress)
        trained = train_round(labels, settings, policy, 1)
        for number in range(2, settings.rounds + 1):
            labels = relabel(labels, settings, trained.router, policy, number)
            trained = train_round(labels, settings, policy, number)
    facts = report_on(trained, labels, settings)
    pair = with_router(model, trained.router)
    pair.config = copy.deepcopy(model.config)
    pair.config.router = {**objective.router, "hidden_size": hidden_size_of(model.slm)}
    pair.config.router_threshold = facts["router_threshold"]
    made = {
        **runs.provenance(pair, settings),
        "objective": settings.objective,
        "rounds": settings.rounds,
        "labels": {key: value for key, value in labels.info.items() if key not in ("versions", "counts")},
        "validation": facts,
        "history": trained.history,
    }
    if work.process == 0:
        pair.save_pretrained(out)
        runs.write_json(out / PROVENANCE, made)
        draw_training(trained, settings.objective, out / "training.png")
        keep_logs(work.folder, out / "logs")
    work.finish()
    return made


def summary(made: Mapping[str, Any]) -> str:
    """Return what `train` found, as text."""
    facts = made["validation"]
    auc = "–" if facts["auc"] is None else f"{facts['auc']:.3f}"
    shares = "".join(f"  {one['threshold']:.4f}  {one['llm_share']:.1%}\n" for one in facts["llm_share"])
    return (
        f"On {facts['questions']} held-out questions: AUC {auc}, calibration error {facts['calibration_error']:.3f}. "
        f"LLM share along the reference answers, by threshold:\n{shares}"
        f"It starts with {facts['router_threshold']:.4f}; `citer calibrate` finds the one for your budget."
    )


def check_data(labels: Labels, data: Any) -> None:
    """Raise a `ValueError` unless the data holds the examples that were labelled."""
    found = read_examples(data, labels.options["columns"], split=labels.options["split"])
    missing = {one.example.id for one in labels.questions} - {one.id for one in found}
    if missing:
        raise ValueError(
            f"data: it has no example {min(missing)!r}, which was labelled ({len(missing)} of {len(labels.questions)} "
            "are missing). Give the data that the labels were made from, or leave it out: labels hold the examples."
        )


def check_logging(report_to: str) -> None:
    """Raise a `ValueError` unless `Trainer` has such a logger and its library is installed."""
    try:
        for logger in get_reporting_integration_callbacks(report_to):
            logger()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"report_to: {error}") from error


# --- Rounds --------------------------------------------------------------------------------------------------------


def train_round(labels: Labels, settings: TrainOptions, policy: Policy, number: int) -> TrainedRouter:
    """Train in the main process, unless that was done before, and return the router in every process."""
    name = f"training, round {number}"
    folder, objective = policy.work.folder / name, OBJECTIVES[settings.objective]
    weights = folder / "router.safetensors"

    def compute() -> dict[str, Any]:
        with runs.alone():
            trained = train_router(labels, objective, settings, folder)
        with runs.atomic_write(weights) as file:
            file.write(safetensors.torch.save(trained.router.state_dict()))
        return {key: value for key, value in vars(trained).items() if key != "router"}

    policy.progress.begin(name, None)
    record = policy.work.once(name, compute)
    router = build_router(dict(objective.router), labels.hidden.shape[1]).eval()
    router.load_state_dict(safetensors.torch.load_file(weights))
    return TrainedRouter(router=router, **record)


def relabel(labels: Labels, settings: TrainOptions, router: Any, policy: Policy, number: int) -> Labels:
    """Replace the outcomes of roll-outs by those with a new router."""
    objective = OBJECTIVES[settings.objective]
    with torch.no_grad():
        scores = router.log_odds(router_inputs(labels, objective, torch.arange(len(labels.case))))
    middle = scores.sort().values[int(POLICY_SHARE * len(scores))]
    tokens = torch.isin(labels.case, torch.tensor(objective.relabelled)).nonzero()[:, 0]
    tokens = least_sure(tokens, (scores[tokens] - middle).abs(), settings.rollouts, settings.seed)
    pair = with_router(policy.model, router.to(policy.model.slm.device))
    policy = replace(policy, model=pair, threshold=float(torch.sigmoid(middle)))
    rollout, llm_rollout, _ = policy.compare(vars(labels), tokens, f", round {number}")
    return replace(
        labels,
        rollout=torch.where(rollout < 0, labels.rollout, rollout),
        llm_rollout=torch.where(rollout < 0, labels.llm_rollout, llm_rollout),
    )


def keep_logs(work: Path, logs: Path) -> None:
    """Move what `Trainer`'s loggers wrote beside its checkpoints to where it stays."""
    for file in sorted(work.glob("training, round */*/**/*")):
        path = file.relative_to(work)
        if file.is_file() and not any(part.startswith(PREFIX_CHECKPOINT_DIR) for part in path.parts):
            (logs / path).parent.mkdir(parents=True, exist_ok=True)
            file.replace(logs / path)


# --- Training ------------------------------------------------------------------------------------------------------


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Tokens as the router sees them; a batch is taken from the tensors at once."""

    def __init__(self, columns: dict[str, torch.Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: values[indices] for name, values in self.columns.items()}


class RouterInTraining(nn.Module):
    """The router with its loss, as `Trainer` wants it."""

    def __init__(self, router: Any, objective: Objective):
        super().__init__()
        self.router, self.objective = router, objective

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor, slm_logprob: torch.Tensor, llm_logprob: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the mean loss and the log-odds."""
        log_odds = self.router.log_odds(inputs)
        loss = self.objective.loss(log_odds, labels, slm_logprob, llm_logprob)
        return {"loss": loss.mean(), "logits": log_odds}


def train_router(labels: Labels, objective: Objective, settings: TrainOptions, folder: Path) -> TrainedRouter:
    """Train a router on labels, once for every learning rate, and keep the weights with the best validation loss."""
    targets, *parts = divide(labels, objective, settings)
    inputs = router_inputs(labels, objective, targets.tokens)
    mean, scale = inputs[parts[0]].mean(dim=0), inputs[parts[0]].std(dim=0).clamp_min(1e-4)
    columns = {
        "inputs": (inputs - mean) / scale,
        "labels": targets.label,
        "slm_logprob": labels.slm_logprob[targets.tokens],
        "llm_logprob": labels.llm_logprob[targets.tokens],
    }
    tokens = [TokenDataset({name: values[part] for name, values in columns.items()}) for part in parts]
    tried = []
    for rate in settings.learning_rates:
        set_seed(settings.seed)
        router = build_router(dict(objective.router), labels.hidden.shape[1])
        tried.append(fit(router, objective, settings, rate, tokens, folder / f"{rate:g}"))
    best = min(tried, key=lambda one: one.loss)
    with torch.no_grad():
        log_odds = best.router.log_odds(columns["inputs"]).abs().sort().values
        shrink = min(1.0, LARGEST_LOG_ODDS / float(log_odds[int(0.9 * len(log_odds))]))
        fold_into(best.router, mean, scale, shrink)
    return best


def fit(
    router: nn.Module,
    objective: Objective,
    settings: TrainOptions,
    learning_rate: float,
    tokens: Sequence[TokenDataset],
    folder: Path,
) -> TrainedRouter:
    """Train a router at one learning rate."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=max(min(settings.batch_size, len(tokens[0]) // 16), 2),
        per_device_eval_batch_size=4096,
        weight_decay=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=settings.report_to,
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer = Trainer(
        model=RouterInTraining(router, objective),
        args=arguments,
        train_dataset=tokens[0],
        eval_dataset=tokens[1],
        data_collator=lambda batch: batch,
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    assert trainer.state.best_metric is not None
    return TrainedRouter(
        router.cpu().eval(), float(trainer.state.best_metric), learning_rate, trainer.state.log_history
    )


def router_inputs(labels: Labels, objective: Objective, tokens: torch.Tensor) -> torch.Tensor:
    """Return what a router's first layer reads, fp32 `[tokens, width]`."""
    inputs = labels.hidden[tokens].float()
    count = int(objective.router.get("top_logprobs", 0))  # type: ignore[call-overload]
    return torch.cat([inputs, labels.top_logprobs[tokens, :count].float()], dim=1) if count else inputs


def divide(labels: Labels, objective: Objective, settings: TrainOptions) -> tuple[Targets, torch.Tensor, torch.Tensor]:
    """Return the targets, and which of them are for training and for validation: no question is in both."""
    targets = objective.targets(labels)
    count = len(labels.questions)
    held_out = round(count * settings.validation)
    if not 0 < held_out < count:
        raise ValueError(
            f"labels: {labels.directory} has {count} questions, too few to hold out {settings.validation:.1%} of them "
            "for validation; label more examples."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    of_validation = torch.isin(labels.question[targets.tokens], order[:held_out])
    training, validation = (part.nonzero()[:, 0] for part in (~of_validation, of_validation))
    values = torch.unique(targets.label[training]).tolist()
    if len(values) < 2:
        always = "none is known" if not values else f"all are {int(values[0])}"
        raise NothingToLearn(
            f"labels: of the {len(training)} labels for training in {labels.directory} {always}, so that there is "
            "nothing to learn. See its README.md: label more examples, or roll out with another policy "
            "(--router-threshold)."
        )
    return targets, training, validation


@torch.no_grad()
def fold_into(router: Any, mean: torch.Tensor, scale: torch.Tensor, shrink: float) -> None:
    """Let a router read plain inputs though it was trained on standardised ones, and scale its log-odds."""
    first, last = getattr(router, "expand", router.score), router.score
    first.weight.copy_(first.weight / scale)
    first.bias.copy_(first.bias - first.weight @ mean)
    last.weight.mul_(shrink)
    last.bias.mul_(shrink)


# --- Report --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def report_on(trained: TrainedRouter, labels: Labels, settings: TrainOptions) -> dict[str, Any]:
    """Measure a router on the questions that were held out."""
    from sklearn.metrics import roc_auc_score

    objective = OBJECTIVES[settings.objective]
    targets, _, validation = divide(labels, objective, settings)
    tokens, label = targets.tokens[validation], targets.label[validation]
    questions = torch.unique(labels.question[tokens])
    held_out = torch.isin(labels.question, questions).nonzero()[:, 0]
    scores, everywhere = (
        torch.sigmoid(trained.router.log_odds(router_inputs(labels, objective, part))) for part in (tokens, held_out)
    )
    critical, needed = scores[label == 0], 1 - float(label.mean())
    thresholds = [above(everywhere, one) for one in SHARES]
    shares = [float(defer(everywhere, one).float().mean()) for one in thresholds]
    return {
        "questions": len(questions),
        "tokens": len(scores),
        "prefer_llm": needed,
        "auc": float(roc_auc_score(label.numpy(), scores.numpy())) if 0 < needed < 1 else None,
        "calibration_error": calibration_error(scores, label),
        "loss": trained.loss,
        "learning_rate": trained.learning_rate,
        "llm_share": [{"threshold": one, "llm_share": share} for one, share in zip(thresholds, shares, strict=True)],
        "router_threshold": above(critical, RECALL) if len(critical) else 0.5,
    }


def above(scores: torch.Tensor, share: float) -> float:
    """Return the smallest threshold that sends at least a share of scores to the LLM."""
    last = scores.sort().values[min(int(share * len(scores)), len(scores) - 1)]
    return float(torch.nextafter(last, torch.tensor(2.0)))


def calibration_error(scores: torch.Tensor, label: torch.Tensor) -> float:
    """Return the expected calibration error: how far `p_slm` is from what it promises, over bins of equal width."""
    bins = (scores * BINS).long().clamp(max=BINS - 1)
    inside = [bins == number for number in torch.unique(bins)]
    return sum(float((scores[one].mean() - label[one].mean()).abs() * one.float().mean()) for one in inside)


def draw_training(trained: TrainedRouter, objective: str, path: Path) -> None:
    """Draw the losses of training and validation by epoch; nothing where matplotlib is not installed."""
    try:
        figure = runs.new_figure((6, 4))
    except ImportError:
        return
    axes: Any = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "--")):
        losses = {entry["epoch"]: entry[key] for entry in trained.history if key in entry}
        axes.plot(list(losses), list(losses.values()), style, label=label)
    axes.axhline(trained.loss, color="#555555", linewidth=0.8, linestyle=":", label="weights that are kept")
    axes.set(xlabel="epoch", ylabel="loss per token", title=f"router trained with {objective}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    runs.save_figure(figure, path)
