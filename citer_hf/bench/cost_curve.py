"""The cost of a step of each model, and the LLM share from which on a pair no longer pays."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from citer_hf import CiterForCausalLM
from citer_hf.model.compat import cache_argument

from .contenders import pass_keywords, random_batch

CATCH_UPS = (1, 2, 3, 4, 8, 16, 32)
TRIALS = 5


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return the time that something takes, from idle accelerators to idle accelerators."""
    # The two models may be on different devices.
    accelerators = range(0 if device.type == "cpu" else torch.accelerator.device_count())
    for index in accelerators:
        torch.accelerator.synchronize(index)
    start = time.perf_counter()
    work()
    for index in accelerators:
        torch.accelerator.synchronize(index)
    return time.perf_counter() - start


@dataclass(frozen=True)
class CostCurve:
    """Seconds of single forward passes: an SLM step, and LLM passes by their number of tokens."""

    prompt_length: int
    sequences: int
    slm_step: float
    llm: Mapping[int, float]

    def llm_seconds(self, tokens: int) -> float:
        """Seconds of an LLM pass: linear between measured numbers of tokens, and beyond them."""
        known = sorted(self.llm)
        if tokens in self.llm or len(known) == 1:
            return self.llm[min(tokens, known[-1])]
        left, right = next((pair for pair in itertools.pairwise(known) if tokens < pair[1]), known[-2:])
        return self.llm[left] + (self.llm[right] - self.llm[left]) * (tokens - left) / (right - left)

    def seconds_per_token(self, share: float) -> float:
        """Expected time of CITER per position, with independent decisions and sequences in lock-step."""
        if share == 0:
            return self.slm_step
        # The LLM is called with probability p, over a number of tokens that is geometric.
        p = 1 - (1 - share) ** self.sequences
        longest = max(self.llm)
        expected = sum(p * (1 - p) ** (tokens - 1) * self.llm_seconds(tokens) for tokens in range(1, longest + 1))
        another = max(self.llm_seconds(longest + 1) - self.llm[longest], 0)
        return self.slm_step + p * (expected + (1 - p) ** longest * self.llm[longest]) + (1 - p) ** longest * another

    def break_even(self) -> float | None:
        """Return the LLM share from which on the pair is slower than the LLM alone, or `None` if it always is."""
        slower = (share for share in range(1, 1000) if self.seconds_per_token(share / 1000) >= self.llm[1])
        share = next(slower, 1000)
        return None if share == 1 else share / 1000

    def as_dict(self) -> dict[str, Any]:
        llm = {str(tokens): 1000 * taken for tokens, taken in self.llm.items()}
        sizes = {"prompt_length": self.prompt_length, "rows": self.sequences}
        return sizes | {"slm_step_ms": 1000 * self.slm_step, "llm_ms": llm}

    def __str__(self) -> str:
        llm = ", ".join(f"{1000 * taken:.3g} ({tokens})" for tokens, taken in self.llm.items())
        share = self.break_even()
        pays = "at no LLM share" if share is None else f"up to an LLM share of {share:.1%}"
        return (
            f"One forward pass behind {self.prompt_length} tokens, in ms: SLM {1000 * self.slm_step:.3g}, LLM by its "
            f"tokens {llm}.\nBreak-even: {pays} the pair takes less time than the LLM alone, by these costs, "
            f"independent decisions{' and sequences in lock-step' if self.sequences > 1 else ''}."
        )


@torch.no_grad()
def measure_curve(
    model: CiterForCausalLM, prompt_length: int, sequences: int, longest: int | None = None, seed: int = 0
) -> CostCurve:
    """Time single forward passes of both bare models behind a cache of the prompt's length."""
    sizes = [size for size in CATCH_UPS if longest is None or size <= max(longest, 1)]
    tokens = random_batch(model.vocab_size, prompt_length + max(CATCH_UPS), sequences, seed).input_ids
    slm_pass, llm_pass = (_timed_pass(part, tokens, prompt_length) for part in (model.slm, model.llm))
    # All sizes in turn: other work on the machine then slows all of them down. The first turn warms up.
    turns = [(slm_pass(1), *map(llm_pass, sizes)) for _ in range(TRIALS + 1)]
    slm_step, *llm = (statistics.median(taken) for taken in zip(*turns[1:], strict=True))
    return CostCurve(prompt_length, sequences, slm_step, dict(zip(sizes, llm, strict=True)))


def _timed_pass(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> Callable[[int], float]:
    """Return a function that times a pass over some tokens behind a cache of this length."""
    tokens, keywords = tokens.to(model.device), pass_keywords(model)
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :length], **cache_argument(model, cache), **keywords)

    def taken(size: int) -> float:
        # Not every cache can take a pass back.
        behind, unseen = cache_argument(model, copy.deepcopy(cache)), tokens[:, length : length + size]
        return seconds(model.device, lambda: model(input_ids=unseen, **behind, **keywords))

    return taken
