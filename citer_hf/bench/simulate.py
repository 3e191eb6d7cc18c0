"""`citer bench --simulate`: the speed of a pair on a machine that is not at hand, from two configurations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from citer_hf.costs import ModelCost, cost_of_config
from citer_hf.model.configuration import context_length
from citer_hf.runs import CommandOptions, option

from .cost_curve import CATCH_UPS, CostCurve

# Published memory bandwidth in GB/s. The CPU: two channels of DDR5-5200.
DEVICES = {
    "h200": 4800,
    "h100": 3350,
    "a100-80gb": 2039,
    "a100-40gb": 1555,
    "l40s": 864,
    "rtx4090": 1008,
    "cpu-ddr5": 83,
}
# Seconds of a pass beside memory traffic, when it is replayed as a CUDA graph: the launch, sampling and the host.
OVERHEAD = 1e-3


@dataclass(frozen=True)
class SimulateOptions(CommandOptions):
    gpu: str | None = option(None, f"The machine: {', '.join(DEVICES)}.", "NAME")
    bandwidth: float | None = option(None, "Memory bandwidth of the machine; overrides --gpu.", "GB/S", min=1e-9)
    slm_bits: float = option(16, "Bits per weight of the SLM, such as 16, 8 or 4.5.", "N", min=1)
    llm_bits: float = option(16, "Bits per weight of the LLM.", "N", min=1)
    tensor_parallel: int = option(1, "Devices that share the LLM.", "N", min=1)
    shares: tuple[float, ...] = option((0.0, 0.2, 0.5, 1.0), "Shares of the tokens that the LLM decides.", "P,...")
    batch_size: int = option(1, "Sequences that are decoded together.", "N", min=1)
    prompt_length: int = option(128, "Length of the prompts, in tokens.", "N", min=1)
    max_new_tokens: int = option(64, "New tokens of each sequence.", "N", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"--shares: expected numbers from 0 to 1, got {', '.join(map(str, self.shares))}.")


def simulate(slm_config: PreTrainedConfig, llm_config: PreTrainedConfig, **options: Any) -> list[dict[str, Any]]:
    """Return a projection for each share; the options are the fields of `SimulateOptions`.

    A pass takes the time to move its weights, keys and values once, and 1 ms; sequences of a batch move in lock-step.
    """
    wanted = SimulateOptions(**options)
    if wanted.bandwidth is None and wanted.gpu not in DEVICES:
        raise ValueError(f"--gpu: expected one of {', '.join(DEVICES)}, or --bandwidth, got {wanted.gpu!r}.")
    context = wanted.prompt_length + wanted.max_new_tokens
    limits = [limit for limit in map(context_length, (slm_config, llm_config)) if limit is not None]
    if context > min(limits, default=context):
        raise ValueError(
            f"--prompt-length, --max-new-tokens: expected at most {min(limits)} tokens in all, the pair's context "
            f"(max_position_embeddings), got {context}."
        )
    bandwidth = 1e9 * (wanted.bandwidth or DEVICES[str(wanted.gpu)])
    slm, llm = cost_of_config(slm_config, wanted.slm_bits), cost_of_config(llm_config, wanted.llm_bits)
    batch, devices = wanted.batch_size, wanted.tensor_parallel

    def taken(cost: ModelCost, tokens: int, parts: int = 1) -> float:
        return OVERHEAD + cost.bytes_moved(batch, tokens, context) / bandwidth / parts

    curve = CostCurve(context, batch, taken(slm, 1), {tokens: taken(llm, tokens, devices) for tokens in CATCH_UPS})
    caches = batch * (slm.kv_bytes_read(context) + llm.kv_bytes_read(context) / devices)
    return [
        {
            "share": share,
            "llm_passes_per_position": 1 - (1 - share) ** batch,
            "time_per_token_s": (seconds := curve.seconds_per_token(share)),
            "tokens_per_s": batch / seconds,
            "speedup": curve.llm[1] / seconds,
            "slm_step_s": curve.slm_step,
            "llm_step_s": curve.llm[1],
            "llm_alone_tokens_per_s": batch / curve.llm[1],
            "break_even_share": curve.break_even(),
            "bytes_per_gpu": slm.resident_bytes + llm.resident_bytes / devices + caches,
        }
        for share in wanted.shares
    ]


def table(projections: Sequence[dict[str, Any]]) -> str:
    lines = ["LLM share   SLM step, ms   LLM step, ms   ms / position   tokens / s   LLM alone   speed-up"]
    for one in projections:
        times = [1e3 * one[name] for name in ("slm_step_s", "llm_step_s", "time_per_token_s")]
        rates = [one[name] for name in ("tokens_per_s", "llm_alone_tokens_per_s", "speedup")]
        cells = "{:14.2f} {:14.2f} {:15.2f} {:12.1f} {:11.1f} {:10.2f}".format(*times, *rates)
        lines.append(f"{one['share']:9.1%} {cells}")
    for one in projections[:1]:
        even = "none" if one["break_even_share"] is None else f"{one['break_even_share']:.1%}"
        lines.append(f"Break-even LLM share: {even}. The fullest device holds {one['bytes_per_gpu'] / 1e9:.3g} GB.")
    return "\n".join([*lines, "Projected, not measured; a batch moves in lock-step."])
