"""Measure a pair on a GPU: every batch size, with static caches and growing ones, and what of it was aimed at.

    python docs/benchmarks/gpu.py --output gpu.json

Random weights in the shapes of Qwen2.5-0.5B and 14B in bf16, made on the GPU (it takes 32 GB), decisions forced.
Each batch size is one run of `citer bench`. What it has found is in the file before the next one begins; the same
command, after it was interrupted, goes on from there. It ends with the tables for `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from citer_hf.bench.options import BenchOptions, check_device, check_dtype, parse_numbers
from citer_hf.bench.report import print_report
from citer_hf.bench.run import Bench
from random_pair import SHAPES, build

from citer_hf import CiterForCausalLM
from citer_hf.runs import atomic_write, read_json

# What an SLM step, the floor, and the LLM alone are compared with: TokenRouter's gains on the method's own pair.
STEP_OVER_BANDWIDTH, SPEED_OF_FLOOR, SPEEDUPS = 2.0, 0.9, {1: 1.47, 4: 1.21}
CACHES = ("static", "growing")


def measure(model: Any, name: str, rows: int, cache: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """Return one run of `citer bench`.

    Args:
        model: The pair.
        name: What it is called.
        rows: Rows of a batch.
        cache: One of `CACHES`.
        wanted: The command line.
    """
    options = BenchOptions(
        # A share of nothing is the SLM's step, with the router.
        shares=tuple(dict.fromkeys((0.0, *parse_numbers("--shares", wanted.shares)))),
        prompt_length=wanted.prompt_length,
        batch_size=rows,
        max_new_tokens=wanted.max_new_tokens,
        repeats=wanted.repeats,
        warmup=2,
        cache_implementation="static" if cache == "static" else None,
        assisted=False,
    )
    report = Bench(model, options, f"{name}, {cache} caches").run(lambda what: print(f"  {what}", flush=True))
    print_report(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.error is not None:
        raise RuntimeError(report.error)
    return report.as_dict()


def aims(report: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    """Yield what was to be reached, the aim, what was measured, and whether that is enough.

    Args:
        report: One run.
    """
    batch = report["options"]["batch_size"]
    for row in report["rows"]:
        if row["kind"] != "CITER":
            continue
        if row["share"] == 0:
            step = 1 / row["bandwidth_fraction"]
            yield "SLM step over its time at full bandwidth", STEP_OVER_BANDWIDTH, step, step <= STEP_OVER_BANDWIDTH
            continue
        speed = 1 / row["relative_to_floor"]["median"]
        yield f"share {row['share']:g}, speed over the floor's", SPEED_OF_FLOOR, speed, speed >= SPEED_OF_FLOOR
        if batch in SPEEDUPS:
            gain = row["speedup"]["median"]
            yield f"share {row['share']:g}, speed over the LLM's", SPEEDUPS[batch], gain, gain >= SPEEDUPS[batch]


def tables(reports: dict[str, dict[str, Any]]) -> str:
    """Lay out all runs as Markdown: what was measured, and what of it was aimed at.

    Args:
        reports: Runs by their names.
    """
    measured = ["| caches, rows | way | ms / position | tokens / s | × LLM alone | time / floor |", "|" + " --- |" * 6]
    reached = ["| caches, rows | | aim | measured | |", "|" + " --- |" * 5]
    for name, report in reports.items():
        for row in report["rows"]:
            cells = [f"{row[one]['median']:.3g}" for one in ("ms_per_token", "tokens_per_second")]
            cells += [f"{row[one]['median']:.3g}" if row[one] else "" for one in ("speedup", "relative_to_floor")]
            measured.append(f"| {' | '.join([name, row['name'], *cells])} |")
        # The growing caches are there to be compared with.
        for what, aim, found, enough in aims(report) if name.startswith("static") else ():
            reached.append(f"| {name} | {what} | {aim:g} | {found:.3g} | {'reached' if enough else '**missed**'} |")
    return "\n".join([*measured, "", *reached])


def load(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Return the runs that a file holds, or none.

    Args:
        path: The file.
        setting: What the runs must have in common.

    Raises:
        ValueError: when it holds runs of another setting.
    """
    if not path.exists():
        return {}
    content = read_json(path)
    if content["setting"] != setting:
        raise ValueError(
            f"--output: {path} holds runs of {content['setting']}, and {setting} was asked for. Give another file."
        )
    return content["reports"]


def save(path: Path, setting: dict[str, Any], reports: dict[str, Any]) -> None:
    """Write all runs so far.

    Args:
        path: The file.
        setting: What the runs have in common.
        reports: Runs by their names.
    """
    with atomic_write(path) as file:
        file.write(json.dumps({"setting": setting, "reports": reports}, indent=2).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for all runs")
    parser.add_argument("--slm", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--llm", choices=SHAPES, default="qwen2.5-14b")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--shares", default="0.1,0.2,0.35")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args(arguments)
    device, dtype = check_device(wanted.device), getattr(torch, check_dtype(wanted.dtype))
    setting = {key: value for key, value in vars(wanted).items() if key not in ("output", "rows")}
    setting["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    reports = load(wanted.output, setting)
    slm, llm = (build(shape, dtype=dtype, device=device) for shape in (wanted.slm, wanted.llm))
    model = CiterForCausalLM.from_pair(slm, llm, router="confidence").eval()
    for rows in map(int, wanted.rows.split(",")):
        for cache in CACHES:
            name = f"{cache}, {rows}"
            if name not in reports:
                print(name, flush=True)
                reports[name] = measure(model, f"{wanted.slm} + {wanted.llm}", rows, cache, wanted)
                save(wanted.output, setting, reports)
    print(f"{setting['device']}, torch {torch.__version__}\n\n{tables(reports)}")


if __name__ == "__main__":
    main()
