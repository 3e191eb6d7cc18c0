"""Runs everything that is compared, in turn, and keeps what it has when it is interrupted or an error ends it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from citer_hf.model.generation import check_cache_implementation

from .clock import Clock
from .contenders import ALONE, ASSISTED, SLM, Contender, Decisions, contenders, greedy_without_end
from .costs import ModelCost, cost_of_model
from .counting import Passes, count_passes
from .curve import CostCurve, break_even, measure_curve
from .machine import Machine, PeakMemory, available_memory, describe_machine, watch_memory
from .memory import both_models, explain_out_of_memory, one_model, who_ran
from .options import BenchOptions, check_cache, check_context
from .prompts import Batch, make_batches
from .results import BenchReport, Measurement, Spread, compare

__all__ = ["Bench"]

Progress = Callable[[str], None]


@dataclass
class Observed:
    """One contender: what an untimed run of it has shown, and the times of the others."""

    contender: Contender
    passes: Passes
    memory: PeakMemory
    llm_share: float | None
    # Two lists could differ in length when Ctrl-C comes between them.
    times: list[tuple[float, float]] = field(default_factory=list)
    failed: bool = False


class Bench:
    """One comparison of a pair with everything else that writes the same number of tokens."""

    def __init__(self, model: Any, options: BenchOptions, name: str, available: int | None = None):
        # What the pair cannot do is said before the LLM alone has spent minutes on it.
        check_cache_implementation(options.cache_implementation)
        self.model, self.options, self.name = model, options, name
        device = model.slm.device
        check_cache(options.cache_implementation, device)
        tokenizer = None if options.prompts is None else model.load_tokenizer()
        batches = make_batches(
            options.prompts, tokenizer, model.vocab_size, options.prompt_length, options.batch_size, options.seed
        )
        self.context = model.config.max_position_embeddings
        check_context(self.context, [batch.length for batch in batches], options.max_new_tokens)
        self.batches = [
            Batch(batch.input_ids.to(device), batch.attention_mask.to(device), batch.padded) for batch in batches
        ]
        self.clock = Clock(device)
        self.available = available_memory(device) if available is None else available
        self.decisions = Decisions()
        self.contenders = contenders(model, options, self.decisions)
        self.interrupted = False
        self.error: Exception | None = None
        self.machine: Machine | None = None
        self.curve: CostCurve | None = None
        self.costs: dict[str, ModelCost] = {}
        self.observed: list[Observed] = []
        self.notes: list[str] = []

    @property
    def steps(self) -> int:
        """How often `run` reports progress."""
        return 2 + len(self.contenders) * (1 + self.options.warmup + self.options.repeats)

    def run(self, progress: Progress = lambda what: None) -> BenchReport:
        """Measure everything, or as much as there is time for until Ctrl-C or an error."""
        try:
            with greedy_without_end(self.model):
                self._run(progress)
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:
            self.error = error
        return self.report()

    def _run(self, progress: Progress) -> None:
        progress("memory bandwidth")
        self.costs = {name: cost_of_model(getattr(self.model, name)) for name in ("slm", "llm")}
        self.machine = describe_machine(self.model.slm.device)
        # Assisted generation imports modules for good: if it came before others, 100 MB would seem to be theirs.
        for contender in sorted(self.contenders, key=lambda one: one.kind == ASSISTED):
            progress(contender.name)
            self._observe(contender)
        self.observed.sort(key=lambda observed: self.contenders.index(observed.contender))
        progress("cost of a step")
        self._measure_curve()
        for repetition in range(-self.options.warmup, self.options.repeats):
            for observed in self.observed:
                progress(observed.contender.name)
                if not observed.failed:
                    self._repeat(observed, counts=repetition >= 0)

    def _observe(self, contender: Contender) -> None:
        """Run a contender once without the clock, and note what would cost time to note."""
        by_llm = tokens = 0
        try:
            with (
                self._explained(contender),
                count_passes(self.model) as passes,
                watch_memory(self.model.slm.device) as memory,
            ):
                for number, batch in enumerate(self.batches):
                    text = contender.decode(batch, number, False)
                    self.decisions.note(contender, number, text)
                    tokens += text.tokens.numel()
                    by_llm += 0 if text.to_llm is None else int(text.to_llm.sum())
        except Exception as error:
            if contender.required:
                raise
            self.notes.append(f"{contender.name} was not measured: {in_one_line(error)}")
            return
        share = {ALONE: 1.0, SLM: 0.0}.get(contender.kind)
        if text.to_llm is not None:
            share = by_llm / tokens
        self.observed.append(Observed(contender, passes, memory, share))

    def _repeat(self, observed: Observed, counts: bool) -> None:
        """Time one repetition."""
        try:
            times = self._time(observed.contender)
        except Exception as error:
            if observed.contender.required:
                raise
            observed.failed = True
            self.notes.append(f"{observed.contender.name} was not measured to the end: {in_one_line(error)}")
            return
        if counts:
            observed.times.append(times)

    def _measure_curve(self) -> None:
        length = self.batches[0].length
        room = None if self.context is None else self.context - length
        rows = self.options.batch_size
        with self._explained(None):
            self.curve = measure_curve(self.model, length, rows, self.options.seed, room)
        if self.options.static:
            self.notes.append("Single passes, and so the break-even, were timed without compilation.")

    def _time(self, contender: Contender) -> tuple[float, float]:
        """Return the seconds of one repetition, and those to the first token, mean of the batches."""
        seconds = first = 0.0
        with self._explained(contender):
            for number, batch in enumerate(self.batches):
                seconds += self.clock.seconds(lambda n=number, b=batch: contender.decode(b, n, False))  # type: ignore[misc]
                first += self.clock.seconds(lambda n=number, b=batch: contender.decode(b, n, True))  # type: ignore[misc]
        return seconds, first / len(self.batches)

    def _explained(self, contender: Contender | None) -> Any:
        def describe(error: Exception) -> str:
            longest = max(batch.length for batch in self.batches)
            tokens = self.options.batch_size * (longest + self.options.max_new_tokens)
            name = who_ran(error, self.model.slm, self.model.llm)
            if name is None and contender is not None and contender.kind in (ALONE, SLM):
                name = contender.kind.split()[0]
            if name is not None:
                return one_model(name, getattr(self.model, name.lower()), tokens)
            return both_models(self.model.slm, self.model.llm, tokens)

        return explain_out_of_memory(str(self.model.slm.device), self.available, describe)

    def report(self) -> BenchReport:
        """Return what has been measured so far."""
        rows = compare([self._measurement(observed) for observed in self.observed])
        dtypes = {name: str(getattr(self.model, name).dtype).split(".")[1] for name in ("slm", "llm")}
        return BenchReport(
            model=self.name,
            options=self.options.as_dict()
            | {"prompt_length": [batch.length for batch in self.batches], "dtype": dtypes},
            machine=self.machine,
            rows=tuple(rows),
            curve=self.curve,
            break_even=None if self.curve is None else break_even(self.curve),
            notes=tuple(self.notes),
            interrupted=self.interrupted,
            error=None if self.error is None else in_one_line(self.error),
        )

    def _measurement(self, observed: Observed) -> Measurement:
        assert self.machine is not None
        contender = observed.contender
        seconds, first = ([times[which] for times in observed.times] for which in range(2))
        positions = len(self.batches) * self.options.max_new_tokens
        moved = observed.passes.bytes_moved(self.costs["slm"], self.costs["llm"])
        setting = contender.setting
        return Measurement(
            name=contender.name,
            kind=contender.kind,
            share=None if setting is None else setting.share,
            threshold=None if setting is None else setting.threshold,
            seconds=tuple(seconds),
            tokens=positions * self.options.batch_size,
            positions=positions,
            first_token_seconds=Spread.of(first) if first else None,
            llm_share=observed.llm_share,
            llm_passes_per_position=len(observed.passes.llm) / positions,
            slm_passes_per_position=len(observed.passes.slm) / positions,
            peak_memory_bytes=observed.memory.peak,
            memory_growth_bytes=observed.memory.peak - observed.memory.before,
            bytes_moved=round(moved),
            bandwidth_fraction=(
                moved / statistics.median(seconds) / self.machine.memory_bandwidth if seconds else None
            ),
        )


def in_one_line(error: Exception) -> str:
    """Say what went wrong; the kind of an error that nobody has written for a user is said too."""
    text = " ".join(str(error).split())
    return (
        text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}".rstrip(": ")
    )
