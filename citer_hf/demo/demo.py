"""`citer demo`: the shipped pair solves word problems, some of them visibly, and all of them against the clock."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import citer_hf.demo

from ..evaluation.decode import Alone, decode, with_router
from ..model.cache import CiterCache
from ..model.modeling import CiterForCausalLM
from ..model.routers import LLM_ALONE, ConfidenceRouter
from ..runs import CommandOptions, atomic_write, option, progress
from ..terminal import Paint, WriterStreamer, legend
from .problems import Problem, is_correct, problems

SLOTS = 100
STREAMED = 3
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class DemoOptions(CommandOptions):
    seed: int = option(0, "Another seed gives other problems.")
    problems: int = option(200, "Held-out problems to measure on.", metavar="N", min=1)
    router_threshold: float | None = option(None, "The SLM's token stands when its score reaches this.", metavar="X")


class Way(NamedTuple):
    """A way to decode: a pair at a threshold and a veto, or one of its models alone."""

    name: str
    pair: CiterForCausalLM
    router_threshold: float | None = None
    llm_veto: float = 0.0
    alone: Alone | None = None


@dataclass(frozen=True)
class Measurement:
    """The cost and the accuracy of one way to decode; tokens and passes are those of all sequences, each by itself."""

    name: str
    router_threshold: float | None
    llm_veto: float
    problems: int
    correct: int
    tokens: int
    llm_tokens: int
    llm_passes: int
    seconds: float
    accuracy: float
    llm_share: float
    llm_passes_per_token: float
    tokens_per_second: float


@dataclass
class Report:
    """The measurements of a demo: each model alone, the pair, a router without training, and the LLM's own text."""

    seed: int
    problems: int
    measurements: list[Measurement]
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        facts = {"seed": self.seed, "problems": self.problems, "slots": SLOTS}
        return facts | {"complete": not self.interrupted, "rows": [asdict(one) for one in self.measurements]}

    def table(self) -> str:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Column, Table

        if self.interrupted and not self.measurements:
            return "\nStopped before anything was measured."
        title = f"{self.problems} held-out problems (seed {self.seed}), {min(SLOTS, self.problems)} at a time"
        headers = ("accuracy", "tokens\nfrom LLM", "LLM passes\n/ token", "tokens / s")
        table = Table("", *(Column(header, justify="right") for header in headers), title=title, box=SIMPLE)
        table.title_justify = "left"
        for one in self.measurements:
            cells = (f"{one.accuracy:.1%}", f"{one.llm_share:.1%}", f"{one.llm_passes_per_token:.3f}")
            table.add_row(label(one), *cells, f"{one.tokens_per_second:,.0f}")
        console = Console()
        with console.capture() as text:
            console.print(table)
            if not self.interrupted:
                console.print(self.meaning(), markup=False, highlight=False)
        return ("\nStopped.\n" if self.interrupted else "") + text.get().rstrip("\n")

    def meaning(self) -> str:
        slm, llm, pair, untrained, lossless = self.measurements
        solved = [f"{one.accuracy:.0%} with {one.llm_passes_per_token:.2f}" for one in (pair, untrained)]
        return (
            f"The SLM alone solves {slm.accuracy:.0%} of the problems and the LLM alone {llm.accuracy:.0%} with one "
            f"pass for each token; the {label(pair)} solves {solved[0]} LLM passes per token, {label(untrained)} "
            f"without any training {solved[1]}, and the LLM's own text takes {lossless.llm_passes_per_token:.2f}."
        )


def demo(*, visible: bool = True, **options: Any) -> Report:
    """Solve word problems with the shipped pair, some visibly; the options are the fields of `DemoOptions`."""
    wanted = DemoOptions(**options)
    # Models this small gain nothing from a second thread, and lose everything when another program holds that core.
    torch.set_num_threads(1)
    model = CiterForCausalLM.from_pretrained(citer_hf.demo.DEMO_PAIR)
    tokenizer = model.load_tokenizer()
    chosen = list(problems("test", wanted.seed, wanted.problems))
    threshold = model.default_threshold if wanted.router_threshold is None else wanted.router_threshold
    report = Report(wanted.seed, len(chosen), [])
    try:
        if visible:
            slm, llm = model.slm.num_parameters(), model.llm.num_parameters()
            sizes = f"an SLM of {slm:,} parameters and an LLM of {llm:,}."
            print("Two models write word problems' solutions together:", sizes)
            print(f"{legend(sys.stdout)}\n")
            for number, problem in enumerate(chosen[:STREAMED], 1):
                solve_visibly(model, tokenizer, problem, number, threshold)
        for way in progress(ways_to_decode(model, threshold), "measuring", shown=sys.stderr.isatty()):
            # Everything runs once before the clock does.
            measure(way, tokenizer, chosen[:1])
            report.measurements.append(measure(way, tokenizer, chosen))
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def ways_to_decode(model: CiterForCausalLM, threshold: float) -> list[Way]:
    """Return each model alone, the pair at a threshold, a router that needs no training, and the lossless end."""
    return [
        Way("SLM alone", model, alone="slm"),
        Way("LLM alone", model, alone="llm"),
        Way("pair", model, threshold, model.default_veto),
        Way("confidence", with_router(model, ConfidenceRouter(1)), 0.5, 0.3),
        Way("lossless", model, LLM_ALONE),
    ]


def label(one: Way | Measurement) -> str:
    threshold = "" if one.router_threshold is None else f" at {one.router_threshold:.3g}"
    return one.name + threshold + (f", veto {one.llm_veto:g}" if one.llm_veto else "")


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
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "router_threshold": threshold}
    try:
        model.generate(**inputs, **options, past_key_values=cache, streamer=streamer)
    except KeyboardInterrupt:
        paint.end()
        raise
    response = tokenizer.decode(streamer.tokens, skip_special_tokens=True)
    verdict = "right" if is_correct(response, problem) else f"wrong, the answer is {problem.answer}"
    by_llm = int(cache.routing.to_llm.sum())
    paint.dim(f"({verdict}; {by_llm} of {len(streamer.tokens)} tokens from the LLM)\n")


def measure(way: Way, tokenizer: Any, problems: Sequence[Problem]) -> Measurement:
    prompts = [tokenizer(problem.prompt).input_ids for problem in problems]
    began = time.perf_counter()
    outputs = decode(
        way.pair,
        prompts,
        router_threshold=way.router_threshold or 0.0,
        llm_veto=way.llm_veto,
        max_new_tokens=MAX_NEW_TOKENS,
        alone=way.alone,
        batch_tokens=SLOTS * (max(map(len, prompts)) + MAX_NEW_TOKENS),
    )
    seconds = time.perf_counter() - began

    texts = tokenizer.batch_decode([one.tokens for one in outputs], skip_special_tokens=True)
    correct = sum(map(is_correct, texts, problems))
    tokens = sum(len(one.tokens) for one in outputs)
    llm_tokens, passes = sum(sum(one.to_llm) for one in outputs), sum(len(one.passes["llm"]) for one in outputs)
    counts = (len(problems), correct, tokens, llm_tokens, passes, seconds)
    shares = (correct / len(problems), llm_tokens / tokens, passes / tokens, tokens / seconds)
    return Measurement(way.name, way.router_threshold, way.llm_veto, *counts, *shares)
