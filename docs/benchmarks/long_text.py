"""Measure the costs of a long text: time per token at two lengths, and the peak of memory of a long prompt.

    python docs/benchmarks/random_pair.py tiny mini DIR --vocabulary 2000
    python docs/benchmarks/long_text.py time DIR
    python docs/benchmarks/long_text.py memory DIR

`time`: one sequence, a forced LLM share of 0.2, 256 tokens around a text of 400 and of 4 000 tokens. Attention grows
with the text, and nothing else should. Every call of transformers' attention function is timed in the same run and
subtracted from the time between two tokens. The output is the mean of the medians of tokens with and without the LLM,
at their shares: medians leave out the rare token at which memory for keys and values is allocated. The third line is
the control: 400 tokens, where attention also reads as many bytes as keys and values have at 4 000. The difference in
the rest is the effect of attention on the CPU's caches.

`memory`: a prompt of 8 184 tokens and 8 new ones at an LLM share of 1, for the SLM, the LLM and the pair, each in its
own process: the highest resident memory after loading, minus that right after loading. One model after the other needs
the larger of the SLM's growth and of the LLM's beside the SLM's keys and values. This runs on Linux alone, which can
forget the peak of loading.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from citer_hf import CiterForCausalLM
from citer_hf.bench.contenders import greedy_without_end
from citer_hf.model.compat import cache_of

SHARE, NEW_TOKENS, LENGTHS = 0.2, 256, (400, 4000)
LONG_PROMPT, LAST_TOKENS = 8184, 8
ROUNDS = 5


def load_pair(directory: Path) -> Any:
    """Load the pair that `random_pair.py` wrote."""
    return CiterForCausalLM.from_pair(str(directory / "slm"), str(directory / "llm"), router="confidence").eval()


def random_prompt(length: int, vocabulary: int) -> torch.Tensor:
    """Return token ids `[1, length]`."""
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


class TimingRouter(nn.Module):
    """A router with known decisions, which notes the time of each, and the seconds spent in attention until then."""

    def __init__(self, to_llm: list[bool], extra_tokens: int):
        super().__init__()
        self.to_llm, self.extra_tokens, self.attention = to_llm, extra_tokens, 0.0
        self.marks: list[tuple[float, float]] = []

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the next score, 0 or 1."""
        self.marks.append((time.perf_counter(), self.attention))
        return torch.tensor([[float(not self.to_llm[len(self.marks) - 1])]])

    @contextmanager
    def timing_attention(self) -> Iterator[None]:
        """Time every call of transformers' attention function, which also reads as much as extra tokens have."""
        plain, extra = ALL_ATTENTION_FUNCTIONS["sdpa"], dict[Any, torch.Tensor]()

        def timed(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            output = plain(module, query, key, *args, **kwargs)
            if self.extra_tokens:
                if module not in extra:
                    extra[module] = torch.ones(2 * self.extra_tokens * key.shape[1] * key.shape[3])
                extra[module].sum()
            self.attention += time.perf_counter() - began
            return output

        ALL_ATTENTION_FUNCTIONS["sdpa"] = timed
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = plain

    def per_token(self) -> tuple[float, float]:
        """Return the seconds of a token, and those in attention."""
        steps = [(after - before, end - start) for (before, start), (after, end) in pairwise(self.marks)]
        whole = attention = 0.0
        for kind in (False, True):
            of_kind = [step for step, by_llm in zip(steps, self.to_llm, strict=False) if by_llm == kind]
            weight = len(of_kind) / len(steps)
            whole += weight * statistics.median(step[0] for step in of_kind[1:])
            attention += weight * statistics.median(step[1] for step in of_kind[1:])
        return whole, attention


def measure_time(directory: Path) -> None:
    """Print the time of a token at each length, with and without attention."""
    model = load_pair(directory)
    # The LLM runs over the prompt at the first token.
    to_llm = [True, *(torch.rand(NEW_TOKENS - 1, generator=torch.Generator().manual_seed(1)) < SHARE).tolist()]
    short, long = LENGTHS
    cases = {f"{short}": (short, 0), f"{long}": (long, 0), f"{short}, control": (short, long - short)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with greedy_without_end(model):
        for _ in range(ROUNDS + 1):
            for name, (length, extra_tokens) in cases.items():
                model.router = router = TimingRouter(to_llm, extra_tokens)
                # The text has this length when half of the tokens are there.
                prompt = random_prompt(length - NEW_TOKENS // 2, model.config.vocab_size)
                with router.timing_attention():
                    model.generate(prompt, max_new_tokens=NEW_TOKENS, router_threshold=0.5)
                found[name].append(router.per_token())
    for name, rounds in found.items():
        # The first round warms up.
        whole, attention = (1000 * statistics.median(one) for one in zip(*rounds[1:], strict=True))
        rest = [1000 * (total - part) for total, part in rounds[1:]]
        print(
            f"{name:12} tokens: {whole:.3f} ms per token, attention {attention:.3f}, the rest "
            f"{statistics.median(rest):.3f} ({min(rest):.3f}-{max(rest):.3f})"
        )


def resident(name: str) -> int:
    """Return `VmRSS`, or its highest value `VmHWM`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure_growth(who: str, directory: Path) -> None:
    """Print the growth of memory of `slm`, `llm` or `pair`, and the size of its keys and values, as JSON."""
    model = load_pair(directory) if who == "pair" else AutoModelForCausalLM.from_pretrained(directory / who).eval()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"router_threshold": 2.0} if who == "pair" else {}
    model.generate(random_prompt(8, model.config.vocab_size), max_new_tokens=2, **options)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    prompt = random_prompt(LONG_PROMPT, model.config.vocab_size)
    output = model.generate(prompt, max_new_tokens=LAST_TOKENS, return_dict_in_generate=True, **options)
    growth, cache = resident("VmHWM") - before, cache_of(output)
    caches = (cache.slm, cache.llm) if who == "pair" else (cache,)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for one in caches for layer in one.layers)
    print(json.dumps({"growth": growth, "kept": kept}))


def measure_memory(directory: Path) -> None:
    """Print the growth of memory of each model, of the pair, and of one model after the other."""
    found = {}
    for who in ("slm", "llm", "pair"):
        command = [sys.executable, __file__, who, str(directory)]
        found[who] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        growth, kept = (found[who][key] / 1e6 for key in ("growth", "kept"))
        print(f"{who:5} grows by {growth:,.0f} MB, of which keys and values {kept:,.0f}", flush=True)
    slm, llm = found["slm"], found["llm"]
    print(f"the SLM's and the LLM's growth added: {(slm['growth'] + llm['growth']) / 1e6:,.0f} MB")
    after = max(slm["growth"], slm["kept"] + llm["growth"])
    print(f"one after the other, the SLM's keys and values kept: {after / 1e6:,.0f} MB")


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory", "slm", "llm", "pair"])
    parser.add_argument("directory", type=Path)
    wanted = parser.parse_args()
    if wanted.what == "time":
        measure_time(wanted.directory)
    elif wanted.what == "memory":
        measure_memory(wanted.directory)
    else:
        measure_growth(wanted.what, wanted.directory)


if __name__ == "__main__":
    main()
