"""`citer bench`: the speed of a pair beside each model alone and the least time that its decisions can cost."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers

from citer_hf import CiterForCausalLM, terminal
from citer_hf.costs import ModelCost, cost_of_model
from citer_hf.data.examples import read_examples
from citer_hf.data.tokens import encode_prompt
from citer_hf.model.generation import CACHE_IMPLEMENTATIONS
from citer_hf.model.routers import as_threshold, as_veto
from citer_hf.runs import CommandOptions, machine, option, progress

from . import contenders as ways
from .contenders import ALONE, ASSISTED, ENSEMBLE, FLOOR, SLM, Batch, Contender

# Bytes that are read and copied to measure the bandwidth of memory.
BUFFER = 256 << 20
SHARES = (0.0, 0.2, 0.5)
# Published memory bandwidth in GB/s, for projections. The CPU: two channels of DDR5-5200.
DEVICES = {"h200": 4800, "h100": 3350, "a100-80gb": 2039, "l40s": 864, "rtx4090": 1008, "cpu-ddr5": 83}
# Errors of one contender, which do not keep the others from being measured.
FAILURES = (RuntimeError, ValueError, TypeError, OSError, MemoryError)


@dataclass(frozen=True)
class BenchOptions(CommandOptions):
    shares: tuple[float, ...] | None = option(
        None, "Flag these shares of the tokens. [default: 0,0.2,0.5, or none with --thresholds]", "P,..."
    )
    agreement: float | None = option(
        None, "Let the LLM agree with this share of the tokens that --shares flags. [default: as it does]", "A"
    )
    thresholds: tuple[float, ...] = option((), "Let the pair's own router decide at these thresholds.", "X,...")
    veto: float | None = option(None, "The LLM's veto. [default: the pair's with --thresholds, 0 with --shares]", "X")
    prompts: str | None = option(None, 'Examples with a "prompt", as for `citer evaluate`.', "FILE")
    prompt_length: int = option(128, "Length of synthetic prompts, in tokens.", "N", min=1)
    batch_size: int = option(1, "Sequences that are decoded together.", "N", min=1)
    max_new_tokens: int = option(64, "New tokens of each sequence.", "N", min=1)
    repeats: int = option(3, "Timed repetitions.", "N", min=1)
    warmup: int = option(1, "Repetitions before the timed ones.", "N", min=0)
    cache_implementation: str | None = option(None, "As for `generate`, such as static.", "NAME")
    seed: int = option(0, "Seed of synthetic prompts and forced shares.")
    assisted: bool = option(True, "Time transformers' assisted generation, which is for --batch-size 1 alone.")
    gpu: str | None = option(None, f"With --simulate, the machine: {', '.join(DEVICES)}.", "NAME")
    bandwidth: float | None = option(None, "Its memory bandwidth; overrides --gpu.", "GB/S", min=1e-9)
    slm_bits: float = option(16, "Bits per weight of the SLM there, such as 16, 8 or 4.5.", "N", min=1)
    llm_bits: float = option(16, "Bits per weight of the LLM there.", "N", min=1)
    tensor_parallel: int = option(1, "Devices that share the LLM there.", "N", min=1)

    def __post_init__(self) -> None:
        if not all(0 <= one <= 1 for one in (*(self.shares or ()), self.agreement or 0.0)):
            raise ValueError(f"--shares, --agreement: expected 0 to 1, got {self.shares} and {self.agreement}.")
        for threshold in self.thresholds:
            as_threshold(threshold)
        as_veto(self.veto or 0.0)
        super().__post_init__()
        if self.cache_implementation not in (None, *CACHE_IMPLEMENTATIONS):
            known = ", ".join(CACHE_IMPLEMENTATIONS)
            raise ValueError(f"--cache-implementation: expected one of {known}, got {self.cache_implementation!r}.")


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return the time that something takes, from idle accelerators to idle accelerators."""

    def now() -> float:
        # The two models may be on different devices.
        for index in range(0 if device.type == "cpu" else torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
        return time.perf_counter()

    start = now()
    work()
    return now() - start


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median of some repetitions, the smallest and the largest, or `None` when there are none."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float] | None:
    """Divide repetition by repetition: a slow moment of the machine slows both down."""
    return spread([one / other for one, other in zip(above, below, strict=False)])


COUNTS = ("llm_share", "llm_passes_per_position", "slm_passes_per_position", "bytes_moved")


def bench(model: CiterForCausalLM, name: str | None = None, **options: Any) -> dict[str, Any]:
    """Measure how fast a pair decodes, and return the report: a row for each contender, and what they were run with.

    The options are the fields of `BenchOptions`. Ctrl-C keeps what is measured.
    """
    wanted = BenchOptions(**options)
    batches = _batches(model, wanted)
    lengths = [batch.length for batch in batches]
    check_context(max(lengths), wanted.max_new_tokens, model.config.max_position_embeddings)
    dtypes = {role: str(getattr(model, role).dtype).removeprefix("torch.") for role in ("slm", "llm")}
    report: dict[str, Any] = {"model": name or model.name_or_path, "machine": None, "interrupted": False}
    report["options"] = {**asdict(wanted), "prompt_length": lengths, "dtype": dtypes}
    decoders = ways.Decoders(model, wanted.max_new_tokens, wanted.cache_implementation, wanted.seed, wanted.agreement)
    default = () if wanted.thresholds else SHARES
    settings = ways.settings_of(default if wanted.shares is None else wanted.shares, wanted.thresholds, wanted.veto)
    contenders = decoders.contenders(settings, wanted.assisted and wanted.batch_size == 1)
    rounds = range(-1 - wanted.warmup, wanted.repeats)
    try:
        bar = progress(None, "citer bench", len(contenders) * len(rounds), shown=sys.stderr.isatty())
        with ways.greedy_without_end(model), bar:
            report["machine"] = describe_machine(model.slm.device)
            costs = cost_of_model(model.slm), cost_of_model(model.llm)
            # All in turn: a slow moment of the machine slows neighbours down alike.
            for number, contender in product(rounds, contenders):
                try:
                    if number == rounds[0]:
                        # 1. One run of each contender is not timed: hooks count its passes.
                        contender.counts = _counts(model, costs, contender, batches)
                    elif contender.error is None:
                        # 2. Repetitions, those of the warm-up first.
                        taken = seconds(model.slm.device, partial(contender.run, batches))
                        contender.seconds += [taken] if number >= 0 else []
                except FAILURES as error:
                    contender.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
                bar.update()
    except KeyboardInterrupt:
        report["interrupted"] = True
    counted = [one for one in contenders if one.counts or one.error]
    report["rows"] = [_row(one, counted, report, len(batches) * wanted.max_new_tokens) for one in counted]
    # Assisted generation may fail: not every pair can do it.
    failed = [f"{one.name}: {one.error}" for one in counted if one.error and one.kind not in (ASSISTED, ENSEMBLE)]
    report["error"] = failed[0] if failed else None
    return report | {"complete": not (failed or report["interrupted"])}


def _row(one: Contender, contenders: Sequence[Contender], report: dict[str, Any], positions: int) -> dict[str, Any]:
    """Return the measurements of a contender. At a position every sequence of the batch gets a token."""
    batch, setting, passes = report["options"]["batch_size"], one.setting, one.counts.get("llm_passes_per_position")
    floors = [other for other in contenders if other.kind == FLOOR != one.kind and other.setting == setting]
    moved = one.counts["bytes_moved"] / report["machine"]["memory_bandwidth"] if one.counts else 0.0
    return {
        "name": one.name,
        "kind": one.kind,
        "share": setting.share if setting else None,
        "threshold": setting.router_threshold if setting and setting.share is None else None,
        "error": one.error,
        "seconds": one.seconds,
        "tokens": positions * batch,
        "positions": positions,
        "tokens_per_second": spread([positions * batch / taken for taken in one.seconds]),
        "ms_per_token": spread([1000 * taken / positions for taken in one.seconds]),
        "speedup": ratios(contenders[0].seconds, one.seconds),
        "relative_to_floor": ratios(one.seconds, floors[0].seconds) if floors else None,
        **{name: one.counts.get(name) for name in COUNTS},
        "tokens_per_llm_pass": batch / passes if passes else None,
        "bandwidth_fraction": moved / statistics.median(one.seconds) if one.seconds and moved else None,
    }


def table(report: dict[str, Any]) -> str:
    """Return a report for a terminal."""
    rows, machine, options = report["rows"], report["machine"], report["options"]
    parts = ["Interrupted: this is what was measured until then."] if report["interrupted"] else []
    if rows:
        cells = [
            {name: "" if row[key] is None else cell(row[key]) for name, (key, cell) in COLUMNS.items()} for row in rows
        ]
        parts.append(
            f"{report['model']} on {machine['device']} ({machine['name']}, threads: {machine['threads']}, "
            f"{machine['memory_bandwidth'] / 1e9:.1f} GB/s), {options['dtype']['llm']}\n"
            f"batch size {options['batch_size']}, prompts of up to {max(options['prompt_length'])} tokens, "
            f"{options['max_new_tokens']} new ones; median of {len(rows[0]['seconds'])} repetitions "
            f"(smallest–largest)\n\n{terminal.table(cells)}\n"
        )
    return "\n".join(parts + [f"{row['name']} failed: {row['error']}" for row in rows if row["error"]])


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} ({value['low']:.3g}–{value['high']:.3g})"


