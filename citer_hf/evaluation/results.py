"""The results of an evaluation, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from citer_hf.runs import atomic_write, read_json

from .points import Point
from .summary import Comparison, average_curves, compare, summarize

__all__ = ["SHARES", "Results", "average_results", "make_results"]

# Where the points of a curve are wanted: close to each other where curves bend.
SHARES = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True)
class Results:
    """Accuracy and cost of several methods on the same problems."""

    ends: dict[str, Point]
    methods: dict[str, list[Point]]
    summary: dict[str, dict[str, Any]]
    provenance: dict[str, Any]
    shipped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return ({} if self.shipped is None else {"shipped": self.shipped}) | {
            "ends": {name: point.as_dict() for name, point in self.ends.items()},
            "methods": {name: [point.as_dict() for point in points] for name, points in self.methods.items()},
            "summary": self.summary,
            "provenance": self.provenance,
        }

    def write(self, path: Path) -> None:
        """Write `results.json`, whole or not at all."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.as_dict(), indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote."""
        values = read_json(path)
        try:
            ends = {name: Point.from_dict(point) for name, point in values["ends"].items()}
            methods = {name: [Point.from_dict(one) for one in points] for name, points in values["methods"].items()}
            return cls(ends, methods, values["summary"], values["provenance"], values.get("shipped"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name}: it holds no results of an evaluation ({error!r}).") from error

    def compare(self, name: str, other: str) -> Comparison:
        """Compare two methods; see `summary.compare`."""
        return compare(self.ends, self.methods[name], self.methods[other])


def make_results(
    ends: Mapping[str, Point], methods: Mapping[str, Sequence[Point]], provenance: Mapping[str, Any]
) -> Results:
    """Put points in order and add the summary."""
    ordered = {name: sorted(points, key=lambda point: point.llm_share) for name, points in methods.items()}
    summary = {name: summarize(ends, points) for name, points in ordered.items()}
    return Results(dict(ends), ordered, summary, dict(provenance))


def average_results(runs: Sequence[Results], shares: Sequence[float] = SHARES) -> Results:
    """Return the mean curves of runs on the same problems with routers of several seeds."""
    first = runs[0]
    for run in runs[1:]:
        if any(run.ends[end].accuracy != first.ends[end].accuracy for end in first.ends):
            raise ValueError("runs: the models alone differ in accuracy, so that these are not the same problems.")
    names = dict.fromkeys(name for run in runs for name in run.methods)
    having = {name: [run for run in runs if name in run.methods] for name in names}
    methods = {
        name: average_curves(first.ends, [run.methods[name] for run in some], shares) for name, some in having.items()
    }
    summaries = {name: [run.summary[name] for run in some] for name, some in having.items()}
    common = {name: first.provenance.get(name) for name in ("problems", "model")}
    provenance = {**common, "runs": [run.provenance for run in runs], "summaries": summaries}
    return make_results(first.ends, methods, provenance)
