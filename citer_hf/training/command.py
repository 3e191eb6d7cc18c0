"""What the commands of the method do with their options."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from torch import nn
from transformers.utils.hub import cached_file

from citer_hf import CiterForCausalLM
from citer_hf.belonging import saved_router
from citer_hf.bench.options import parse_numbers
from citer_hf.data.examples import Example, read_examples
from citer_hf.evaluation import calibrate as calibration
from citer_hf.evaluation.evaluate import evaluate as measure
from citer_hf.evaluation.evaluate import method_name
from citer_hf.evaluation.progress import Steps, progress_bar
from citer_hf.evaluation.results import SHARES
from citer_hf.evaluation.table import print_tables
from citer_hf.model.routers import hidden_size_of
from citer_hf.runs import alone, from_main_process, process_state

from .baselines import train_baselines
from .fingerprint import check_made_with, made_with
from .labelling import label_preferences, load_tokenizer
from .labels import Labels
from .router_trainer import TrainingSettings
from .train import PROVENANCE
from .train import train as train_router

__all__ = [
    "calibrate",
    "evaluate",
    "label",
    "load_pair",
    "parse_columns",
    "parse_numbers",
    "read",
    "settings",
    "train",
]

INTERRUPTED = 130


def load_pair(name: str, dtype: str, device_map: str | None, trust_remote_code: bool) -> Any:
    """Load a pair; under `accelerate launch`, each process on a device of its own."""
    state = process_state()
    several = state.num_processes > 1 and device_map == "auto"
    where: Any = ({"": state.device} if state.device.type != "cpu" else "cpu") if several else device_map
    return CiterForCausalLM.from_pretrained(name, dtype=dtype, device_map=where, trust_remote_code=trust_remote_code)


def parse_columns(pairs: Sequence[str] | None) -> dict[str, str]:
    """Read `FIELD=COLUMN` options."""
    columns = {}
    for pair in pairs or ():
        field, equals, column = pair.partition("=")
        if not (field and equals and column):
            raise ValueError(f"--map: expected FIELD=COLUMN, such as prompt=question, got {pair!r}.")
        columns[field] = column
    return columns


def read(data: str, columns: Sequence[str] | None, split: str | None, limit: int | None) -> list[Example]:
    """Read examples with answers."""
    return read_examples(data, parse_columns(columns), split=split, needs=("answer",), limit=limit)


def settings(learning_rates: str, epochs: int, batch_size: int, seed: int) -> TrainingSettings:
    """Return the settings of a training."""
    rates = parse_numbers("--learning-rate", learning_rates)
    if not rates or min(rates) <= 0:
        raise ValueError(f"--learning-rate: expected numbers above 0, got {learning_rates!r}.")
    return TrainingSettings(rates, epochs=epochs, batch_size=batch_size, seed=seed)


def label(model: Any, data: str, checker: str, out: Path, **options: Any) -> None:
    """Do what `citer label` does."""
    with going_on(out), reporting() as report:
        labels = label_preferences(model, data, checker, out, report=report, **options)
    if process_state().is_main_process:
        counts = labels.info["counts"]
        cases = ", ".join(f"{counts['cases'][case] / counts['tokens']:.1%}" for case in ("1", "2", "3"))
        typer.echo(
            f"{counts['tokens']} tokens of {counts['questions']} answers labelled in {out}: cases 1, 2, 3 are "
            f"{cases}; {counts['positive_rollouts']:.1%} of the roll-outs are right."
        )


def train(model: Any, labels: Path, out: Path, report_to: str, **options: Any) -> None:
    """Do what `citer train` does."""
    with going_on(out), reporting() as report:
        provenance = train_router(model, labels, out, report=report, report_to=report_to, **options)
    if process_state().is_main_process:
        facts = provenance["validation"]
        auc = "–" if facts["auc"] is None else f"{facts['auc']:.3f}"
        typer.echo(
            f"Router saved in {out}. On {facts['questions']} held-out questions: AUC {auc}, calibration error "
            f"{facts['calibration_error']:.3f}. LLM share along the reference answers, by threshold:"
        )
        for one in facts["llm_share"]:
            typer.echo(f"  {one['threshold']:.4f}  {one['llm_share']:.1%}")
        typer.echo(f"It starts with {facts['router_threshold']:.4f}; `citer calibrate` finds the one for your budget.")


def evaluate(
    model: Any,
    examples: Sequence[Example],
    checker: str,
    out: Path,
    *,
    baselines: Path | None,
    compare: Sequence[Path],
    methods: Sequence[str] | None,
    shares: Sequence[float],
    thresholds: Sequence[float],
    seed: int,
    **options: Any,
) -> None:
    """Do what `citer evaluate` does."""
    own = objective_of(str(model.name_or_path)) or method_name(model)
    routers: dict[str, nn.Module] = {}
    with going_on(out):
        if baselines is not None:
            labels = Labels.load(baselines)
            check_made_with(labels.info["made_with"], made_with(model, load_tokenizer(model)), baselines)
            if process_state().is_main_process:
                with reporting() as report, alone():
                    routers |= train_baselines(labels, TrainingSettings(seed=seed), report, methods)
            routers = from_main_process(routers)
        routers |= {name_of(directory): saved_router(directory, hidden_size_of(model.slm)) for directory in compare}
        routers = {name: router.to(model.slm.device) for name, router in routers.items()}
        results = measure(
            model,
            examples,
            checker,
            routers={own: model.router} | {name: router for name, router in routers.items() if name != own},
            shares=shares or SHARES,
            thresholds={own: thresholds} if thresholds else None,
            seed=seed,
            out=out,
            arguments={"baselines": baselines, "compare": list(compare)},
            **options,
        )
    if not process_state().is_main_process:
        return
    print_tables(results)
    typer.echo(f"results.json, results.md and curve.png are in {out}.")


def objective_of(name: str) -> str | None:
    """Return the method that a router was trained with, where `citer train` has noted it."""
    file = cached_file(name, PROVENANCE, _raise_exceptions_for_missing_entries=False) if name else None
    return json.loads(Path(file).read_text()).get("objective") if file else None


def name_of(directory: Path) -> str:
    """Return the method of a router to compare with."""
    objective = objective_of(str(directory)) if (directory / PROVENANCE).is_file() else None
    if objective is None:
        raise FileNotFoundError(
            f"--compare: {directory} has no {PROVENANCE} that names its method: expected a directory that "
            "`citer train` has made."
        )
    return objective


def calibrate(
    model: Any, examples: Sequence[Example], checker: str | None, directory: Path | None, **options: Any
) -> None:
    """Do what `citer calibrate` does."""
    found = calibration.calibrate(model, examples, checker, **options)
    low, high = found.llm_share_ci
    typer.echo(
        f"router_threshold {found.threshold:.6g}: the LLM writes {found.llm_share:.1%} ({low:.1%} to {high:.1%})"
    )
    if found.accuracy is not None and found.accuracy_ci is not None:
        low, high = found.accuracy_ci
        typer.echo(f"accuracy {found.accuracy:.1%} ({low:.1%} to {high:.1%}) of {found.problems} problems")
    if directory is not None:
        calibration.write_threshold(directory, found)
        typer.echo(f"Written into {directory}.")


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """Say, when work is interrupted, that it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. What is done is kept in {out}: run the same command to go on.", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def reporting() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far work is: a bar on a terminal, a line for every kind of work elsewhere."""
    shown = process_state().is_main_process
    with progress_bar(None, "units") as steps:
        yield Reporter(steps) if shown else lambda what, done, total: None


class Reporter:
    """Tells a bar about units of work, or stderr about kinds of work where there is no terminal."""

    def __init__(self, steps: Steps):
        self.steps, self.what = steps, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what:
            self.what = what
            self.steps.begin(what, total)
            if not self.steps.visible:
                typer.echo(f"{what}: {total} units", err=True)
        self.steps.reach(done)
