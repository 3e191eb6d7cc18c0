"""What was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .contenders import ALONE, CITER, FLOOR, LOCK_STEP, RELEASED
from .curve import BreakEven, CostCurve
from .machine import Machine

__all__ = ["BenchReport", "Measurement", "Spread", "compare"]


@dataclass(frozen=True)
class Spread:
    """The median of some repetitions, between the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measurement:
    """One row of the table. A position is a place in the text where every row of the batch gets a token."""

    name: str
    kind: str
    share: float | None
    threshold: float | None
    seconds: tuple[float, ...]
    tokens: int
    positions: int
    first_token_seconds: Spread | None
    llm_share: float | None
    llm_passes_per_position: float
    slm_passes_per_position: float
    peak_memory_bytes: int
    memory_growth_bytes: int
    bytes_moved: int
    bandwidth_fraction: float | None
    speedup: Spread | None = None
    relative_to_floor: Spread | None = None

    @property
    def tokens_per_second(self) -> Spread | None:
        """Tokens of all rows, over the time that they took together."""
        return Spread.of([self.tokens / seconds for seconds in self.seconds]) if self.seconds else None

    @property
    def ms_per_token(self) -> Spread | None:
        """Milliseconds per position."""
        return Spread.of([seconds / self.positions * 1000 for seconds in self.seconds]) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        derived = {"tokens_per_second": self.tokens_per_second, "ms_per_token": self.ms_per_token}
        return asdict(self) | {name: None if value is None else asdict(value) for name, value in derived.items()}


def compare(measured: Sequence[Measurement]) -> list[Measurement]:
    """Add what one contender is to another: the speed-up over the LLM alone, and the time relative to the floor."""
    llm = next((one for one in measured if one.kind == ALONE), None)
    floors = {(one.share, one.threshold): one for one in measured if one.kind == FLOOR}
    compared = []
    for one in measured:
        floor = floors.get((one.share, one.threshold)) if one.kind in (CITER, LOCK_STEP, RELEASED) else None
        compared.append(
            replace(
                one,
                speedup=None if llm is None else ratios(llm.seconds, one.seconds),
                relative_to_floor=None if floor is None else ratios(one.seconds, floor.seconds),
            )
        )
    return compared


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread | None:
    """Divide repetition by repetition: what slows the machine down for a while slows neighbours down alike."""
    found = [one / other for one, other in zip(above, below, strict=False)]
    return Spread.of(found) if found else None


@dataclass(frozen=True)
class BenchReport:
    """Everything that one run of the bench has found out."""

    model: str
    options: dict[str, Any]
    machine: Machine | None = None
    rows: tuple[Measurement, ...] = ()
    curve: CostCurve | None = None
    break_even: BreakEven | None = None
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether everything was measured."""
        return not self.interrupted and self.error is None

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return {
            "model": self.model,
            "complete": self.complete,
            "interrupted": self.interrupted,
            "error": self.error,
            "options": self.options,
            "machine": None if self.machine is None else self.machine.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "cost_curve": None if self.curve is None else self.curve.as_dict(),
            "break_even_llm_share": None if self.break_even is None else self.break_even.share,
            "break_even_reason": None if self.break_even is None else self.break_even.reason or None,
            "notes": list(self.notes),
        }
