"""Measure a pair on a GPU: every batch size, with static caches and growing ones, beside what was aimed at.

    python docs/benchmarks/gpu.py --output gpu.json

Random weights in the shapes of Qwen2.5-0.5B and 14B in bf16, made on the GPU (32 GB), decisions forced. Each batch
size is one run of `citer bench`. The file has every run before the next one begins; after an interruption the same
command resumes. It ends with the tables for `docs/performance.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from random_pair import SHAPES, build

from citer_hf import CiterForCausalLM
from citer_hf.bench.bench import as_device, bench
from citer_hf.runs import read_json, write_json

# Aims for an SLM step, for the floor, and for the LLM alone: TokenRouter's gains on the method's own pair.
STEP_OVER_BANDWIDTH, SPEED_OF_FLOOR, SPEEDUPS = 2.0, 0.9, {1: 1.47, 4: 1.21}
CACHES = ("static", "growing")


def measure(model: CiterForCausalLM, name: str, rows: int, cache: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """Return one run of `citer bench`."""
    report = bench(
        model,
        f"{name}, {cache} caches",
        # Share 0 is the SLM's step, with the router.
        shares=tuple(dict.fromkeys((0.0, *map(float, wanted.shares.split(","))))),
        prompt_length=wanted.prompt_length,
        batch_size=rows,
        max_new_tokens=wanted.max_new_tokens,
        repeats=wanted.repeats,
        warmup=2,
        cache_implementation="static" if cache == "static" else None,
        assisted=False,
    )
    print(report.table(), flush=True)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.error is not None:
        raise RuntimeError(report.error)
    return report.as_dict()


def aims(report: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    """Yield each aim: its name, its value, the measured value, and whether that is enough."""
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
    """Return all runs as Markdown: the measurements, and the aims."""
    measured = ["| caches, rows | way | ms / position | tokens / s | × LLM alone | time / floor |", "|" + " --- |" * 6]
    reached = ["| caches, rows | | aim | measured | |", "|" + " --- |" * 5]
    for name, report in reports.items():
        for row in report["rows"]:
            values = [row[one] for one in ("ms_per_token", "tokens_per_second", "speedup", "relative_to_floor")]
            cells = [f"{value['median']:.3g}" if value else "" for value in values]
            measured.append(f"| {' | '.join([name, row['name'], *cells])} |")
        # Growing caches are measured for comparison.
        for what, aim, found, enough in aims(report) if name.startswith("static") else ():
            reached.append(f"| {name} | {what} | {aim:g} | {found:.3g} | {'reached' if enough else '**missed**'} |")
    return "\n".join([*measured, "", *reached])


def load(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Return the runs in a file, if there are any, which must have this setting in common."""
    if not path.exists():
        return {}
    content = read_json(path)
    if content["setting"] != setting:
        raise ValueError(
            f"--output: {path} holds runs of {content['setting']}, and {setting} was asked for. Give another file."
        )
    return dict(content["reports"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for all runs")
    parser.add_argument("--slm", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--llm", choices=SHAPES, default="qwen2.5-14b")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", default="1,4,8,16", help="batch sizes")
    parser.add_argument("--shares", default="0.1,0.2,0.35")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args(arguments)
    device, dtype = as_device(wanted.device), getattr(torch, wanted.dtype)
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
                write_json(wanted.output, {"setting": setting, "reports": reports})
    print(f"{setting['device']}, torch {torch.__version__}\n\n{tables(reports)}")


if __name__ == "__main__":
    main()
