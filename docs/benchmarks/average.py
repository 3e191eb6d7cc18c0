"""The mean of evaluations with routers of several seeds: `python docs/benchmarks/average.py DIR ... --out DIR`.

Prints how the shipped method compares with the others at equal accuracy and at equal cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from citer_hf.evaluation.evaluate import write_report
from citer_hf.evaluation.results import Cost, Point, Results, accuracy_at, cost_at, make_results

LEVELS = (0.90, 0.95, 0.98)


def average(runs: Sequence[Results], shares: Sequence[float]) -> Results:
    """Return the mean curves of runs on the same problems with routers of several seeds."""
    first = runs[0]
    if any(run.ends[end].accuracy != first.ends[end].accuracy for run in runs for end in first.ends):
        raise ValueError("runs: the models alone differ in accuracy, so that these are not the same problems.")
    names = dict.fromkeys(name for run in runs for name in run.methods)
    having = {name: [run for run in runs if name in run.methods] for name in names}
    methods = {
        name: average_curves(first.ends, [run.methods[name] for run in some], shares) for name, some in having.items()
    }
    # The averaged results are those of the first router: it is the one that is published.
    common = ("problems", "router_sha256", "router", "slm", "llm", "checker", "data_sha256")
    provenance = {name: first.provenance.get(name) for name in common} | {
        "runs": [run.provenance for run in runs],
        "summaries": {name: [run.summary[name] for run in some] for name, some in having.items()},
    }
    return make_results(first.ends, methods, provenance)


def average_curves(
    ends: Mapping[str, Point], curves: Sequence[Sequence[Point]], shares: Sequence[float]
) -> list[Point]:
    """Return the mean of several curves at the same LLM shares, on straight lines between their points."""

    def value(curve: Sequence[Point], share: float) -> np.ndarray:
        ordered = sorted([ends["slm"], *curve, ends["llm"]], key=lambda point: point.llm_share)
        places = [point.llm_share for point in ordered]
        return np.array([np.interp(share, places, column) for column in zip(*map(numbers, ordered), strict=True)])

    means = [np.mean([value(curve, share) for curve in curves], axis=0).tolist() for share in shares]
    return [Point(None, accuracy, (low, high), *others) for accuracy, low, high, *others in means]


def numbers(point: Point) -> list[float]:
    """Return accuracy, interval and costs of a point."""
    _, accuracy, interval, *others, _ = astuple(point)
    return [accuracy, *interval, *others]


def comparison(results: Results, name: str, other: str) -> str:
    """Return what a method saves against another at equal accuracy, and its largest lead at equal cost."""
    ends, own, others = results.ends, results.methods[name], results.methods[other]
    costs: tuple[Cost, ...] = ("llm_share", "bytes")

    def saving(level: float, cost: Cost) -> str:
        spent, needed = (cost_at(ends, points, level, cost) for points in (own, others))
        return "-" if spent is None or not needed else f"{1 - spent / needed:.1%}"

    def lead(cost: Cost) -> float:
        grid = np.linspace(getattr(ends["slm"], cost), getattr(ends["llm"], cost), 101)
        return max(accuracy_at(ends, own, value, cost) - accuracy_at(ends, others, value, cost) for value in grid)

    saved = [f"{' / '.join(saving(level, cost) for cost in costs)} at {level:.0%}" for level in LEVELS]
    leads = " / ".join(f"{100 * lead(cost):+.1f}" for cost in costs)
    return f"LLM tokens / bytes saved: {', '.join(saved)}; largest lead {leads} points"


def main() -> None:
    """Average, write and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, help="made by `citer evaluate` on the same problems")
    parser.add_argument("--shipped", default="citer-plus", help="the method that ships")
    parser.add_argument("--name", help="the name of the pair in the title of the plot")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [Results.read(directory / "results.json") for directory in options.evaluations]
    shares = sorted({round(share, 3) for run in runs for share in run.provenance["options"]["shares"]})
    results = average(runs, shares)
    if options.name is not None:
        results.provenance["router"] = {**(results.provenance["router"] or {}), "name": options.name}
    options.out.mkdir(parents=True, exist_ok=True)
    write_report(results, options.out)
    for other in results.methods:
        if other == options.shipped:
            continue
        print(f"{options.shipped} against {other}:")
        for number, run in enumerate([results, *runs]):
            if other in run.methods:
                print(
                    f"  {'mean' if number == 0 else f'seed {number - 1}'}: {comparison(run, options.shipped, other)}"
                )


if __name__ == "__main__":
    main()
