"""Time batches whose sequences wait for the LLM against lock-step.

    python docs/benchmarks/random_pair.py mini llama-300m DIR
    python docs/benchmarks/batches.py DIR --rows 1,2,4,8,16 --shares 0.2

Both ways of decoding give the same outputs by the same decisions: tokens are sampled, so that random weights do not
repeat themselves, and the `random` router decides by its hidden state. Repetitions are interleaved. The whole call is
timed, prompts of 8 tokens included. Ratios are of one repetition: median (smallest-largest).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from citer_hf import CiterForCausalLM
from citer_hf.bench.bench import describe_machine, ratios
from citer_hf.bench.cost_curve import seconds

PROMPT = 8


def measure(model: Any, rows: int, share: float, tokens: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of every repetition of every way to decode, and the LLM share."""
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
    times: dict[str, list[float]] = {name: [] for name in ways}
    # The first repetition warms up.
    for repetition in range(repeats + 1):
        for name, decode in ways.items():
            torch.manual_seed(repetition)
            times[name].append(seconds(model.slm.device, decode))
    torch.manual_seed(0)
    llm_share = ways["CITER"]().past_key_values.routing.llm_share
    return {name: taken[1:] for name, taken in times.items()}, llm_share


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", default="1,2,4,8,16", help="batch sizes")
    parser.add_argument("--shares", default="0.2")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args()
    slm, llm = (str(wanted.directory / name) for name in ("slm", "llm"))
    model = CiterForCausalLM.from_pair(slm, llm, router="random").eval()
    machine = describe_machine(model.slm.device)
    print(f"{machine['name']}, {machine['threads']} threads, {machine['memory_bandwidth'] / 1e9:.1f} GB/s", flush=True)
    for rows in map(int, wanted.rows.split(",")):
        for share in map(float, wanted.shares.split(",")):
            times, llm_share = measure(model, rows, share, wanted.max_new_tokens, wanted.repeats)
            print(f"{rows} sequences, LLM share {llm_share:.2f}")
            for name, taken in times.items():
                each = [1000 * one / wanted.max_new_tokens for one in taken]
                spread = f"{statistics.median(each):8.3f} ({min(each):.3f}-{max(each):.3f})"
                print(f"  {name:9} {spread} ms per position")
            for other in ("lock-step", "LLM alone"):
                ratio = ratios(times["CITER"], times.get(other, []))
                if ratio is not None:
                    print(f"  CITER over {other}: {ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})")


if __name__ == "__main__":
    main()
