"""`citer bench --simulate`: the speed of a pair on a machine that is not at hand, from two configurations."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from citer_hf import terminal
from citer_hf.costs import ModelCost, cost_of_config
from citer_hf.model.configuration import context_length
from citer_hf.model.sequence import MOST_DRAFTS

from .bench import DEVICES, SHARES, BenchOptions, check_context

# Seconds of a pass beside memory traffic, when it is replayed as a CUDA graph: the launch, sampling and the host.
OVERHEAD = 1e-3


def settled(drafts: float, rejected: float) -> float:
    """Return how many of some drafts are settled, if each one that holds lets the next one count."""
    return drafts if rejected == 0 else (1 - (1 - rejected) ** drafts) / rejected


@dataclass(frozen=True)
class PassTimes:
    """Seconds of an SLM step, and of an LLM pass by its tokens, for a number of sequences."""

    sequences: int
    slm_step: float
    llm: Callable[[float], float]

    def best(self, share: float, agreement: float = 0.0) -> tuple[float, float, float]:
        """Return seconds, LLM passes and SLM steps per position: independent decisions, the best draft length."""
        if share == 0:
            return self.slm_step, 0.0, 1.0
        # A draft is a number of tokens; or it ends when any sequence has a flagged one; or one sequence has several.
        several: Sequence[float] = range(1, MOST_DRAFTS + 1)
        flagged = 1 - (1 - share) ** self.sequences
        drafts = [(tokens, settled(tokens, share * (1 - agreement))) for tokens in several]
        several = several if self.sequences == 1 else (1,)
        drafts += [(flags / flagged, settled(flags, 1 - agreement) / flagged) for flags in several]
        return min(
            ((steps * self.slm_step + self.llm(steps)) / tokens, 1 / tokens, steps / tokens)
            for steps, tokens in drafts
        )

    def break_even(self) -> float | None:
        """Return the LLM share from which on a pair without agreement is slower than its LLM; `None`: it always is."""
        slower = bisect_left(range(1, 1000), True, key=lambda share: self.best(share / 1000)[0] >= self.llm(1))
        return (slower + 1) / 1000 if slower else None


def simulate(slm_config: PreTrainedConfig, llm_config: PreTrainedConfig, **options: Any) -> list[dict[str, Any]]:
    """Return a projection for each share; the options are fields of `BenchOptions`.

    A pass takes the time to move its weights, keys and values once, and 1 ms; decisions are independent.
    """
    wanted = BenchOptions(**options)
    if wanted.thresholds:
        raise ValueError("--thresholds: --simulate runs nothing; give --shares, or leave --simulate out.")
    if wanted.bandwidth is None and wanted.gpu not in DEVICES:
        raise ValueError(f"--gpu: expected one of {', '.join(DEVICES)}, or --bandwidth, got {wanted.gpu!r}.")
    context = wanted.prompt_length + wanted.max_new_tokens
    limits = [limit for limit in map(context_length, (slm_config, llm_config)) if limit is not None]
    check_context(wanted.prompt_length, wanted.max_new_tokens, min(limits, default=None))
    bandwidth = 1e9 * (wanted.bandwidth or DEVICES[str(wanted.gpu)])
    slm, llm = cost_of_config(slm_config, wanted.slm_bits), cost_of_config(llm_config, wanted.llm_bits)
    batch, devices = wanted.batch_size, wanted.tensor_parallel

    def taken(cost: ModelCost, tokens: float, parts: int = 1) -> float:
        return OVERHEAD + cost.bytes_moved(batch, tokens, context) / bandwidth / parts

    times = PassTimes(batch, taken(slm, 1), lambda tokens: taken(llm, tokens, devices))
    caches = batch * (slm.kv_bytes_read(context) + llm.kv_bytes_read(context) / devices)
    return [
        {
            "share": share,
            "llm_passes_per_position": passes,
            "slm_steps_per_position": steps,
            "time_per_token_s": seconds,
            "tokens_per_s": batch / seconds,
            "speedup": times.llm(1) / seconds,
            "slm_step_s": times.slm_step,
            "llm_step_s": times.llm(1),
            "llm_alone_tokens_per_s": batch / times.llm(1),
            "break_even_share": times.break_even(),
            "bytes_per_gpu": slm.resident_bytes + llm.resident_bytes / devices + caches,
        }
        for share, (seconds, passes, steps) in (
            (one, times.best(one, wanted.agreement or 0.0)) for one in wanted.shares or SHARES
        )
    ]


COLUMNS = {
    "flagged": "{share:.1%}",
    "SLM step, s": "{slm_step_s:.3g}",
    "LLM step, s": "{llm_step_s:.3g}",
    "s / position": "{time_per_token_s:.3g}",
    "LLM passes": "{llm_passes_per_position:.3f}",
    "tokens / s": "{tokens_per_s:.1f}",
    "× LLM alone": "{speedup:.2f}",
}


def table(projections: Sequence[dict[str, Any]]) -> str:
    rows = [{name: cell.format(**one) for name, cell in COLUMNS.items()} for one in projections]
    even, size = (projections[0][name] for name in ("break_even_share", "bytes_per_gpu"))
    return (
        f"{terminal.table(rows)}\nBreak-even without agreement: {'none' if even is None else f'{even:.1%}'}. "
        f"The fullest device holds {size / 1e9:.3g} GB.\nProjected, not measured."
    )
