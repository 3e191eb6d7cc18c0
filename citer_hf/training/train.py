"""`citer train`: from labels to a router repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from citer_hf.data.checkers import Checker, get_checker
from citer_hf.data.examples import read_examples
from citer_hf.evaluation.decoding import with_router
from citer_hf.evaluation.provenance import module_fingerprint, versions
from citer_hf.model.routers import hidden_size_of
from citer_hf.runs import atomic_write, wait_for_all

from .fingerprint import check_made_with, made_with
from .labelling import load_tokenizer
from .labels import Labels
from .objectives import OBJECTIVES
from .report import draw_training, report_on
from .rounds import Rounds, train_in_rounds
from .router_trainer import DEFAULTS, TrainedRouter, TrainingSettings
from .units import Workplace

__all__ = ["train"]

WORK = ".work"
PROVENANCE = "provenance.json"


def train(
    model: Any,
    labels: Labels | str | Path,
    out: str | Path,
    *,
    objective: str = "citer-plus",
    rounds: int = 1,
    data: Any = None,
    checker: str | Checker | None = None,
    rollouts: int | None = None,
    settings: TrainingSettings = DEFAULTS,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a router for a pair, and save it as a router repository with its provenance and training curve."""
    out = Path(out)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, got {objective!r}.")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}.")
    if out.exists() and not (out / WORK).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} exists already; choose another directory or remove it first.")
    labels = labels if isinstance(labels, Labels) else Labels.load(labels)
    tokenizer = load_tokenizer(model)
    check_made_with(labels.info["made_with"], made_with(model, tokenizer), labels.directory)
    if data is not None:
        check_data(labels, data)
    chosen = OBJECTIVES[objective]
    if rounds > 1 and not chosen.relabelled:
        raise ValueError(f"rounds: {objective!r} makes no roll-outs, so that further rounds change nothing.")
    again = Rounds(rounds, rollouts, find_checker(checker, labels) if rounds > 1 else None)
    what = {
        "objective": objective,
        "rounds": rounds,
        "rollouts": rollouts,
        "settings": asdict(settings),
        "labels": {key: value for key, value in labels.info.items() if key not in ("versions", "counts")},
    }
    place = Workplace(out / WORK, what, report)
    trained, last_labels = train_in_rounds(model, tokenizer, labels, chosen, settings, again, place, **arguments)
    facts = report_on(trained, last_labels)
    provenance = {**what, "validation": facts, "history": trained.history, "versions": versions()}
    provenance["router_sha256"] = module_fingerprint(trained.router)
    if place.state.is_main_process:
        save(model, trained, facts["router_threshold"], out)
        with atomic_write(out / PROVENANCE) as file:
            file.write((json.dumps(provenance, indent=2) + "\n").encode())
        draw_training(trained, objective, out / "training.png")
        shutil.rmtree(out / WORK)
    wait_for_all()
    return provenance


def check_data(labels: Labels, data: Any) -> None:
    """Refuse examples other than those that were labelled."""
    labelled = {one.example.id for one in labels.questions}
    missing = labelled - {one.id for one in read_examples(data, labels.info["columns"], split=labels.info["split"])}
    if missing:
        raise ValueError(
            f"data: it has no example {min(missing)!r}, which was labelled ({len(missing)} of {len(labelled)} are "
            "missing). Give the data that the labels were made from, or leave it out: the labels hold the examples."
        )


def find_checker(checker: str | Checker | None, labels: Labels) -> Checker:
    """Return the checker of further rounds."""
    if callable(checker):
        return checker
    try:
        return get_checker(checker or labels.info["checker"])
    except ValueError as error:
        raise ValueError(f"{error} The labels were made with {labels.info['checker']!r}; pass checker=...") from error


def save(model: Any, trained: TrainedRouter, router_threshold: float, out: Path) -> None:
    """Save the pair with its new router."""
    pair = with_router(model, trained.router)
    pair.config = type(model.config).from_dict(model.config.to_dict())
    pair.config.router = {**trained.spec, "hidden_size": hidden_size_of(model.slm)}
    pair.config.router_threshold = router_threshold
    pair.save_pretrained(out)
