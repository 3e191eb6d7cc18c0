"""Measure what a long text costs: time per token at two lengths, and the peak of memory of a long prompt.

    python docs/benchmarks/random_pair.py tiny mini DIR --vocabulary 2000
    python docs/benchmarks/long_text.py time DIR
    python docs/benchmarks/long_text.py memory DIR

`time`: one row, a forced LLM share of 0.2, 256 tokens around a text of 400 and of 4 000 tokens. Attention has to grow
with the text, and nothing else should. So every call of transformers' attention function is timed in the same run and
taken off the time between two tokens. Shown is the mean of the medians of tokens with and without the LLM, at their
shares: medians leave out the rare token at which room for keys and values is made. A third line is the control: 400
tokens, where attention also reads, on the same clock, as many bytes as keys and values have at 4 000. What it adds to
the rest is what the CPU's caches lose to attention, and no work of ours.

`memory`: an 8k prompt and 8 tokens at an LLM share of 1, each in a process of its own: the SLM, the LLM, the pair.
What counts is the highest resident memory after loading, minus that right after loading: keys, values, activations.
One model after the other needs the larger of the SLM's growth and of the LLM's beside the SLM's keys and values. Linux
alone can forget the peak of loading, so that is where this runs.
"""

from __future__ import annotations

import argparse
import json
import re
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
from citer_hf.bench.forced import ForcedRouter, decides_by
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from citer_hf import CiterForCausalLM
from citer_hf.bench.contenders import greedy_without_end
from citer_hf.model.compat import cache_of

SHARE, NEW_TOKENS, LENGTHS = 0.2, 256, (400, 4000)
LONG_PROMPT, LAST_TOKENS = 8184, 8
ROUNDS = 5


def load_pair(directory: Path) -> Any:
    """Load the pair that `random_pair.py` wrote.

    Args:
        directory: Where to.
    """
    return CiterForCausalLM.from_pair(str(directory / "slm"), str(directory / "llm"), router="confidence").eval()


def random_prompt(length: int, vocabulary: int) -> torch.Tensor:
    """Return token ids, `[1, length]`."""
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


