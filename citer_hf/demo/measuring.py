"""What one way to decode costs and achieves on the problems."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.model.schedule import rows_to_wait_for

from .problems import Problem, is_correct

__all__ = ["BATCH_SIZE", "Measurement", "measure", "settings", "spread_thresholds"]

BATCH_SIZE = 100


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    name: str
    router_threshold: float | None
    problems: int
    correct: int
    tokens: int
    llm_tokens: int
    llm_passes: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of problems answered correctly."""
        return self.correct / self.problems

    @property
    def llm_share(self) -> float:
        """Share of the tokens that the LLM wrote."""
        return self.llm_tokens / max(self.tokens, 1)

    @property
    def llm_passes_per_token(self) -> float:
        """For a token, how many forward passes of the LLM its text took part in: 1 when the LLM runs at every step."""
        return self.llm_passes / max(self.tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts, over the time that `generate` took."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        derived = ("accuracy", "llm_share", "llm_passes_per_token", "tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def measure(
    model: CiterForCausalLM,
    tokenizer: Any,
    problems: Sequence[Problem],
    name: str,
    router_threshold: float | None = None,
    progress: Callable[[int], None] = lambda solved: None,
) -> Measurement:
    """Solve problems, greedily and in batches, and count."""
    alone = {"SLM alone": model.slm, "LLM alone": model.llm}.get(name)
    correct = tokens = llm_tokens = llm_passes = 0
    seconds = 0.0
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        inputs = tokenizer([problem.prompt for problem in batch], padding=True, return_tensors="pt").to(model.device)
        options: dict[str, Any] = {"generation_config": settings(model)}
        if alone is None:
            options |= {"past_key_values": CiterCache(model.config), "router_threshold": router_threshold}
            options |= {"waiting_rows": same_policy_everywhere}
        began = time.perf_counter()
        output = (alone or model).generate(**inputs, **options)
        seconds += time.perf_counter() - began

        written = output[:, inputs.input_ids.shape[1] :]
        real = real_tokens(written, model.generation_config.eos_token_id)
        by_llm = torch.full_like(real, alone is model.llm)
        if alone is None:
            by_llm = options["past_key_values"].routing.to_llm & real
        tokens += int(real.sum())
        llm_tokens += int((by_llm & real).sum())
        calls = options["past_key_values"].routing.llm_calls if alone is None else int(by_llm.any()) * written.shape[1]
        llm_passes += round(calls / written.shape[1] * int(real.sum()))
        responses = tokenizer.batch_decode(written, skip_special_tokens=True)
        correct += sum(map(is_correct, responses, batch))
        progress(len(batch))
    return Measurement(name, router_threshold, len(problems), correct, tokens, llm_tokens, llm_passes, seconds)


def same_policy_everywhere(unfinished: int, llm_share: float, step_ratio: float) -> int:
    """Choose how many rows wait as `generate` does, but not by measured times, so that counts are reproducible."""
    return rows_to_wait_for(unfinished, llm_share, 0.3)


def settings(model: CiterForCausalLM, max_new_tokens: int = 160) -> Any:
    """Return the generation settings that every model decodes with, so that they differ in nothing else."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=max_new_tokens)
    return config


def real_tokens(written: torch.Tensor, eos_token_id: int | list[int] | None) -> torch.Tensor:
    """Say which tokens are text: those up to the end-of-text token, and that one."""
    if eos_token_id is None:
        return torch.ones_like(written, dtype=torch.bool)
    ends = torch.isin(written, torch.as_tensor(eos_token_id, device=written.device))
    return (ends.cumsum(dim=1) - ends.long()) == 0


def spread_thresholds(shipped: float) -> list[float]:
    """Return the shipped threshold between a lower and a higher one, a tenth and ten times its odds."""
    odds = shipped / (1 - shipped) if shipped < 1 else 99.0
    around = [odds / 10, odds * 10]
    low, high = (round(one / (1 + one), 3) for one in around)
    return [low, shipped, high]
