"""Measure a pair on a GPU with static caches, beside what is aimed at.

    python docs/benchmarks/gpu.py --output gpu.json

Random weights in the shapes of Qwen2.5-0.5B and 14B in bf16, made on the GPU (32 GB). Both models choose the same
token at a share of the places (`random_pair.py`), so that drafts hold as with real text. The shares of flagged tokens
are forced. Each batch size is one run of `citer bench`, in the file before the next one begins: after an interruption
the same command resumes. It ends with the tables for `docs/performance.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from random_pair import SHAPES, build

from citer_hf import CiterForCausalLM
from citer_hf.bench.bench import bench, table
from citer_hf.bench.contenders import ASSISTED, CITER, LOSSLESS
from citer_hf.runs import read_json, write_json

# Of an SLM step over its time at full bandwidth, and of the speed over the LLM's by batch size (TokenRouter's gains).
STEP_OVER_BANDWIDTH, SPEEDUPS = 2.0, {1: 1.47, 4: 1.21}


def measure(model: CiterForCausalLM, size: int, wanted: argparse.Namespace) -> dict[str, Any]:
    """Return one run of `citer bench`."""
    report = bench(
        model,
        f"{wanted.slm} + {wanted.llm}",
        # Share 0 is the SLM's step, with a router.
        shares=tuple(dict.fromkeys((0.0, *map(float, wanted.shares.split(","))))),
        prompt_length=wanted.prompt_length,
        batch_size=size,
        max_new_tokens=wanted.max_new_tokens,
        repeats=wanted.repeats,
        warmup=2,
        cache_implementation="static",
    )
    print(table(report), flush=True)
    if report["interrupted"]:
        raise KeyboardInterrupt
    if report["error"] is not None:
        raise RuntimeError(report["error"])
    return report


def aims(report: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each aim, what is aimed at, and the measured value: all in times as fast as something."""
    batch = report["options"]["batch_size"]
    rows = {row["name"]: row for row in report["rows"]}
    for row in rows.values():
        if row["kind"] == CITER and row["share"] == 0:
            yield "SLM step, of the speed at full bandwidth", 1 / STEP_OVER_BANDWIDTH, row["bandwidth_fraction"]
        elif row["kind"] == CITER and batch in SPEEDUPS:
            yield f"share {row['share']:g}, over the LLM", SPEEDUPS[batch], row["speedup"]["median"]
    if ASSISTED in rows:
        speeds = [rows[name]["tokens_per_second"]["median"] for name in (LOSSLESS, ASSISTED)]
        yield "lossless, over assisted generation", 1.0, speeds[0] / speeds[1]


def tables(reports: dict[str, dict[str, Any]]) -> str:
    """Return all runs as Markdown: the measurements, and the aims."""
    columns = ("ms_per_token", "tokens_per_second", "speedup", "relative_to_floor")
    measured = ["| sequences | way | ms / position | tokens / s | × LLM alone | time / floor |", "|" + " --- |" * 6]
    reached = ["| sequences | | aim | measured | |", "|" + " --- |" * 5]
    for size, report in reports.items():
        for row in report["rows"]:
            cells = [f"{row[name]['median']:.3g}" if row[name] else "" for name in columns]
            measured.append(f"| {' | '.join([size, row['name'], *cells])} |")
        for what, aim, found in aims(report):
            reached.append(
                f"| {size} | {what} | {aim:g} | {found:.3g} | {'reached' if found >= aim else '**missed**'} |"
            )
    return "\n".join([*measured, "", *reached])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for all runs")
    parser.add_argument("--slm", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--llm", choices=SHAPES, default="qwen2.5-14b")
    parser.add_argument("--agreement", type=float, default=0.9, help="share of tokens that both models choose alike")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("--device", default="cpu" if accelerator is None else f"{accelerator.type}:0")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch-sizes", default="1,4,8,16")
    parser.add_argument("--shares", default="0.1,0.2,0.35")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args(arguments)
    device, dtype = wanted.device, getattr(torch, wanted.dtype)
    setting = {key: value for key, value in vars(wanted).items() if key not in ("output", "batch_sizes")}
    setting["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    before = read_json(wanted.output) if wanted.output.exists() else {"setting": setting, "reports": {}}
    if before["setting"] != setting:
        raise ValueError(f"--output: {wanted.output} holds runs of {before['setting']}. Give another file.")
    slm, llm = (
        build(shape, agreement=agreement, dtype=dtype, device=device)
        for shape, agreement in ((wanted.slm, 1.0), (wanted.llm, wanted.agreement))
    )
    model, reports = CiterForCausalLM.from_pair(slm, llm, router="confidence").eval(), before["reports"]
    for size in wanted.batch_sizes.split(","):
        if size not in reports:
            reports[size] = measure(model, int(size), wanted)
            write_json(wanted.output, {"setting": setting, "reports": reports})
    print(f"{setting['device']}, torch {torch.__version__}\n\n{tables(reports)}")


if __name__ == "__main__":
    main()
