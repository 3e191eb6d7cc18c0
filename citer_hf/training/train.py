"""`train`: from labels to a router repository, with transformers' `Trainer` (CITER, section 3).

1. A router learns an objective from labels, once for every learning rate; the best by validation loss is kept.
2. Before every further round, the new router makes the roll-outs again (section 3.2).
3. The pair is saved with its new router and its provenance.
"""

import copy
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.hub import cached_file

from citer_hf import CiterConfig, CiterForCausalLM, runs
from citer_hf.data.checkers import Checker, named
from citer_hf.evaluation.decode import with_router
from citer_hf.evaluation.evaluate import OWN_VETO
from citer_hf.model.configuration import router_width
from citer_hf.model.loading import load_router
from citer_hf.model.routers import build_router

from .label import Policy
from .labels import Labels
from .objectives import OBJECTIVES, QUERY, NothingToLearn, Objective

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"
# TensorBoard's files, where the Hub looks for them.
LOGS = "runs"
# A further round's roll-outs send this share of the tokens to the LLM: a policy that cannot finish an answer says
# nothing about the token it began with.
POLICY_SHARE = 1 / 3
# Beyond this, scores of a sigmoid in fp32 are soon equal, and thresholds could not tell them apart: nine tenths of the
# tokens stay below.
LARGEST_LOG_ODDS = 12.0
# The threshold to start with sends this share of the tokens that need the LLM there.
RECALL = 0.95
# The share of the questions that is held out.
HELD_OUT = 0.125
# Resamples of the questions for an interval, and the ranks of scores that it tells apart.
RESAMPLES, RANKS = 2000, 1000
# Where training logs may go: libraries that `Trainer` knows, and that are installed on their own.
LOGGERS = ("trackio", "tensorboard", "wandb")
# Tokens in a batch of the training.
BATCH_SIZE = 512


@dataclass(frozen=True)
class TrainOptions(runs.CommandOptions):
    objective: str = runs.option("citer-plus", "Or citer (the paper's), acceptance, citer-s, co-llm.", metavar="NAME")
    rounds: int = runs.option(1, "Before every further round, roll out again with the new router.", metavar="N", min=1)
    checker: str | Checker | None = runs.option(
        None, "Of further rounds. [default: that of the labels]", metavar="NAME"
    )
    learning_rates: tuple[float, ...] = runs.option(
        (1e-3, 3e-3, 1e-2), "Those to try; the best by validation is kept.", metavar="X,...", flag="--learning-rate"
    )
    epochs: int = runs.option(25, "At most.", metavar="N", min=1)
    patience: int = runs.option(5, "Epochs without a better validation loss that end a training.", "N", min=1)
    seed: int = runs.option(0, "Of everything that is drawn.")
    labels_revision: str | None = runs.option(None, "Of labels on the Hub: branch, tag or commit.", metavar="NAME")
    report_to: str = runs.option("none", f"Where training logs go: {', '.join(LOGGERS)} or none.", metavar="NAME,...")

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, got {self.objective!r}.")
        super().__post_init__()
        if self.rounds > 1 and not OBJECTIVES[self.objective].relabelled:
            raise ValueError(f"rounds: {self.objective!r} makes no roll-outs, so that further rounds change nothing.")
        for name in self.loggers:
            if name not in LOGGERS:
                raise ValueError(f"report_to: expected some of {', '.join(LOGGERS)}, or none; got {name!r}.")
            if name not in get_available_reporting_integrations():
                raise ImportError(f"report_to: {name} is not installed: pip install {name}")

    @property
    def loggers(self) -> list[str]:
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]


