"""`citer demo`: the shipped pair solves word problems, some of them visibly, and all of them against the clock."""

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import citer_hf.demo

from ..data.tokens import real_tokens
from ..model.cache import CiterCache
from ..model.modeling import CiterForCausalLM
from ..model.schedule import rows_to_wait_for
from ..runs import CommandOptions, atomic_write, option, progress_bar
from ..terminal import Paint, WriterStreamer, legend
from .problems import Problem, is_correct, problems

BATCH_SIZE = 100
STREAMED = 3
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class DemoOptions(CommandOptions):
    seed: int = option(0, "Another seed gives other problems.")
    problems: int = option(200, "Held-out problems to measure on.", metavar="N", min=1)
    router_threshold: float | None = option(None, "The SLM's token stands when its score reaches this.", metavar="X")


@dataclass(frozen=True)
class Measurement:
    """The cost and the accuracy of one way to decode; tokens are those of all sequences."""

    name: str
    router_threshold: float | None
    problems: int
    correct: int
    tokens: int
    llm_tokens: int
    llm_passes: int
    seconds: float
    accuracy: float
    llm_share: float
    # Passes of the LLM that a sequence took part in: 1 when the LLM runs at every step.
    llm_passes_per_token: float
    tokens_per_second: float


@dataclass
class Report:
    """The measurements of a demo: SLM alone, LLM alone, and the pair at each threshold."""

    seed: int
    problems: int
    measurements: list[Measurement]
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        facts = {"seed": self.seed, "problems": self.problems, "batch_size": BATCH_SIZE}
        return facts | {"complete": not self.interrupted, "rows": [asdict(one) for one in self.measurements]}

    def table(self) -> str:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Column, Table

        if self.interrupted and not self.measurements:
            return "\nStopped before anything was measured."
        size = min(BATCH_SIZE, self.problems)
        title = f"{self.problems} held-out problems (seed {self.seed}), solved in batches of {size}"
        headers = ("accuracy", "tokens from\nthe LLM", "LLM forward\npasses / token", "tokens / s")
        columns = [Column(header, justify="right") for header in headers]
        table = Table("", *columns, title=title, box=SIMPLE, title_justify="left")
        for one in self.measurements:
            cells = (f"{one.accuracy:.1%}", f"{one.llm_share:.1%}", f"{one.llm_passes_per_token:.2f}")
            table.add_row(label(one.name, one.router_threshold), *cells, f"{one.tokens_per_second:,.0f}")
        console = Console()
        with console.capture() as text:
            console.print(table)
            if not self.interrupted:
                console.print(self.meaning(), markup=False, highlight=False)
        return ("\nStopped.\n" if self.interrupted else "") + text.get().rstrip("\n")

    def meaning(self) -> str:
        slm, llm, *pairs = self.measurements
        best = max(pairs, key=lambda one: (one.accuracy, -one.llm_share))
        return (
            f"At threshold {best.router_threshold:.3g} the pair solves {best.accuracy:.0%} of the problems with "
            f"{best.llm_share:.0%} of the tokens from the LLM; the SLM alone solves {slm.accuracy:.0%}, the LLM alone "
            f"{llm.accuracy:.0%}. It writes {best.tokens_per_second / llm.tokens_per_second:.2f} times as fast as the "
            "LLM alone here: texts that need the LLM wait for each other, so that it runs "
            f"{best.llm_passes_per_token:.2f} times per token. With models this small Python takes most of the time."
        )


