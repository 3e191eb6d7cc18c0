"""`citer bench`: the speed of a pair beside each model alone and the least time that its decisions can cost."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from citer_hf import CiterForCausalLM
from citer_hf.costs import ModelCost, cost_of_model
from citer_hf.model.generation import CACHE_IMPLEMENTATIONS
from citer_hf.model.routers import as_threshold, as_veto
from citer_hf.runs import CommandOptions, machine, option, progress

from . import contenders as ways
from .contenders import ALONE, ASSISTED, ENSEMBLE, FLOOR, SLM, Batch, Contender

# Bytes that are read and copied to measure the bandwidth of memory.
BUFFER = 256 << 20
SHARES = (0.0, 0.2, 0.5)
# Published memory bandwidth in GB/s, for projections. The CPU: two channels of DDR5-5200.
DEVICES = {
    "h200": 4800,
    "h100": 3350,
    "a100-80gb": 2039,
    "a100-40gb": 1555,
    "l40s": 864,
    "rtx4090": 1008,
    "cpu-ddr5": 83,
}
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
    prompts: str | None = option(None, 'One prompt a line, or examples with a "prompt".', "FILE")
    prompt_length: int = option(128, "Length of synthetic prompts, in tokens.", "N", min=1)
    batch_size: int = option(1, "Sequences that are decoded together.", "N", min=1)
    max_new_tokens: int = option(64, "New tokens of each sequence.", "N", min=1)
    repeats: int = option(3, "Timed repetitions.", "N", min=1)
    warmup: int = option(1, "Repetitions before the timed ones.", "N", min=0)
    cache_implementation: str | None = option(None, "As for `generate`, such as static.", "NAME")
    seed: int = option(0, "Seed of synthetic prompts and forced shares.")
    assisted: bool = option(True, "Time transformers' assisted generation, lossless and lossy.")
    gpu: str | None = option(None, f"With --simulate, the machine: {', '.join(DEVICES)}.", "NAME")
    bandwidth: float | None = option(None, "Its memory bandwidth; overrides --gpu.", "GB/S", min=1e-9)
    slm_bits: float = option(16, "Bits per weight of the SLM there, such as 16, 8 or 4.5.", "N", min=1)
    llm_bits: float = option(16, "Bits per weight of the LLM there.", "N", min=1)
    tensor_parallel: int = option(1, "Devices that share the LLM there.", "N", min=1)

    def __post_init__(self) -> None:
        if not all(0 <= one <= 1 for one in (*(self.shares or ()), self.agreement or 0.0)):
            raise ValueError(f"--shares, --agreement: expected 0 to 1, got {self.shares} and {self.agreement}.")
        try:
            [as_threshold(threshold) for threshold in self.thresholds]
            as_veto(self.veto or 0.0)
        except ValueError as error:
            raise ValueError(f"--thresholds, --veto: {error}") from None
        super().__post_init__()
        if self.cache_implementation not in (None, *CACHE_IMPLEMENTATIONS):
            known = ", ".join(CACHE_IMPLEMENTATIONS)
            raise ValueError(f"--cache-implementation: expected one of {known}, got {self.cache_implementation!r}.")


def as_device(name: str | None) -> str:
    """Return the device to run on: the one given (`auto` for all), or the first accelerator, or the CPU."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return name or ("cpu" if kind is None else f"{kind.type}:0")


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


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median of some repetitions, the smallest and the largest, or `None` when there are none."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float] | None:
    """Divide repetition by repetition: a slow moment of the machine slows both down."""
    return spread([one / other for one, other in zip(above, below, strict=False)])


COUNTS = ("llm_share", "llm_passes_per_position", "slm_passes_per_position", "peak_memory_bytes", "bytes_moved")


