"""What a text costs to write: bytes moved and operations, as it is decoded alone, with a cache for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from citer_hf import CiterForCausalLM
from citer_hf.bench.costs import ModelCost, cost_of_model, flops

__all__ = ["ModelPasses", "PairCosts", "TextCost", "scoring_cost"]


@dataclass(frozen=True)
class TextCost:
    """What it takes to write something."""

    bytes: float = 0.0
    flops: float = 0.0
    llm_passes: int = 0

    def __add__(self, other: TextCost) -> TextCost:
        return TextCost(self.bytes + other.bytes, self.flops + other.flops, self.llm_passes + other.llm_passes)


class ModelPasses:
    """Costs of forward passes of one model over one row, each counted once and remembered."""

    def __init__(self, cost: ModelCost, is_llm: bool):
        self.cost, self.is_llm = cost, is_llm
        self.one_pass = cache(self._one_pass)
        self._steps = [TextCost()]

    def _one_pass(self, tokens: int, context: int) -> TextCost:
        """Cost of a pass that reads some tokens behind others in the cache; logits of the last one are computed."""
        moved = self.cost.weight_bytes_read(tokens) + self.cost.kv_bytes_read(context)
        moved += self.cost.kv_bytes_per_token * tokens
        return TextCost(moved, flops(self.cost, tokens, context), int(self.is_llm))

    def text(self, prompt: int, tokens: int) -> TextCost:
        """Cost of a pass over the prompt, and one over each new token but the last, which nobody reads."""
        first, last = prompt, prompt + tokens - 1
        while len(self._steps) <= last:
            self._steps.append(self._steps[-1] + self.one_pass(1, len(self._steps) - 1))
        before, after = self._steps[first], self._steps[last]
        steps = TextCost(after.bytes - before.bytes, after.flops - before.flops, after.llm_passes - before.llm_passes)
        return self.one_pass(prompt, 0) + steps


class PairCosts:
    """Costs of the texts of a pair (section 4.1 of CITER: cost is what is moved from memory)."""

    def __init__(self, model: CiterForCausalLM):
        self.slm = ModelPasses(cost_of_model(model.slm), is_llm=False)
        self.llm = ModelPasses(cost_of_model(model.llm), is_llm=True)

    def alone(self, by_llm: bool, prompt: int, tokens: int) -> TextCost:
        """Cost of a text that one model writes without the other."""
        return (self.llm if by_llm else self.slm).text(prompt, tokens)

    def routed(self, scoring: TextCost, prompt: int, to_llm: Sequence[bool]) -> TextCost:
        """Cost of a text that is routed token by token."""
        slm = self.slm.text(prompt, len(to_llm))
        moved, operations = slm.bytes + scoring.bytes * len(to_llm), slm.flops + scoring.flops * len(to_llm)
        passes = seen = 0
        for place, by_llm in enumerate(to_llm, prompt):
            if by_llm:
                one = self.llm.one_pass(place - seen, seen)
                moved, operations, passes, seen = moved + one.bytes, operations + one.flops, passes + 1, place
        return TextCost(moved, operations, passes)

    def routed_by_query(self, scoring: TextCost, prompt: int, tokens: int, by_llm: bool) -> TextCost:
        """Cost of a text whose writer is chosen once, after the SLM has read the prompt."""
        cost = self.alone(by_llm, prompt, tokens) + scoring
        return cost + self.slm.one_pass(prompt, 0) if by_llm else cost


def scoring_cost(router: nn.Module) -> TextCost:
    """Return what it takes to score one token: every weight is read, multiplied and added."""
    weights: list[Any] = []
    for module in router.modules():
        if not isinstance(module, nn.Embedding):
            weights += module.parameters(recurse=False)
    return TextCost(float(sum(one.nbytes for one in weights)), 2.0 * sum(one.numel() for one in weights))
