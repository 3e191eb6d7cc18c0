"""What `citer bench` does: load a pair, compare, and tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig

from citer_hf import CiterConfig, CiterForCausalLM

from .interruption import interruptible
from .machine import available_memory
from .memory import explain_out_of_memory, loading
from .options import BenchOptions, check_device, check_dtype, check_plot
from .report import print_json, print_report
from .results import BenchReport
from .run import Bench

__all__ = ["Source", "bench_command", "load"]


@dataclass(frozen=True)
class Source:
    """Where a pair comes from: a router repository, or two models."""

    model: str | None = None
    slm: str | None = None
    llm: str | None = None
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        bare = [name for name, value in (("--slm", self.slm), ("--llm", self.llm)) if value]
        if self.model and bare:
            raise ValueError(
                f"MODEL, {', '.join(bare)}: expected a router or a bare pair, got both. Leave out MODEL "
                f"({self.name}), or --slm and --llm."
            )
        if not self.model and len(bare) < 2:
            got = f"{bare[0]} alone" if bare else "nothing"
            raise ValueError(
                f"MODEL, --slm, --llm: expected a router's directory or repository id, `demo`, or both --slm and "
                f"--llm, got {got}. Try: citer bench demo"
            )

    @property
    def name(self) -> str:
        """What the report calls the pair."""
        return self.label or self.model or f"{self.slm} + {self.llm}"


def bench_command(source: Source, options: BenchOptions, as_json: bool = False, plot: Path | None = None) -> int:
    """Compare a pair with everything else that decodes, and print or draw what comes out."""
    device = check_device(source.device)
    check_dtype(source.dtype)
    check_plot(plot)
    with interruptible() as interruption:
        try:
            report = measure(source, options, device)
            with interruption.waits():
                (print_json if as_json else print_report)(report)
            if plot is not None and (report.interrupted or not interruption.has_come):
                from .plot import draw

                draw(report, plot)
        except KeyboardInterrupt:
            print("Interrupted before everything was told.", file=sys.stderr)
            return interruption.status
        if report.error is not None:
            print(f"Error: {report.error}", file=sys.stderr)
            return 1
        return interruption.status if report.interrupted or interruption.has_come else 0


def measure(source: Source, options: BenchOptions, device: str) -> BenchReport:
    """Load a pair and compare, as far as that gets."""
    available = available_memory(torch.device(device if device != "auto" else check_device(None)))
    bench = None
    try:
        bench = Bench(load(source, device, available), options, source.name, available)
        with progress_bar(bench.steps) as progress:
            return bench.run(progress)
    except KeyboardInterrupt:
        if bench is None:
            return BenchReport(source.name, options.as_dict(), interrupted=True)
        bench.interrupted = True
        return bench.report()


def load(source: Source, device: str, available: int) -> Any:
    """Load a pair."""
    keywords: dict[str, Any] = {"dtype": source.dtype, "device_map": device}
    if source.trust_remote_code:
        keywords["trust_remote_code"] = True
    with explain_out_of_memory(device, available, lambda _: loading(*configs(source), source.dtype)):
        if source.model is not None:
            model = CiterForCausalLM.from_pretrained(source.model, **keywords)
        else:
            assert source.slm is not None and source.llm is not None
            model = CiterForCausalLM.from_pair(source.slm, source.llm, router="confidence", **keywords)
    for option, part in (("--slm", model.slm), ("--llm", model.llm)):
        if isinstance(part.config, CiterConfig):
            raise ValueError(
                f"{option}: expected one language model, got a router with both of its models, "
                f"{part.config.name_or_path}. Give a router as MODEL, or name the model itself."
            )
    return model.eval()


def configs(source: Source) -> tuple[Any, Any]:
    """Return the configurations of the SLM and the LLM."""
    trust = source.trust_remote_code
    if source.model is not None:
        config = CiterConfig.from_pretrained(source.model)
        return config.slm_config, config.llm_config
    slm, llm = (AutoConfig.from_pretrained(name, trust_remote_code=trust) for name in (source.slm, source.llm))
    return slm, llm


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    # Drawn between steps alone: a thread that draws all the time would take time from what is measured.
    shown: dict[str, Any] = {"transient": True, "disable": not console.is_terminal, "auto_refresh": False}
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, **shown) as bar:
        task = bar.add_task("", total=total)
        # Called before a step, so that the first call has nothing done yet.
        done = -1

        def step(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=name, completed=done, refresh=True)

        yield step
