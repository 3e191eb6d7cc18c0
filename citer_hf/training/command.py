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
from citer_hf.cli_shared import parse_numbers
from citer_hf.data.examples import Example, read_examples
from citer_hf.evaluation import calibrate as calibration
from citer_hf.evaluation.evaluate import SHARES, method_name
from citer_hf.evaluation.evaluate import evaluate as measure
from citer_hf.model.hidden_states import hidden_size_of
from citer_hf.runs import Progress, alone, from_main_process, process_state, progress_bar

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
            thresholds=tuple(thresholds),
            seed=seed,
            out=out,
            **options,
        )
    if not process_state().is_main_process:
        return
    typer.echo(results.table())
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


def calibrate(model: Any, examples: Sequence[Example], checker: str | None, **options: Any) -> None:
    """Do what `citer calibrate` does."""
    typer.echo(calibration.calibrate(model, examples, checker, **options).summary())
    if options["write"] or options["out"] is not None:
        typer.echo(f"Written into {options['out'] or model.name_or_path}.")


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
    with progress_bar(shown) as progress:
        yield Reporter(progress) if shown else lambda what, done, total: None


class Reporter:
    """Tells a bar about units of work."""

    def __init__(self, progress: Progress):
        self.progress, self.what, self.done = progress, "", 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what:
            self.what, self.done = what, 0
            self.progress.begin(what, total)
        self.progress.advance(done - self.done)
        self.done = done
