"""Time batches whose rows wait for the LLM against lock-step, and both against `citer bench --simulate`.

    python docs/benchmarks/random_pair.py mini llama-300m DIR
    python docs/benchmarks/batches.py DIR --rows 1,2,4,8,16 --shares 0.2

Both ways of decoding write the same texts by the same decisions: tokens are drawn, so that texts of random weights
do not go round in circles, and the `random` router decides by its hidden state. Repetitions are interleaved; what is
compared is the whole time, prompts of 8 tokens included. Ratios are of one repetition: median (smallest-largest). The
projection gets the bandwidth that `citer bench` measures here, the operations per second of a large matrix product,
the LLM share that came about, and nothing that was fitted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from citer_hf.bench.clock import Clock
from citer_hf.bench.machine import describe_machine
from citer_hf.bench.projections import simulate_command
from citer_hf.bench.results import ratios

from citer_hf import CiterForCausalLM

PROMPT = 8
SIZE = 4096


def operations_per_second(clock: Clock) -> float:
    """Return the operations per second of a large matrix product in fp32, the best of five."""
    few, many = torch.randn(SIZE // 8, SIZE), torch.randn(SIZE, SIZE)
    return 2 * (SIZE // 8) * SIZE**2 / min(clock.seconds(lambda: few @ many) for _ in range(5))


def measure(model: Any, rows: int, share: float, tokens: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of every repetition of every way to decode, and the LLM share.

    Args:
        model: The pair.
        rows: Rows of the batch.
        share: The LLM share to aim at.
        tokens: New tokens per row.
        repeats: Repetitions, after one that warms up.
    """
    prompt = torch.randint(3, model.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    options = {"max_new_tokens": tokens, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
    wanted = {**options, "router_threshold": share, "return_dict_in_generate": True}
    ways: dict[str, Callable[[], Any]] = {
        "LLM alone": lambda: model.llm.generate(prompt, **options),
        "SLM alone": lambda: model.slm.generate(prompt, **options),
        "CITER": lambda: model.generate(prompt, **wanted),
    }
    if rows > 1:
        ways["lock-step"] = lambda: model.generate(prompt, **wanted, waiting_rows=1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    llm_share, clock = 0.0, Clock(model.slm.device)
    for repetition in range(repeats + 1):
        for name, decode in ways.items():
            torch.manual_seed(repetition)
            took = clock.seconds(decode)
            if repetition:
                seconds[name].append(took)
    torch.manual_seed(0)
    llm_share = ways["CITER"]().past_key_values.routing.llm_share
    return seconds, llm_share


def main() -> None:
    """Measure and project what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--shares", default="0.2")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args()
    slm, llm = (str(wanted.directory / name) for name in ("slm", "llm"))
    model = CiterForCausalLM.from_pair(slm, llm, router="random").eval()
    machine = describe_machine(model.slm.device)
    tflops = operations_per_second(Clock(model.slm.device)) / 1e12
    print(
        f"{machine.name}, {machine.threads} threads: {machine.memory_bandwidth / 1e9:.1f} GB/s, {tflops:.3f} TFLOP/s",
        flush=True,
    )
    for rows in map(int, wanted.rows.split(",")):
        for share in map(float, wanted.shares.split(",")):
            seconds, seen = measure(model, rows, share, wanted.max_new_tokens, wanted.repeats)
            projected = simulate_command(
                slm,
                llm,
                bandwidth_gb_s=machine.memory_bandwidth / 1e9,
                tflops=tflops,
                slm_bits=32,
                llm_bits=32,
                kv_bits=32,
                shares=(seen,),
                batch_sizes=(rows,),
                context=PROMPT + wanted.max_new_tokens // 2,
            )
            expected = {
                "LLM alone": projected[0].llm_alone.time_per_token_s,
                "SLM alone": projected[0].slm_alone.time_per_token_s,
                "CITER": projected[-1].time_per_token_s,
                "lock-step": projected[0].time_per_token_s,
            }
            print(f"{rows} rows, LLM share {seen:.2f}")
            for name, taken in seconds.items():
                each = [1000 * one / wanted.max_new_tokens for one in taken]
                print(
                    f"  {name:9} {statistics.median(each):8.3f} ({min(each):.3f}-{max(each):.3f}) ms per position, "
                    f"projected {1000 * expected[name]:.3f}"
                )
            for other in ("lock-step", "LLM alone"):
                if other in seconds:
                    spread = ratios(seconds["CITER"], seconds[other])
                    print(
                        f"  CITER over {other}: {spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})", flush=True
                    )


if __name__ == "__main__":
    main()
