"""Measure the peak of memory of a long prompt: of the SLM, of the LLM and of the pair, each in its own process.

    python docs/benchmarks/random_pair.py mini llama-300m DIR
    python docs/benchmarks/memory.py DIR

A prompt of 8 184 tokens and 8 new ones, all decided by the LLM. The growth is the highest resident memory after
loading, minus that right after loading. This runs on Linux alone, which can forget the peak of loading.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from citer_hf import CiterForCausalLM
from citer_hf.model.compat import cache_of

PROMPT, NEW_TOKENS = 8184, 8


def resident(name: str) -> int:
    """Return `VmRSS`, or its highest value `VmHWM`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(who: str, directory: Path) -> None:
    """Print the growth of memory of `slm`, `llm` or `pair`, and the size of its keys and values, as JSON."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if who == "pair":
        slm, llm = str(directory / "slm"), str(directory / "llm")
        model: Any = CiterForCausalLM.from_pair(slm, llm, router="confidence").eval()
        options["router_threshold"] = 2.0
    else:
        model = AutoModelForCausalLM.from_pretrained(directory / who).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    model.generate(ids[:, :8], max_new_tokens=2, **options)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    output = model.generate(ids, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, **options)
    growth, cache = resident("VmHWM") - before, cache_of(output)
    caches = (cache.slm, cache.llm) if who == "pair" else (cache,)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for one in caches for layer in one.layers)
    print(json.dumps({"growth": growth, "kept": kept}))


def main() -> None:
    """Measure each model and the pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--who", choices=("slm", "llm", "pair"), help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.who is not None:
        measure(wanted.who, wanted.directory)
        return
    found = {}
    for who in ("slm", "llm", "pair"):
        command = [sys.executable, __file__, str(wanted.directory), "--who", who]
        found[who] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        growth, kept = (found[who][key] / 1e6 for key in ("growth", "kept"))
        print(f"{who:5} grows by {growth:,.0f} MB, of which keys and values {kept:,.0f}", flush=True)
    print(f"both models, added: {(found['slm']['growth'] + found['llm']['growth']) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