@dataclass
class Report:
    model: str
    options: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)
    # At a position every sequence of the batch gets a token.
    positions: int = 0
    rows: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def error(self) -> str | None:
        """The first failure of a contender, except of assisted generation, which not every pair can do."""
        failed = (
            f"{row.name}: {row.error}" for row in self.rows if row.error and row.kind not in (ASSISTED, ENSEMBLE)
        )
        return next(failed, None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "complete": not self.interrupted and self.error is None,
            "interrupted": self.interrupted,
            "error": self.error,
            "options": self.options,
            "machine": self.machine or None,
            "rows": [self._row(row) for row in self.rows],
            "notes": self.notes,
        }

    def _row(self, row: Contender) -> dict[str, Any]:
        setting, tokens = row.setting, self.positions * self.options["batch_size"]
        floors = [one for one in self.rows if one.kind == FLOOR != row.kind and one.setting == setting]
        moved, bandwidth = row.counts.get("bytes_moved"), self.machine.get("memory_bandwidth")
        fraction = moved / statistics.median(row.seconds) / bandwidth if row.seconds and moved else None
        passes = row.counts.get("llm_passes_per_position")
        return {
            "name": row.name,
            "kind": row.kind,
            "share": setting.share if setting else None,
            "threshold": setting.router_threshold if setting and setting.share is None else None,
            "error": row.error,
            "seconds": row.seconds,
            "tokens": tokens,
            "positions": self.positions,
            "tokens_per_second": spread([tokens / one for one in row.seconds]),
            "ms_per_token": spread([1000 * one / self.positions for one in row.seconds]),
            "speedup": ratios(self.rows[0].seconds, row.seconds),
            "relative_to_floor": ratios(row.seconds, floors[0].seconds) if floors else None,
            **{name: row.counts.get(name) for name in COUNTS},
            "tokens_per_llm_pass": self.options["batch_size"] / passes if passes else None,
            "bandwidth_fraction": fraction,
        }

    def table(self) -> str:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        rows, on_gpu = self.as_dict()["rows"], self.machine.get("device", "").startswith("cuda")
        columns = {key: column for key, column in COLUMNS.items() if on_gpu or key != "peak_memory_bytes"}
        shown = Table("", *(heading for heading, _ in columns.values()), box=SIMPLE)
        for row in rows:
            row["mb_per_position"] = row["bytes_moved"] and row["bytes_moved"] / row["positions"] / 1e6
            cells = ["" if row[key] is None else cell(row[key]) for key, (_, cell) in columns.items()]
            shown.add_row(row["name"], *(["failed", *cells[1:]] if row["error"] else cells))
        console = Console(width=None if sys.stdout.isatty() else 160)
        with console.capture() as text:
            console.print(shown)
        parts = []
        if self.interrupted:
            parts.append(f"Interrupted: {'this is what' if rows else 'nothing'} was measured until then.")
        if rows:
            device, sizes, repeats = self.machine, self.options, max(len(row["seconds"]) for row in rows)
            parts.append(
                f"{self.model} on {device['device']} ({device['name']}, threads: {device['threads']}, "
                f"{device['memory_bandwidth'] / 1e9:.1f} GB/s), {sizes['dtype']['llm']}\n"
                f"batch size {sizes['batch_size']}, prompts of up to {max(sizes['prompt_length'])} tokens, "
                f"{sizes['max_new_tokens']} new ones; median of {repeats} repetitions (smallest–largest)\n"
                f"{text.get().rstrip()}"
            )
        parts += [f"{row['name']} failed: {row['error']}" for row in rows if row["error"]]
        return "\n".join(parts + [f"Note: {note}" for note in self.notes])


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} ({value['low']:.3g}–{value['high']:.3g})"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tokens_per_second": ("tokens / s", lambda value: f"{value['median']:.3g}"),
    "ms_per_token": ("ms / position", _spread),
    "speedup": ("× LLM alone", _spread),
    "relative_to_floor": ("time / floor", _spread),
    "llm_share": ("LLM\nshare", "{:.1%}".format),
    "llm_passes_per_position": ("LLM\npasses", "{:.2f}".format),
    "slm_passes_per_position": ("SLM\npasses", "{:.2f}".format),
    "tokens_per_llm_pass": ("tokens /\nLLM pass", "{:.3g}".format),
    "mb_per_position": ("MB\nmoved", "{:,.4g}".format),
    "bandwidth_fraction": ("of band-\nwidth", "{:.0%}".format),
    "peak_memory_bytes": ("peak\nGB", lambda value: f"{value / 1e9:.2f}"),
}