def train(model: CiterForCausalLM, labels: Labels | str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Train a router for a pair, and save it as a router repository with its provenance.

    Under `accelerate launch`, one process trains and all make the roll-outs of further rounds. The same call resumes
    an interrupted run.

    Args:
        model: The pair that was labelled. It is not changed.
        labels: Labels, their directory, or the id of a data set on the Hub that `citer push --dataset` has written.
        out: Directory for the router, which does not exist yet or was interrupted.
        options: The fields of `TrainOptions`, such as `objective`.

    Returns:
        What is in `provenance.json`: options, labels, validation, losses, versions and the sha256 of the router.

    Raises:
        ValueError: for unusable options, labels of another pair or that are all equal, or an `out` of other arguments.
        FileExistsError, FileNotFoundError: when the directory holds something else, or there are no labels.
    """
    settings, out = TrainOptions(**options), Path(out)
    labels = labels if isinstance(labels, Labels) else Labels.load(labels, settings.labels_revision)
    labels.check_pair(model)
    own = labels.info.get("checker", "")
    if settings.rounds > 1 and settings.checker is None and ":" in own and labels.source.get("commit"):
        raise ValueError(f"checker: the labels from the Hub name code, {own!r}. Give --checker {own} to run it.")
    name, check = named(settings.checker or labels.info["checker"]) if settings.rounds > 1 else (None, None)
    settings = replace(settings, checker=name)
    objective = OBJECTIVES[settings.objective]
    objective.check(settings.objective, labels)
    divide(labels, objective, settings)
    with runs.work_in(out, {**vars(settings), "labels_sha256": runs.sha256_of(labels.info)}) as work:
        limits = (labels.info["options"]["max_new_tokens"], labels.info["options"]["batch_tokens"])
        policy = Policy(model, labels.questions, check, 0.0, *limits, work=work)
        router, found = train_round(labels, settings, policy, 1)
        for number in range(2, settings.rounds + 1):
            labels = relabel(labels, settings, router, policy, number)
            router, found = train_round(labels, settings, policy, number)
        pair = with_router(model, router)
        pair.config = copy.deepcopy(model.config)
        pair.config.router = {**objective.router, "hidden_size": router_width(model.slm.config)}
        pair.config.router_threshold = found["validation"]["router_threshold"]
        # The veto of a pair that was labelled with a router that needs no training was meant for that router.
        pair.config.llm_veto = 0.0
        made = {
            **runs.provenance(pair, settings),
            "objective": settings.objective,
            "rounds": settings.rounds,
            "labels": {**labels.source, **{key: labels.info[key] for key in labels.info if key != "versions"}},
            **found,
        }
        if work.process == 0:
            pair.save_pretrained(out)
            runs.write_json(out / PROVENANCE, made)
    return made


def summary(made: Mapping[str, Any], out: str | Path) -> str:
    """Return what `train` found and where the router is, as text."""
    facts = made["validation"]
    interval = "" if facts["auc"] is None else " (95 %: {:.4f} to {:.4f})".format(*facts["auc_ci"])
    return (
        f"The router is in {out}; on {facts['questions']} held-out questions, its AUC is {facts['auc']}{interval}.\n"
        f"Its threshold is {facts['router_threshold']:.4f}; `citer calibrate` finds the one for your budget."
    )


def train_round(labels: Labels, settings: TrainOptions, policy: Policy, number: int) -> tuple[Any, dict[str, Any]]:
    """Train in the main process, unless that was done before, and return what `train_router` returned everywhere."""
    name, objective = f"training, round {number}", OBJECTIVES[settings.objective]

    def compute() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        with runs.alone():
            router, found = train_router(labels, objective, settings, policy.work.folder / name)
        return router.state_dict(), found

    weights, found = policy.work.once(name, compute)
    router = build_router(objective.router, labels.hidden.shape[1]).eval()
    router.load_state_dict(weights)
    return router, found


def relabel(labels: Labels, settings: TrainOptions, router: Any, policy: Policy, number: int) -> Labels:
    """Replace the outcomes of roll-outs by those with a new router."""
    objective = OBJECTIVES[settings.objective]
    with torch.no_grad():
        scores = router.log_odds(router_inputs(labels, objective))
    middle = scores.sort().values[int(POLICY_SHARE * len(scores))]
    again = torch.isin(labels.case, torch.tensor(objective.relabelled)) & (labels.rollout >= 0)
    pair = with_router(policy.model, router.to(policy.model.slm.device))
    policy = replace(policy, model=pair, threshold=float(torch.sigmoid(middle)))
    rollout, llm_rollout = policy.compare(vars(labels), again.nonzero()[:, 0], f", round {number}")
    return replace(
        labels,
        rollout=torch.where(again, rollout, labels.rollout),
        llm_rollout=torch.where(again, llm_rollout, labels.llm_rollout),
    )


class RouterInTraining(nn.Module):
    """The router with its loss, as `Trainer` wants it."""

    def __init__(self, router: Any, objective: Objective):
        super().__init__()
        self.router, self.objective = router, objective

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor, slm_logprob: torch.Tensor, llm_logprob: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        log_odds = self.router.log_odds(inputs)
        loss = self.objective.loss(log_odds, labels, slm_logprob, llm_logprob)
        return {"loss": loss.mean(), "logits": log_odds}


def train_router(
    labels: Labels, objective: Objective, settings: TrainOptions, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """Return the router with the best validation loss of all learning rates, its validation and its losses."""
    # 1. Standardised inputs.
    label, *parts = divide(labels, objective, settings)
    inputs = router_inputs(labels, objective)
    mean, scale = inputs[parts[0]].mean(dim=0), inputs[parts[0]].std(dim=0).clamp_min(1e-4)
    columns = {
        "inputs": (inputs - mean) / scale,
        "labels": label.float(),
        "slm_logprob": labels.slm_logprob,
        "llm_logprob": labels.llm_logprob,
    }
    # A dataset is a list of tokens, whose columns are taken from the tensors a batch at once.
    training, validation = (part.tolist() for part in parts)
    # 2. One training for every learning rate.
    tried, trainings = [], []
    for rate in settings.learning_rates:
        set_seed(settings.seed)
        router: Any = build_router(objective.router, labels.hidden.shape[1])
        place = folder / f"{rate:g}"
        arguments = TrainingArguments(
            output_dir=str(place),
            learning_rate=rate,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=max(min(BATCH_SIZE, len(training) // 16), 2),
            per_device_eval_batch_size=4096,
            weight_decay=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            run_name=f"{folder.parents[1].name}, {folder.name}, learning rate {rate:g}",
            project="citer",
            report_to=settings.loggers,
            disable_tqdm=True,
            seed=settings.seed,
        )
        trainer = Trainer(
            model=RouterInTraining(router, objective),
            args=arguments,
            train_dataset=training,
            eval_dataset=validation,
            data_collator=lambda batch: {name: values[batch] for name, values in columns.items()},
            callbacks=[EarlyStoppingCallback(settings.patience)],
        )
        trainer.remove_callback(PrinterCallback)
        if (board := trainer.pop_callback(TensorBoardCallback)) is not None:
            # Beside the router: the directory of the training is removed at the end.
            board.logging_dir = str(folder.parents[1] / LOGS / arguments.run_name)
            trainer.add_callback(board)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(place)) if place.is_dir() else None)
        if "wandb" in settings.loggers:
            import_module("wandb").finish()
        tried.append((trainer.state.best_metric, rate, router.cpu().eval(), trainer.state.log_history))
        trainings.append(how_it_ended(rate, trainer.state.log_history, settings))
    # 3. The best one, for plain inputs, with scores that do not saturate.
    loss, rate, router, history = min(tried, key=lambda one: one[:2])
    with torch.no_grad():
        log_odds = router.log_odds(columns["inputs"][label >= 0]).abs().sort().values
        shrink = min(1.0, LARGEST_LOG_ODDS / float(log_odds[int(0.9 * len(log_odds))]))
        first, last = getattr(router, "expand", router.score), router.score
        first.weight.div_(scale)
        first.bias.sub_(first.weight @ mean)
        last.weight.mul_(shrink)
        last.bias.mul_(shrink)
        scores = torch.sigmoid(router.log_odds(inputs))
    report = {"loss": loss, "learning_rate": rate, **report_on(scores, labels, label, parts[1])}
    tokens: dict[str, Any] = {"training": len(training), "validation": len(validation)}
    tokens["dropped"] = int((label < 0).sum())
    tokens["dropped_because"] = "the labels do not tell which model is wanted there, such as beyond --rollouts"
    return router, {"validation": report, "tokens": tokens, "trainings": trainings, "history": history}


def how_it_ended(rate: float, history: Sequence[Mapping[str, Any]], settings: TrainOptions) -> dict[str, Any]:
    """Return the best and the last epoch of a training, and whether it was stopped early."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    epochs = {"best_epoch": losses.index(min(losses)) + 1, "epochs": len(losses)}
    return {"learning_rate": rate, "loss": min(losses), **epochs, "stopped_early": len(losses) < settings.epochs}


def router_inputs(labels: Labels, objective: Objective) -> torch.Tensor:
    """Return the input of a router's first layer at every token, fp32 `[tokens, width]`."""
    count = objective.router.get("top_logprobs", 0)
    return torch.cat([labels.hidden.float(), labels.top_logprobs[:, :count].float()], dim=1)


def divide(
    labels: Labels, objective: Objective, settings: TrainOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the targets, and the tokens for training and for validation, which have no question in common."""
    label, count = objective.targets(labels), len(labels.questions)
    held_out = round(count * HELD_OUT)
    if not held_out:
        raise ValueError(f"labels: expected enough questions to hold out {HELD_OUT:.1%} of them, got {count}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    of_validation = torch.isin(labels.question, order[:held_out])
    training, validation = (((label >= 0) & part).nonzero()[:, 0] for part in (~of_validation, of_validation))
    values = torch.unique(label[training]).tolist()
    if len(values) < 2:
        raise NothingToLearn(
            f"labels: of the {len(training)} labels for training in {labels.directory}, all are {values}: there is "
            "nothing to learn. Label more examples, or roll out with another policy (--router-threshold)."
        )
    return label, training, validation


def report_on(scores: torch.Tensor, labels: Labels, label: torch.Tensor, validation: torch.Tensor) -> dict[str, Any]:
    """Return how good scores of all tokens are, on the questions that were held out."""
    from sklearn.metrics import roc_auc_score

    scores, label, question = scores[validation], label[validation], labels.question[validation]
    auc, interval, threshold, critical = None, None, 0.5, scores[label == 0].sort().values
    if 0 < len(critical) < len(scores):
        auc = round(float(roc_auc_score(label.numpy(), scores.numpy())), 4)
        interval = auc_interval(scores, label, question)
    if len(critical):
        # The smallest that sends at least this share of the critical tokens to the LLM.
        last = critical[min(int(RECALL * len(critical)), len(critical) - 1)]
        threshold = float(torch.nextafter(last, torch.tensor(2.0)))
    found = {"questions": len(torch.unique(question)), "tokens": len(scores), "auc": auc, "auc_ci": interval}
    return {**found, "router_threshold": threshold}


def auc_interval(scores: torch.Tensor, label: torch.Tensor, question: torch.Tensor) -> list[float]:
    """Return the 95 % bootstrap interval of the AUC; questions are drawn again, not tokens."""
    # 1. How many tokens of either label each question has at each rank, [questions, ranks].
    rank = scores.argsort().argsort() * RANKS // len(scores)
    row, count = torch.unique(question, return_inverse=True)[1], len(torch.unique(question))
    ones = torch.ones(len(scores))
    of = [torch.zeros(count, RANKS).index_put_((row[at], rank[at]), ones[at], True) for at in (label == 0, label == 1)]
    # 2. How often each question is drawn, [resamples, questions], and the pairs of tokens in the right order.
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(RESAMPLES, count).scatter_add_(1, drawn, torch.ones(drawn.shape))
    critical, fine = (times @ one for one in of)
    right = ((critical.cumsum(1) - critical / 2) * fine).sum(1) / (critical.sum(1) * fine.sum(1))
    low, high = right.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(low, 4), round(high, 4)]


# --- Routers to compare with in evaluations --------------------------------------------------------------------------

TRAINED = {**OBJECTIVES, "query": QUERY}
# Those that need no training, and their kinds: `evaluate` gives the last two a veto and a threshold of their own.
UNTRAINED = {name: name for name in ("confidence", "entropy", "random")} | dict.fromkeys(OWN_VETO, "confidence")


def baseline_routers(
    model: CiterForCausalLM, labels_dir: str | Path | None, methods: Sequence[str] | None = None, seed: int = 0
) -> dict[str, nn.Module]:
    """Return routers by the names of their methods, trained by one process, or of the kinds that need no training."""
    known = [*TRAINED, *UNTRAINED] if labels_dir is not None else [*UNTRAINED]
    chosen = methods or known
    if not set(chosen) <= set(known):
        asked = f"got {', '.join(chosen)}. The others need labels (--baselines)."
        raise ValueError(f"methods: expected some of {', '.join(known)}; {asked}")
    if labels_dir is not None:
        labels = Labels.load(labels_dir)
        labels.check_pair(model)
    routers: dict[str, nn.Module] = {}
    if runs.process_state().is_main_process:
        with runs.alone(), tempfile.TemporaryDirectory() as folder:
            for name in runs.progress(chosen, "training"):
                try:
                    if name in UNTRAINED:
                        routers[name] = build_router({"type": UNTRAINED[name]}, router_width(model.slm.config))
                    else:
                        TRAINED[name].check(name, labels)
                        place, settings = Path(folder, name), TrainOptions(seed=seed)
                        routers[name], _ = train_router(labels, TRAINED[name], settings, place)
                except NothingToLearn as error:
                    # An SLM that is never right alone leaves query-level routing nothing to learn.
                    logger.warning("%s is left out. %s", name, error)
    (routers,) = broadcast_object_list([routers])
    return {name: router.to(model.slm.device) for name, router in routers.items()}


def router_of(directory: str | Path, model: CiterForCausalLM) -> tuple[str, nn.Module]:
    """Return method and router of a directory that `citer train` has made for the same pair."""
    directory = Path(directory)
    method = method_of(str(directory)) if (directory / PROVENANCE).is_file() else None
    if method is None:
        raise FileNotFoundError(f"--compare: expected a directory that `citer train` has made, got {directory}.")
    router: Any = load_router(CiterConfig.from_pretrained(directory).router, model.slm.config, str(directory), {})
    return method, router.eval().to(model.slm.device)


def method_of(name: str) -> str | None:
    """Return the method that a router was trained with, where `citer train` has noted it; `name`: path or id."""
    file = cached_file(name, PROVENANCE, _raise_exceptions_for_missing_entries=False) if name else None
    return json.loads(Path(file).read_text()).get("objective") if file else None