# The columns of the table: what a row of the report calls them, and how they are shown.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "": ("name", str),
    "tokens / s": ("tokens_per_second", lambda value: f"{value['median']:.3g}"),
    "× LLM alone": ("speedup", _spread),
    "time / floor": ("relative_to_floor", _spread),
    "LLM share": ("llm_share", "{:.1%}".format),
    "LLM passes": ("llm_passes_per_position", "{:.2f}".format),
    "SLM passes": ("slm_passes_per_position", "{:.2f}".format),
    "tokens / LLM pass": ("tokens_per_llm_pass", "{:.3g}".format),
    "of bandwidth": ("bandwidth_fraction", "{:.0%}".format),
}


def check_context(prompt: int, new_tokens: int, limit: int | None) -> None:
    """Raise an error where prompts and new tokens exceed a pair's context."""
    if limit is not None and prompt + new_tokens > limit:
        raise ValueError(
            f"--prompt-length, --max-new-tokens: a prompt of {prompt} tokens and {new_tokens} new ones exceed the "
            f"pair's context of {limit} tokens (max_position_embeddings). Give fewer of either."
        )


def _batches(model: CiterForCausalLM, wanted: BenchOptions) -> list[Batch]:
    if wanted.prompts is None:
        prompts = ways.random_prompts(model.vocab_size, wanted.prompt_length, wanted.batch_size, wanted.seed)
    else:
        tokenizer = model.load_tokenizer()
        if tokenizer is None:
            raise ValueError("--prompts: the pair has no tokenizer. Leave the option out for synthetic prompts.")
        prompts = [encode_prompt(example, tokenizer) for example in read_examples(wanted.prompts)]
    return ways.padded_batches(prompts, wanted.batch_size, model.slm.device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, and measure the bandwidth of its memory in bytes per second."""
    source = torch.ones(BUFFER // (4096 * 4), 4096, device=device)
    vector, target = torch.ones(4096, device=device), torch.empty_like(source)
    reads = min(seconds(device, lambda: torch.mv(source, vector)) for _ in range(5))
    copies = min(seconds(device, lambda: target.copy_(source)) for _ in range(5))
    return {
        **machine(device),
        "device": str(device),
        "memory_bandwidth": max(source.nbytes / reads, 2 * source.nbytes / copies),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _counts(
    model: CiterForCausalLM, costs: tuple[ModelCost, ModelCost], contender: Contender, batches: list[Batch]
) -> dict[str, Any]:
    """Run a contender once, and return what `COUNTS` names."""
    with ways.count_passes(model) as passes:
        outputs = contender.run(batches)
    positions = sum(tokens.shape[1] for tokens, _ in outputs)
    by_llm = [to_llm.float().mean().item() for _, to_llm in outputs if to_llm is not None]
    known = {ALONE: 1.0, SLM: 0.0}
    return {
        "llm_share": statistics.mean(by_llm) if by_llm else known.get(contender.kind),
        "slm_passes_per_position": len(passes[0]) / positions,
        "llm_passes_per_position": len(passes[1]) / positions,
        "bytes_moved": round(
            sum(cost.bytes_moved(*one) for cost, of in zip(costs, passes, strict=True) for one in of)
        ),
    }
