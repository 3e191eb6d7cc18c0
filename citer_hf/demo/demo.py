"""`citer demo`: the shipped pair solves word problems, some of them visibly, and all of them against the clock."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import citer_hf.demo

from .. import terminal
from ..evaluation.decode import decode, with_router
from ..model.cache import CiterCache
from ..model.modeling import CiterForCausalLM
from ..model.routers import LLM_ALONE, ConfidenceRouter
from ..runs import CommandOptions, atomic_write, option, progress
from .problems import Problem, is_correct, problems

SLOTS = 100
STREAMED = 3
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class DemoOptions(CommandOptions):
    seed: int = option(0, "Another seed gives other problems.")
    problems: int = option(200, "How many problems to measure on.", metavar="N", min=1)
    split: str = option("test", "Which problems: train, validation or test.", metavar="NAME")
    router_threshold: float | None = option(None, "The SLM's token stands when its score reaches this.", metavar="X")


# A way to decode: its name, a pair, and the keywords of `decode`.
Way = tuple[str, CiterForCausalLM, dict[str, Any]]


def demo(*, visible: bool = True, **options: Any) -> dict[str, Any]:
    """Solve word problems with the shipped pair, some visibly, and return the measurements of each way to decode.

    The options are the fields of `DemoOptions`. Ctrl-C keeps the complete measurements.
    """
    wanted = DemoOptions(**options)
    # Models this small gain nothing from a second thread, and lose everything when another program holds that core.
    torch.set_num_threads(1)
    model = CiterForCausalLM.from_pretrained(citer_hf.demo.DEMO_PAIR)
    tokenizer = model.load_tokenizer()
    chosen = list(problems(wanted.split, wanted.seed, wanted.problems))
    threshold = model.default_threshold if wanted.router_threshold is None else wanted.router_threshold
    rows: list[dict[str, Any]] = []
    report = {"seed": wanted.seed, "problems": len(chosen), "slots": SLOTS, "complete": False, "rows": rows}
    try:
        if visible:
            print(f"Two models solve word problems together. {terminal.legend(sys.stdout)}\n")
            for number, problem in enumerate(chosen[:STREAMED], 1):
                solve_visibly(model, tokenizer, problem, number, threshold)
        for way in progress(ways_to_decode(model, threshold), "measuring", shown=sys.stderr.isatty()):
            # Everything runs once before the clock does.
            measure(way, tokenizer, chosen[:1])
            rows.append(measure(way, tokenizer, chosen))
    except KeyboardInterrupt:
        return report
    return report | {"complete": True}


def ways_to_decode(model: CiterForCausalLM, threshold: float) -> list[Way]:
    """Return each model alone, the pair at a threshold, a router that needs no training, and the lossless end."""
    confidence = with_router(model, ConfidenceRouter(1))
    return [
        ("SLM alone", model, {"alone": "slm"}),
        ("LLM alone", model, {"alone": "llm"}),
        ("pair", model, {"router_threshold": threshold, "llm_veto": model.default_veto}),
        ("confidence", confidence, {"router_threshold": 0.5, "llm_veto": 0.3}),
        ("lossless", model, {"router_threshold": LLM_ALONE}),
    ]


def table(report: dict[str, Any]) -> str:
    """Return a report for a terminal."""
    cells = [
        {
            "": label(one),
            "accuracy": f"{one['accuracy']:.1%}",
            "tokens from LLM": f"{one['llm_share']:.1%}",
            "LLM passes / token": f"{one['llm_passes_per_token']:.3f}",
            "tokens / s": f"{one['tokens_per_second']:,.0f}",
        }
        for one in report["rows"]
    ]
    count, slots = report["problems"], min(report["slots"], report["problems"])
    return (
        ("" if report["complete"] else "\nStopped.\n")
        + f"\n{count} held-out problems (seed {report['seed']}), {slots} at a time\n\n"
        + (terminal.table(cells) if cells else "Nothing was measured.")
        + "\n\n`confidence` needs no training; `lossless` is the LLM's own text."
    )


def label(one: dict[str, Any]) -> str:
    threshold = "" if one["router_threshold"] is None else f" at {one['router_threshold']:.3g}"
    return one["name"] + threshold + (f", veto {one['llm_veto']:g}" if one["llm_veto"] else "")


def export(path: str | Path, **options: Any) -> None:
    """Write problems as JSON lines with `prompt`, `response` and `answer`, to a file that does not exist yet."""
    path, wanted = Path(path), DemoOptions(**options)
    if path.exists() or not path.parent.is_dir():
        raise FileExistsError(f"expected a new file in a directory that exists, got {path}.")
    lines = [json.dumps(asdict(one)) + "\n" for one in problems(wanted.split, wanted.seed, wanted.problems)]
    with atomic_write(path) as file:
        file.write("".join(lines).encode())


def solve_visibly(model: CiterForCausalLM, tokenizer: Any, problem: Problem, number: int, threshold: float) -> None:
    paint = terminal.Paint(sys.stdout)
    paint.dim(f"Problem {number}. {problem.prompt.strip()}")
    cache = CiterCache(model.config)
    streamer = terminal.WriterStreamer(tokenizer, cache, paint)
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


def measure(way: Way, tokenizer: Any, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the cost and the accuracy of a way to decode; tokens and passes are those of each sequence by itself."""
    name, pair, dials = way
    prompts = [tokenizer(problem.prompt).input_ids for problem in problems]
    slots = SLOTS * (max(map(len, prompts)) + MAX_NEW_TOKENS)
    began = time.perf_counter()
    outputs = decode(pair, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_tokens=slots, **dials)
    seconds = time.perf_counter() - began
    texts = tokenizer.batch_decode([one.tokens for one in outputs], skip_special_tokens=True)
    correct = sum(map(is_correct, texts, problems))
    tokens = sum(len(one.tokens) for one in outputs)
    llm_tokens, passes = sum(sum(one.to_llm) for one in outputs), sum(len(one.passes["llm"]) for one in outputs)
    return {
        "name": name,
        "router_threshold": dials.get("router_threshold"),
        "llm_veto": dials.get("llm_veto", 0.0),
        "problems": len(problems),
        "correct": correct,
        "tokens": tokens,
        "llm_tokens": llm_tokens,
        "llm_passes": passes,
        "seconds": seconds,
        "accuracy": correct / len(problems),
        "llm_share": llm_tokens / tokens,
        "llm_passes_per_token": passes / tokens,
        "tokens_per_second": tokens / seconds,
    }