def bench(model: CiterForCausalLM, name: str | None = None, **options: Any) -> Report:
    """Measure how fast a pair decodes; the options are the fields of `BenchOptions`. Ctrl-C keeps what is measured."""
    wanted = BenchOptions(**options)
    batches = _batches(model, wanted)
    lengths = [batch.length for batch in batches]
    check_context(max(lengths), wanted.max_new_tokens, model.config.max_position_embeddings)
    dtypes = {role: str(getattr(model, role).dtype).removeprefix("torch.") for role in ("slm", "llm")}
    report = Report(name or model.name_or_path, {**asdict(wanted), "prompt_length": lengths, "dtype": dtypes})
    try:
        with ways.greedy_without_end(model):
            _measure(model, wanted, batches, report)
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def check_context(prompt: int, new_tokens: int, limit: int | None) -> None:
    """Raise an error where prompts and new tokens exceed a pair's context."""
    if limit is not None and prompt + new_tokens > limit:
        raise ValueError(
            f"--prompt-length, --max-new-tokens: a prompt of {prompt} tokens and {new_tokens} new ones exceed the "
            f"pair's context of {limit} tokens (max_position_embeddings). Give fewer of either."
        )


def _batches(model: CiterForCausalLM, wanted: BenchOptions) -> list[Batch]:
    device = model.slm.device
    if wanted.prompts is None:
        batches = [ways.random_batch(model.vocab_size, wanted.prompt_length, wanted.batch_size, wanted.seed)]
    else:
        tokenizer = model.load_tokenizer()
        if tokenizer is None:
            raise ValueError("--prompts: the pair has no tokenizer. Leave the option out for synthetic prompts.")
        batches = ways.padded_batches(ways.read_prompts(Path(wanted.prompts), tokenizer), wanted.batch_size)
    return [Batch(one.input_ids.to(device), one.attention_mask.to(device), one.number) for one in batches]


def _measure(model: CiterForCausalLM, wanted: BenchOptions, batches: list[Batch], report: Report) -> None:
    decoders = ways.Decoders(model, wanted.max_new_tokens, wanted.cache_implementation, wanted.seed, wanted.agreement)
    alone = wanted.batch_size == 1
    if wanted.assisted and not alone:
        report.notes.append("assisted generation was not measured: transformers has it for batch_size = 1 alone.")
    default = () if wanted.thresholds else SHARES
    settings = ways.settings_of(default if wanted.shares is None else wanted.shares, wanted.thresholds, wanted.veto)
    contenders = decoders.contenders(settings, wanted.assisted and alone)
    total = len(contenders) * (1 + wanted.warmup + wanted.repeats)
    bar = progress(None, "citer bench", total, shown=sys.stderr.isatty())
    report.machine = describe_machine(model.slm.device)
    # 1. One run of each contender is not timed: hooks count its passes.
    costs = cost_of_model(model.slm), cost_of_model(model.llm)
    report.positions = len(batches) * wanted.max_new_tokens
    for contender in contenders:
        report.rows.append(contender)
        with _errors_to(contender):
            contender.counts = _counts(model, costs, contender, batches, wanted)
        bar.update()
    # 2. Repetitions of all in turn: a slow moment of the machine slows neighbours down alike.
    for repetition in range(-wanted.warmup, wanted.repeats):
        for contender in contenders:
            with _errors_to(contender):
                run = partial(contender.run, batches, wanted.max_new_tokens)
                taken = [] if contender.error else [seconds(batches[0].input_ids.device, run)]
                contender.seconds += taken if repetition >= 0 else []
            bar.update()
    bar.close()


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
    model: CiterForCausalLM,
    costs: tuple[ModelCost, ModelCost],
    contender: Contender,
    batches: list[Batch],
    wanted: BenchOptions,
) -> dict[str, Any]:
    """Run a contender once, and return what `COUNTS` names."""
    gpus = range(torch.cuda.device_count() if model.slm.device.type == "cuda" else 0)
    for index in gpus:
        torch.cuda.reset_peak_memory_stats(index)
    with ways.count_passes(model) as passes:
        outputs = contender.run(batches, wanted.max_new_tokens)
    by_llm = sum(int(to_llm.sum()) for _, to_llm in outputs if to_llm is not None)
    positions = len(batches) * wanted.max_new_tokens
    known = {ALONE: 1.0, SLM: 0.0, ASSISTED: None, ENSEMBLE: None}
    return {
        "llm_share": known.get(contender.kind, by_llm / positions / wanted.batch_size),
        "slm_passes_per_position": len(passes[0]) / positions,
        "llm_passes_per_position": len(passes[1]) / positions,
        "peak_memory_bytes": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
        "bytes_moved": round(
            sum(cost.bytes_moved(*one) for cost, of in zip(costs, passes, strict=True) for one in of)
        ),
    }


@contextmanager
def _errors_to(contender: Contender) -> Iterator[None]:
    """Note an error as text, so that the others are measured."""
    try:
        yield
    except FAILURES as error:
        contender.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
