"""Texts of all problems, written and judged in batches that processes divide among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from citer_hf import CiterForCausalLM
from citer_hf.runs import wait_for_all

from ..data.checkers import Grader
from .decoding import Alone, batches, decode
from .progress import Steps
from .scoring import check_scores
from .store import Store

__all__ = ["Texts", "Way", "Writer", "deal"]


@dataclass(frozen=True)
class Way:
    """One way to write texts."""

    key: str
    title: str
    model: CiterForCausalLM
    router: str = ""
    threshold: float | None = None
    alone: Alone | None = None


@dataclass(frozen=True)
class Texts:
    """A text for every problem, and what became of it."""

    tokens: list[list[int]]
    to_llm: list[list[bool]]
    correct: list[bool]
    extracted: list[bool]
    seconds: float


@dataclass(frozen=True)
class Writer:
    """Writes and judges texts, a batch at a time; every batch is remembered as soon as it is done."""

    prompts: Sequence[Sequence[int]]
    grader: Grader
    store: Store
    steps: Steps
    sizes: dict[str, int]
    limit: int | None
    process: int
    processes: int

    @property
    def _batches(self) -> list[list[int]]:
        lengths = [len(prompt) for prompt in self.prompts]
        return [rows for rows, _ in batches(lengths, limit=self.limit, **self.sizes)]

    def write(self, ways: Sequence[Way]) -> list[Texts]:
        """Write this process's part of the texts of several ways, and wait for the others'."""
        units = [(way, number, rows) for way in ways for number, rows in enumerate(self._batches)]
        units.sort(key=lambda unit: -len(unit[2]))
        mine = deal(units, self.processes)[self.process]
        for way, number, rows in mine:
            self.steps.name(way.title)
            self._write_batch(way, number, rows)
        if self.processes > 1:
            wait_for_all()
        return [self._texts(way) for way in ways]

    def _write_batch(self, way: Way, number: int, rows: list[int]) -> None:
        key = f"{way.key}-{number}"
        if self.store.holds(key):
            self.steps.skip(len(rows))
            return

        def compute() -> dict[str, Any]:
            options: dict[str, Any] = {"alone": way.alone, "router_threshold": way.threshold, **self.sizes}
            prompts = [self.prompts[row] for row in rows]
            decoded = decode(way.model, prompts, progress=self.steps.advance, **options)
            if way.alone is None:
                check_scores(way.router, np.concatenate([np.asarray(scores) for scores in decoded.scores]))
            verdicts = self.grader.grade(decoded.tokens, rows)
            return {
                "tokens": decoded.tokens,
                "to_llm": decoded.to_llm,
                "correct": [verdict.correct for verdict in verdicts],
                "extracted": [verdict.extracted is not None for verdict in verdicts],
                "seconds": decoded.seconds,
            }

        self.store.remember(key, compute)

    def _texts(self, way: Way) -> Texts:
        found: dict[str, list[Any]] = {
            name: [None] * len(self.prompts) for name in ("tokens", "to_llm", "correct", "extracted")
        }
        seconds = 0.0
        for number, rows in enumerate(self._batches):
            batch = self.store.recall(f"{way.key}-{number}")
            seconds += batch["seconds"]
            for name, values in found.items():
                for row, value in zip(rows, batch[name], strict=True):
                    values[row] = value
        return Texts(**found, seconds=seconds)


def deal(units: Sequence[Any], processes: int) -> list[list[Any]]:
    """Divide units among processes, there and back, so that nobody always gets the first of what costs alike."""
    hands: list[list[Any]] = [[] for _ in range(processes)]
    for start in range(0, len(units), processes):
        for hand, unit in zip(hands, units[start : start + processes], strict=False):
            hand.append(unit)
        hands.reverse()
    return hands if (len(units) + processes - 1) // processes % 2 == 0 else hands[::-1]
