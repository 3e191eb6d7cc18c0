"""The mean of evaluations with routers of several seeds: `python docs/benchmarks/average.py DIR ... --out DIR`.

Prints how the shipped method compares with the others at equal accuracy and at equal cost.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from citer_hf.evaluation.report import write_report
from citer_hf.evaluation.results import Results, average_results


def main() -> None:
    """Average, write and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, help="made by `citer evaluate` on the same problems")
    parser.add_argument("--shipped", default="citer-plus", help="the method that ships")
    parser.add_argument("--name", help="what to call the pair")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [Results.read(directory / "results.json") for directory in options.evaluations]
    shares = sorted({round(share, 3) for run in runs for share in run.provenance["shares"]})
    results = replace(average_results(runs, shares), shipped=options.shipped)
    if options.name is not None:
        results.provenance["model"] = {**results.provenance["model"], "name": options.name}
    options.out.mkdir(parents=True, exist_ok=True)
    write_report(results, options.out)
    for other in results.methods:
        if other == options.shipped:
            continue
        print(f"{options.shipped} against {other}:")
        for number, run in enumerate([results, *runs]):
            if other in run.methods:
                found = run.compare(options.shipped, other)
                print(f"  {'mean' if number == 0 else f'seed {number - 1}'}: {found}")


if __name__ == "__main__":
    main()