# ---- time ----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Times attention, and what lies between two decisions of the router.

    Args:
        extra_tokens: Tokens whose worth of keys and values attention reads beside its own.

    Attributes:
        attention: Seconds spent in attention so far.
        marks: Time, and `attention`, at each decision.
    """

    def __init__(self, extra_tokens: int):
        self.extra_tokens, self.attention = extra_tokens, 0.0
        self.marks: list[tuple[float, float]] = []
        self._extra: dict[Any, torch.Tensor] = {}

    def mark(self) -> None:
        """Note that the router decides now."""
        self.marks.append((time.perf_counter(), self.attention))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time what runs inside."""
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def timed(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            output = plain(module, query, key, *args, **kwargs)
            if self.extra_tokens:
                if module not in self._extra:
                    self._extra[module] = torch.ones(2 * self.extra_tokens * key.shape[1] * key.shape[3])
                self._extra[module].sum()
            self.attention += time.perf_counter() - began
            return output

        ALL_ATTENTION_FUNCTIONS["sdpa"] = timed
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = plain

    def per_token(self, by_llm: list[bool]) -> tuple[float, float]:
        """Return seconds of a token in all and in attention.

        Args:
            by_llm: Whether the LLM wrote the token of each mark.
        """
        steps = [(after - before, watched - earlier) for (before, earlier), (after, watched) in pairwise(self.marks)]
        seconds = [0.0, 0.0]
        for kind in (False, True):
            of_kind = [step for step, llm in zip(steps, by_llm, strict=False) if llm == kind]
            for index in range(2):
                median = statistics.median(step[index] for step in of_kind[1:])
                seconds[index] += median * len(of_kind) / len(steps)
        return seconds[0], seconds[1]


def measure_time(directory: Path) -> None:
    """Print the time of a token at each length, with and without attention.

    Args:
        directory: The pair's.
    """
    model = load_pair(directory)
    by_llm = (torch.rand(NEW_TOKENS, generator=torch.Generator().manual_seed(1)) < SHARE).tolist()
    # The LLM reads the prompt at once.
    by_llm[0] = True
    short, long = LENGTHS
    found: dict[str, list[tuple[float, float]]] = {}
    cases = {f"{short}": (short, 0), f"{long}": (long, 0), f"{short}, control": (short, long - short)}
    router = ForcedRouter(torch.zeros(1))
    with greedy_without_end(model), decides_by(model, router):
        for _ in range(ROUNDS + 1):
            for name, (length, extra) in cases.items():
                watch = Stopwatch(extra)

                def decide(hidden: torch.Tensor, logits: torch.Tensor, watch: Stopwatch = watch) -> torch.Tensor:
                    watch.mark()
                    return torch.tensor([[0.0 if by_llm[len(watch.marks) - 1] else 1.0]])

                router.forward = decide
                # The text has this length when half of the tokens are written.
                prompt = random_prompt(length - NEW_TOKENS // 2, model.vocab_size)
                with watch.watching():
                    model.generate(prompt, max_new_tokens=NEW_TOKENS, router_threshold=0.5)
                found.setdefault(name, []).append(watch.per_token(by_llm))
    for name, rounds in found.items():
        # The first round warms up.
        whole, attention = (1000 * statistics.median(one) for one in zip(*rounds[1:], strict=True))
        rest = [1000 * (total - part) for total, part in rounds[1:]]
        print(
            f"{name:12} tokens: {whole:.3f} ms per token, attention {attention:.3f}, the rest "
            f"{statistics.median(rest):.3f} ({min(rest):.3f}-{max(rest):.3f})"
        )


# ---- memory --------------------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """Return `VmRSS`, or its highest value `VmHWM`, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))  # type: ignore[union-attr]


def measure_growth(who: str, directory: Path) -> None:
    """Print the growth of memory of one contender, and the size of its keys and values, as JSON.

    Args:
        who: `slm`, `llm` or `pair`.
        directory: The pair's.
    """
    if who == "pair":
        model = load_pair(directory)
        vocabulary, options = model.vocab_size, {"router_threshold": 2.0}
    else:
        model = AutoModelForCausalLM.from_pretrained(directory / who).eval()
        vocabulary, options = model.config.vocab_size, {}
    short = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    model.generate(random_prompt(8, vocabulary), max_new_tokens=2, **short)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    output = model.generate(random_prompt(LONG_PROMPT, vocabulary), max_new_tokens=LAST_TOKENS, **short)
    cache = cache_of(output)
    caches = (cache.slm, cache.llm) if who == "pair" else (cache,)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for one in caches for layer in one.layers)
    print(json.dumps({"growth": resident("VmHWM") - before, "keys and values": kept}))


def measure_memory(directory: Path) -> None:
    """Print the growth of memory of each model, of the pair, and of one model after the other.

    Args:
        directory: The pair's.
    """
    found = {}
    for who in ("slm", "llm", "pair"):
        command = [sys.executable, __file__, who, str(directory)]
        found[who] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        growth, kept = (found[who][key] / 1e6 for key in ("growth", "keys and values"))
        print(f"{who:5} grows by {growth:,.0f} MB, of which keys and values {kept:,.0f}", flush=True)
    slm, llm = found["slm"], found["llm"]
    print(f"the SLM's and the LLM's growth added: {(slm['growth'] + llm['growth']) / 1e6:,.0f} MB")
    after = max(slm["growth"], slm["keys and values"] + llm["growth"])
    print(f"one after the other, the SLM's keys and values kept: {after / 1e6:,.0f} MB")


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory", "slm", "llm", "pair"])
    parser.add_argument("directory", type=Path)
    wanted = parser.parse_args()
    if wanted.what in ("time", "memory"):
        {"time": measure_time, "memory": measure_memory}[wanted.what](wanted.directory)
    else:
        measure_growth(wanted.what, wanted.directory)


if __name__ == "__main__":
    main()