def demo(*, visible: bool = True, **options: Any) -> Report:
    """Solve word problems with the shipped pair, some visibly; the options are the fields of `DemoOptions`."""
    wanted = DemoOptions(**options)
    # Models this small gain nothing from a second thread, and lose everything when another program holds that core.
    torch.set_num_threads(1)
    model = CiterForCausalLM.from_pretrained(citer_hf.demo.DEMO_PAIR)
    tokenizer = model.load_tokenizer()
    chosen = list(problems("test", wanted.seed, wanted.problems))
    shipped, threshold = model.default_threshold, wanted.router_threshold
    runs: list[tuple[str, float | None]] = [("SLM alone", None), ("LLM alone", None)]
    runs += [("pair", one) for one in (spread_thresholds(shipped) if threshold is None else [threshold])]
    report = Report(wanted.seed, len(chosen), [])
    try:
        if visible:
            slm, llm = model.slm.num_parameters(), model.llm.num_parameters()
            sizes = f"an SLM of {slm:,} parameters and an LLM of {llm:,}."
            print("Two models write word problems' solutions together:", sizes)
            print(f"{legend(sys.stdout)}\n")
            for number, problem in enumerate(chosen[:STREAMED], 1):
                solve_visibly(model, tokenizer, problem, number, shipped if threshold is None else threshold)
        # Every model runs once before the clock does.
        inputs = tokenizer(chosen[0].prompt, return_tensors="pt").to(model.device)
        for part in (model.slm, model.llm, model):
            part.generate(**inputs, generation_config=settings(model, max_new_tokens=2))
        with progress_bar(sys.stderr.isatty()) as bar:
            for name, one in runs:
                bar.begin(label(name, one), len(chosen))
                report.measurements.append(measure(model, tokenizer, chosen, name, one, bar.advance))
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def export(path: str | Path, seed: int = 0, count: int = 200, split: str = "test") -> None:
    """Write problems as JSON lines with `prompt`, `response` and `answer`, to a file that does not exist yet."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name or remove it first.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory to write {path.name} in.")
    lines = [json.dumps(asdict(problem)) + "\n" for problem in problems(split, seed, count)]
    with atomic_write(path) as file:
        file.write("".join(lines).encode())


def solve_visibly(model: CiterForCausalLM, tokenizer: Any, problem: Problem, number: int, threshold: float) -> None:
    paint = Paint(sys.stdout)
    paint.dim(f"Problem {number}. {problem.prompt.strip()}")
    cache = CiterCache(model.config)
    streamer = WriterStreamer(tokenizer, cache, paint)
    inputs = tokenizer(problem.prompt, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"generation_config": settings(model), "router_threshold": threshold}
    try:
        model.generate(**inputs, **options, past_key_values=cache, streamer=streamer)
    except KeyboardInterrupt:
        paint.end()
        raise
    response = tokenizer.decode(streamer.tokens, skip_special_tokens=True)
    verdict = "right" if is_correct(response, problem) else f"wrong, the answer is {problem.answer}"
    by_llm = int(cache.routing.to_llm.sum())
    paint.dim(f"({verdict}; {by_llm} of {len(streamer.tokens)} tokens from the LLM)\n")


def measure(
    model: CiterForCausalLM,
    tokenizer: Any,
    problems: Sequence[Problem],
    name: str,
    router_threshold: float | None = None,
    progress: Callable[[int], None] = lambda solved: None,
) -> Measurement:
    alone = {"SLM alone": model.slm, "LLM alone": model.llm}.get(name)
    correct = tokens = llm_tokens = llm_passes = 0
    seconds = 0.0
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        inputs = tokenizer([problem.prompt for problem in batch], padding=True, return_tensors="pt").to(model.device)
        cache, options = CiterCache(model.config), {"generation_config": settings(model)}
        if alone is None:
            options |= {"past_key_values": cache, "router_threshold": router_threshold}
            # As `generate` chooses, but not by measured times: counts are reproducible.
            options["waiting_rows"] = lambda unfinished, share, _: rows_to_wait_for(unfinished, share, 0.3)
        began = time.perf_counter()
        output = (alone or model).generate(**inputs, **options)
        seconds += time.perf_counter() - began

        new = output[:, inputs.input_ids.shape[1] :]  # [batch, generated]
        real = real_tokens(new, model.generation_config.eos_token_id)
        by_llm = cache.routing.to_llm if alone is None else torch.full_like(real, alone is model.llm)
        calls = cache.routing.llm_calls if alone is None else int(by_llm.any()) * new.shape[1]
        tokens += int(real.sum())
        llm_tokens += int((by_llm & real).sum())
        llm_passes += round(calls / new.shape[1] * int(real.sum()))
        correct += sum(map(is_correct, tokenizer.batch_decode(new, skip_special_tokens=True), batch))
        progress(len(batch))
    counts = (len(problems), correct, tokens, llm_tokens, llm_passes, seconds)
    shares = (correct / len(problems), llm_tokens / max(tokens, 1), llm_passes / max(tokens, 1), tokens / seconds)
    return Measurement(name, router_threshold, *counts, *shares)


def label(name: str, router_threshold: float | None) -> str:
    return name if router_threshold is None else f"{name} at {router_threshold:.3g}"


def settings(model: CiterForCausalLM, max_new_tokens: int | None = None) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=max_new_tokens or MAX_NEW_TOKENS)
    return config


def spread_thresholds(shipped: float) -> list[float]:
    """Return the shipped threshold between a lower and a higher one, a tenth and ten times its odds."""
    odds = shipped / (1 - shipped) if shipped < 1 else 99.0
    low, high = (round(one / (1 + one), 3) for one in (odds / 10, odds * 10))
    return [low, shipped, high]
