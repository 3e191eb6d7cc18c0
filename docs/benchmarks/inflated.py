"""Time real text of the shipped pair with an LLM that costs what an LLM costs beside its SLM.

    OMP_NUM_THREADS=1 python docs/benchmarks/inflated.py
    OMP_NUM_THREADS=1 python docs/benchmarks/inflated.py --batch-size 8
    OMP_NUM_THREADS=1 python docs/benchmarks/inflated.py --slots 16

28 decoder layers whose output projections are zero stand on top of the shipped LLM. They leave every logit as it is
and cost what layers cost: an SLM step takes a tenth to a fifteenth of an LLM step, with real text and real agreement.

All ways to decode take turns at every batch. Times are per token, since lossy ways write other texts. The table has
the median of the repetitions (smallest-largest), and beside it the ratio of the fastest times of every batch, which
other work on the machine disturbs least; *in passes* is the share of the time that the forward passes of both models
take, which no way to decode can do without. With `--slots`, sequences of mixed length stream through slots of the
engine, and are compared with batches of as many sequences, sorted by the length of their prompts.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from citer_hf import DEMO_PAIR, CiterForCausalLM
from citer_hf.demo.problems import Problem, is_correct, problems
from citer_hf.model.engine import Engine
from citer_hf.model.sampling import Stops
from citer_hf.model.sequence import Sequence

NEW_TOKENS = 160
# Router (a kind, or the shipped one), threshold, veto.
SETTINGS = {
    "lossless": ("confidence", 2.0, 0.0),
    "confidence 0.5, veto 0.3": ("confidence", 0.5, 0.3),
    "citer-plus 0.985": ("shipped", 0.985, 0.0),
    "citer-plus 0.867": ("shipped", 0.867, 0.0),
    "citer-plus 0.6, veto 0.3": ("shipped", 0.6, 0.3),
}


def inflate(llm: Any, layers: int) -> Any:
    """Return a copy of a model with more layers, which leave every logit as it is."""
    config, own = copy.deepcopy(llm.config), llm.config.num_hidden_layers
    config.num_hidden_layers = own + layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index % own] for index in range(own + layers)]
    model = type(llm)._from_config(config, dtype=llm.dtype).eval()
    model.load_state_dict(llm.state_dict(), strict=False)
    model.generation_config = copy.deepcopy(llm.generation_config)
    for layer in model.model.layers[own:]:
        for weight in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
            torch.nn.init.zeros_(weight)
    return model


@dataclass
class Way:
    """A way to decode a batch of problems, and what it took: seconds of every batch in every repetition."""

    name: str
    decode: Callable[[list[Problem]], list[list[int]]]
    seconds: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    right: int = 0
    passes: dict[str, int] = field(default_factory=lambda: {"slm": 0, "llm": 0})
    inside: float = 0.0  # seconds in forward passes


class Bench:
    """The two models, and ways to decode with them."""

    def __init__(self, layers: int):
        shipped = CiterForCausalLM.from_pretrained(DEMO_PAIR)
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_PAIR, padding_side="left")
        self.slm, self.llm, self.router = shipped.slm, inflate(shipped.llm, layers), shipped.router
        self.last_token = self.llm.generation_config.eos_token_id
        self.passes, self.inside = {"slm": 0, "llm": 0}, 0.0
        for role in self.passes:
            getattr(self, role).register_forward_pre_hook(partial(self._begin, role))
            getattr(self, role).register_forward_hook(self._end)

    def _begin(self, role: str, *_: Any) -> None:
        self.passes[role] += 1
        self.inside -= time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.inside += time.perf_counter()

    def pair(self, router: str) -> Any:
        """Return a pair with measured times and acceptances of its own."""
        chosen: Any = self.router if router == "shipped" else router
        return CiterForCausalLM.from_pair(self.slm, self.llm, router=chosen).eval()

    def generate(self, model: Any, size: int, some: list[Problem], **options: Any) -> list[list[int]]:
        """Decode problems with `generate` of a pair or a model, in batches sorted by the length of their prompts."""
        order = sorted(range(len(some)), key=lambda index: len(self.tokenizer(some[index].prompt).input_ids))
        found: dict[int, list[int]] = {}
        for start in range(0, len(some), size):
            part = order[start : start + size]
            prompts = [some[index].prompt for index in part]
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
            new = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
            rows = new[:, inputs.input_ids.shape[1] :].tolist()
            found |= {
                index: row[: row.index(self.last_token) + 1] if self.last_token in row else row
                for index, row in zip(part, rows, strict=True)
            }
        return [found[index] for index in range(len(some))]

    def stream(self, model: Any, slots: int, threshold: float, veto: float, some: list[Problem]) -> list[list[int]]:
        """Decode problems as a stream through slots of the engine."""
        engine, sequences = Engine(model, slots, pace=model.pace), []
        for prompt in (self.tokenizer(one.prompt).input_ids for one in some):
            stops = Stops(len(prompt) + NEW_TOKENS, {self.last_token})
            sequences.append(Sequence(prompt, stops, threshold=threshold, veto=veto))
            engine.submit(sequences[-1])
        engine.run()
        return [one.generated for one in sequences]

    def ways(self, size: int, settings: list[str], slots: bool) -> list[Way]:
        """Return all ways to decode; the first is what the others are compared with."""
        alone = partial(self.generate, self.llm, size)
        found = [Way("LLM alone", alone)]
        if size == 1:
            found.append(Way("assisted", partial(alone, assistant_model=self.slm)))
            if hasattr(self.llm.generation_config, "assistant_ensemble_weight"):
                lossy = partial(alone, assistant_model=self.slm, assistant_ensemble_weight=0.5)
                found.append(Way("assisted, ensemble 0.5", lossy))
        for name in settings:
            router, threshold, veto = SETTINGS[name]
            ours = partial(self.generate, self.pair(router), size, router_threshold=threshold, llm_veto=veto)
            found.append(Way(name, ours))
            if slots:
                found.append(Way(f"{name}, stream", partial(self.stream, self.pair(router), size, threshold, veto)))
        return found

    def measure(self, ways: list[Way], batches: list[list[Problem]], repeats: int) -> None:
        """Decode every batch with all ways in turn; the first repetition warms up."""
        for repetition in range(-1, repeats):
            taken: list[list[float]] = [[] for _ in ways]
            for batch in batches:
                for way, seconds in zip(ways, taken, strict=True):
                    self.passes, self.inside = {"slm": 0, "llm": 0}, 0.0
                    began = time.perf_counter()
                    outputs = way.decode(batch)
                    seconds.append(time.perf_counter() - began)
                    if repetition >= 0:
                        texts = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
                        way.tokens += sum(map(len, outputs))
                        way.right += sum(map(is_correct, texts, batch))
                        way.inside += self.inside
                        way.passes = {role: count + self.passes[role] for role, count in way.passes.items()}
            for way, seconds in zip(ways, taken, strict=True):
                way.seconds += [seconds] if repetition >= 0 else []


def show(ways: list[Way], decoded: int, repeats: int) -> None:
    """Print a line for each way."""
    print(f"{'':34}{'x LLM alone':>20}{'fastest':>9}{'tokens/s':>10}{'LLM passes':>12}{'SLM steps':>11}", end="")
    print(f"{'tokens/pass':>13}{'in passes':>11}  right")
    first = ways[0]
    for way in ways:
        work = way.tokens / first.tokens
        ratios = [work * sum(one) / sum(own) for one, own in zip(first.seconds, way.seconds, strict=True)]
        best, own = (sum(map(min, zip(*one.seconds, strict=True))) for one in (first, way))
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        slm, llm = (way.passes[role] / way.tokens for role in ("slm", "llm"))
        print(
            f"{way.name:34}{times:>20}{work * best / own:9.2f}{way.tokens / repeats / own:10.1f}{llm:12.4f}{slm:11.2f}"
            f"{1 / llm:13.1f}{way.inside / sum(map(sum, way.seconds)):11.0%}  {way.right / decoded:.1%}"
        )


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--slots", type=int, default=0, help="stream through so many slots")
    parser.add_argument("--problems", type=int, help="default: 24, or 200 with --slots")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--layers", type=int, default=28, help="layers on top of the LLM")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    transformers.logging.disable_progress_bar()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores, load {load}")
    bench, size = Bench(wanted.layers), wanted.slots or wanted.batch_size
    some = list(problems("test", 7, wanted.problems or (200 if wanted.slots else 24)))
    step = len(some) if wanted.slots else size
    ways = bench.ways(size, [name for name in SETTINGS if wanted.only in name], bool(wanted.slots))
    bench.measure(ways, [some[start : start + step] for start in range(0, len(some), step)], wanted.repeats)
    show(ways, len(some) * wanted.repeats, wanted.repeats)


if __name__ == "__main__":
    main()
