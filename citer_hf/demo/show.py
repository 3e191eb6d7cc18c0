"""What `citer demo` does: problems solved before the reader's eyes, then a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.runs import atomic_write
from citer_hf.terminal import Paint, WriterStreamer, legend

from .measuring import Measurement, measure, settings, spread_thresholds
from .problems import Problem, is_correct, problems
from .report import print_json, print_table, row_label

__all__ = ["export", "show"]

STREAMED = 3


def export(path: Path, seed: int, count: int, split: Any = "test") -> None:
    """Write problems as JSON lines with `prompt`, `response` and `answer`."""
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name or remove it first.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory to write {path.name} in.")
    chosen = list(problems(split, seed, count))
    with atomic_write(path) as file:
        for problem in chosen:
            file.write((json.dumps(asdict(problem)) + "\n").encode())


def show(path: str, seed: int, count: int, router_threshold: float | None = None, as_json: bool = False) -> int:
    """Solve a few problems visibly, then measure the models alone and together."""
    # Models this small gain nothing from a second thread, and lose everything when another program holds that core.
    torch.set_num_threads(1)
    model = CiterForCausalLM.from_pretrained(path)
    tokenizer = model.load_tokenizer()
    chosen = list(problems("test", seed, count))
    shipped = model.config.router_threshold
    thresholds = spread_thresholds(shipped) if router_threshold is None else [router_threshold]

    done: list[Measurement] = []
    interrupted = False
    try:
        if not as_json:
            introduce(model)
            for number, problem in enumerate(chosen[:STREAMED], 1):
                stream(model, tokenizer, problem, number, shipped if router_threshold is None else router_threshold)
        for measurement in measure_all(model, tokenizer, chosen, thresholds):
            done.append(measurement)
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        print_json(done, seed, count, complete=not interrupted)
    else:
        print_table(done, seed, count, interrupted)
    return 130 if interrupted else 0


def introduce(model: CiterForCausalLM) -> None:
    """Print what the two models are, and how to read the text that follows."""
    slm, llm = (sum(weight.numel() for weight in part.parameters()) for part in (model.slm, model.llm))
    print(f"Two models write word problems' solutions together: an SLM of {slm:,} parameters and an LLM of {llm:,}.")
    print(f"{legend(sys.stdout)}\n")


def stream(model: CiterForCausalLM, tokenizer: Any, problem: Problem, number: int, router_threshold: float) -> None:
    """Solve one problem and paint the solution as it is written."""
    paint = Paint(sys.stdout)
    paint.dim(f"Problem {number}. {problem.prompt.strip()}")
    cache = CiterCache(model.config)
    streamer = WriterStreamer(tokenizer, cache, paint)
    try:
        model.generate(
            **tokenizer(problem.prompt, return_tensors="pt").to(model.device),
            generation_config=settings(model),
            past_key_values=cache,
            router_threshold=router_threshold,
            streamer=streamer,
        )
    except KeyboardInterrupt:
        paint.end()
        raise
    response = tokenizer.decode(streamer.tokens, skip_special_tokens=True)
    verdict = "right" if is_correct(response, problem) else f"wrong, the answer is {problem.answer}"
    by_llm = int(cache.routing.to_llm.sum())
    paint.dim(f"({verdict}; {by_llm} of {len(streamer.tokens)} tokens from the LLM)\n")


def measure_all(
    model: CiterForCausalLM, tokenizer: Any, chosen: Sequence[Problem], thresholds: Sequence[float]
) -> Iterator[Measurement]:
    """Measure the SLM, the pair at each threshold, and the LLM, with a progress bar on a terminal's stderr."""
    runs: list[tuple[str, float | None]] = [("SLM alone", None), ("LLM alone", None)]
    runs += [("pair", threshold) for threshold in thresholds]
    warm_up(model, tokenizer, chosen[0])
    with progress_bar(len(runs) * len(chosen)) as bar:
        task = bar.task_ids[0]
        for name, threshold in runs:
            bar.update(task, description=row_label(name, threshold))
            yield measure(model, tokenizer, chosen, name, threshold, lambda solved: bar.advance(task, solved))


def warm_up(model: CiterForCausalLM, tokenizer: Any, problem: Problem) -> None:
    """Let every model run once, so that the first measurement does not pay for what is done only once."""
    inputs = tokenizer(problem.prompt, return_tensors="pt").to(model.device)
    for part in (model.slm, model.llm, model):
        part.generate(**inputs, generation_config=settings(model, max_new_tokens=2))


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """Show a bar with one task on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:16}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task("", total=total)
        yield bar
