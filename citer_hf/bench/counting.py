"""How often each model runs, over how many tokens, and what that reads from memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from citer_hf.model.compat import given_cache

from .costs import ModelCost

__all__ = ["Pass", "Passes", "count_passes"]


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    rows: int
    tokens: int
    context: int


@dataclass
class Passes:
    """The forward passes of both models."""

    slm: list[Pass] = field(default_factory=list)
    llm: list[Pass] = field(default_factory=list)

    def bytes_moved(self, slm: ModelCost, llm: ModelCost) -> float:
        """Bytes of weights and of keys and values that all passes read, and of those that they write."""
        return sum(
            cost.weight_bytes_read(one.rows * one.tokens)
            + cost.kv_bytes_read(one.context) * one.rows
            + cost.kv_bytes_per_token * one.rows * one.tokens
            for cost, passes in ((slm, self.slm), (llm, self.llm))
            for one in passes
        )


@contextmanager
def count_passes(model: Any) -> Iterator[Passes]:
    """Note every forward pass of the two models of a pair. Hooks cost time, so take no times meanwhile."""
    settings = [part.generation_config for part in (model, model.slm, model.llm)]
    before = [one.disable_compile for one in settings]
    passes = Passes()

    def watch(noted: list[Pass]) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input_ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            cache = given_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
            context = int(cache.get_seq_length()) if cache is not None else 0
            noted.append(Pass(input_ids.shape[0], input_ids.shape[1], context))

        return hook

    handles = [
        part.register_forward_pre_hook(watch(noted), with_kwargs=True)
        for part, noted in ((model.slm, passes.slm), (model.llm, passes.llm))
    ]
    for one in settings:
        one.disable_compile = True
    try:
        yield passes
    finally:
        for one, was in zip(settings, before, strict=True):
            one.disable_compile = was
        for handle in handles:
            handle.remove()
