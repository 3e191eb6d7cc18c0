"""`evaluate`: accuracy and cost of both models alone, and of routers at many thresholds, on the same problems."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from citer_hf import runs
from citer_hf.data.checkers import Checker, Verdict, get_checker
from citer_hf.data.examples import Example
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, UNTRAINED, as_threshold, defer

from .decode import (
    Alone,
    DecodeOptions,
    batches,
    decode,
    encode_prompts,
    score_outputs,
    scores_of,
    spread_thresholds,
    with_router,
)
from .plot import draw
from .results import PairCosts, Point, Results, bootstrap_interval, make_results, scoring_cost

# LLM shares at which points are wanted: close to each other where curves bend.
SHARES = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
# The methods of routers whose kind does not name one.
METHODS = {"mlp": "citer", "linear": "co-llm"}
RESULTS = "results.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions(DecodeOptions):
    """Options of `citer evaluate`."""

    shares: tuple[float, ...] = runs.option(SHARES, "LLM shares at which points are wanted.", "P,...")
    thresholds: tuple[float, ...] = runs.option((), "Thresholds of the pair's own router instead.", "X,...")

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(f"shares: expected shares of LLM tokens above 0 and below 1, got {share!r}.")
        for value in (value for values in self._given().values() for value in values):
            as_threshold(value)

    def _given(self, own: Collection[str] = ("",)) -> dict[str, tuple[float, ...]]:
        # Python code may also give thresholds by method.
        given: Any = self.thresholds
        return dict(given) if isinstance(given, Mapping) else dict.fromkeys(own, given)

    def thresholds_of(self, routers: Mapping[str, nn.Module], own: nn.Module) -> dict[str, list[float]]:
        """Return the given thresholds by method; `own` is the pair's own router."""
        given = self._given([name for name, router in routers.items() if router is own])
        if set(given) - set(routers) or (self.thresholds and not given):
            names = sorted(set(given) - set(routers)) or ["the pair's own"]
            raise ValueError(f"thresholds: expected routers among {sorted(routers)}, got {names[0]!r}.")
        return {name: sorted(set(values)) for name, values in given.items() if values}


def evaluate(
    model: CiterForCausalLM,
    examples: Sequence[Example],
    checker: Checker | str,
    *,
    routers: Mapping[str, nn.Module] | None = None,
    query_level: Collection[str] = ("query",),
    out: str | Path | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Results:
    """Measure accuracy and cost of the SLM alone, the LLM alone, and routers at thresholds spread over LLM shares.

    All decode greedily, the same problems in the same batches. Costs are those of each output decoded alone. An
    interrupted run resumes when it is repeated with the same arguments and the same `out`; a complete one returns its
    results. Under `accelerate launch`, each process calls this with an `out` that all of them see. The results are the
    same for any number of processes; `seconds` are added up over them.

    Args:
        model: The pair.
        examples: The problems, each with an answer.
        checker: The checker that judges the outputs, or its name; see `docs/data.md`.
        routers: The routers by the names of their methods. Default: the pair's own.
        query_level: Names of routers that decide once per prompt, by their score after its last token (RouteLLM's
            setting). Their outputs are those of the models alone.
        out: Directory for `results.json`, `results.md` and `curve.png`; `out/.work` holds unfinished work.
        tokenizer: Default: the pair's.
        options: The fields of `EvaluateOptions`: `shares` (LLM shares at which points are wanted; thresholds are
            quantiles of a router's scores along the LLM's own outputs, so that resulting shares may differ),
            `thresholds` (of the pair's own router, or by method, instead), `max_new_tokens` (512), `batch_tokens`
            (prompt and new tokens of all sequences of a batch) and `seed` (of the bootstrap).

    Returns:
        The points of every method, their figures and the provenance.

    Raises:
        ValueError: for problems without answers, prompts that fill the context, options out of range, a router that
            gives NaN, a checker that raises, or an `out` of other arguments.
        ConnectionError: when another process has ended before its work was done.
        FileExistsError: when `out` holds anything else.
    """
    settings = EvaluateOptions(**options)
    tokenizer = tokenizer if tokenizer is not None else model.load_tokenizer()
    grader = Grader(checker, examples, tokenizer)
    prompts = encode_prompts(model, examples, tokenizer)
    routers = {method_name(model): model.router} if routers is None else routers
    routers = {name: router.to(model.slm.device) for name, router in routers.items()}
    thresholds = settings.thresholds_of(routers, model.router)
    data = [[asdict(example), prompt] for example, prompt in zip(examples, prompts, strict=True)]
    provenance = runs.provenance(model, settings) | {
        "problems": len(examples),
        "checker": grader.name,
        "data_sha256": runs.sha256_of(data),
        "routers_sha256": {name: runs.router_sha256(router) for name, router in routers.items()},
        "query_level": sorted(set(query_level) & set(routers)),
        "dtypes": [str(part.dtype).removeprefix("torch.") for part in (model.slm, model.llm)],
    }
    out = None if out is None else Path(out)
    if out is not None and (out / RESULTS).is_file():
        finished = Results.read(out / RESULTS)
        runs.check_arguments(out, _arguments(finished.provenance), _arguments(provenance))
        return finished

    work = runs.Work(out, _arguments(provenance))
    with runs.progress_bar(shown=work.process == 0) as progress:
        run = _Evaluation(model, prompts, grader, settings, work, progress, PairCosts(model))
        ends = run.ends()
        per_token = {name: router for name, router in routers.items() if name not in query_level}
        sweeps = run.sweeps(per_token, ends["llm"], thresholds)
        outputs = run.routed(per_token, sweeps)
    if out is not None and work.process > 0:
        work.finish()
        return Results.read(out / RESULTS)
    methods = {
        name: run.points(router, sweeps[name], outputs[name])
        if name in per_token
        else run.query_points(name, router, ends, thresholds.get(name))
        for name, router in routers.items()
    }
    points = {name: run.end_point(name, of_end) for name, of_end in ends.items()}
    results = make_results(points, methods, provenance | {"processes": work.processes})
    if out is not None:
        write_report(results, out)
    work.finish()
    return results


def write_report(results: Results, out: Path) -> None:
    """Write `results.md`, `curve.png` and, last, `results.json`."""
    with runs.atomic_write(out / "results.md") as file:
        file.write(results.markdown().encode())
    try:
        draw(results, out / "curve.png")
    except ImportError as error:
        logger.warning("curve.png is left out. %s", error)
    results.write(out / RESULTS)


def method_name(model: CiterForCausalLM) -> str:
    """Return the method of the pair's own router, as far as its kind names it."""
    kind = model.config.router["type"]
    return UNTRAINED if model.router_is_untrained else METHODS.get(kind, kind)


def _arguments(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what results depend on."""
    names = ("checker", "data_sha256", "routers_sha256", "query_level", "dtypes")
    models = {f"{role}_sha256": (provenance.get(role) or {}).get("sample_sha256") for role in ("slm", "llm")}
    return {**(provenance.get("options") or {}), **models, **{name: provenance.get(name) for name in names}}


# --- Which outputs are right ----------------------------------------------------------------------------------------


class Grader:
    """A checker that judges every output of every problem once."""

    def __init__(self, checker: Checker | str, examples: Sequence[Example], tokenizer: Any):
        if not examples:
            raise ValueError("examples: expected at least one, got none. Is the file empty?")
        for example in examples:
            if not example.answer:
                raise ValueError(
                    f"row {example.row}: it has no answer for the checker to compare with. Add the field, or name the "
                    "column that holds it (columns={'answer': 'COLUMN'}, --map answer=COLUMN)."
                )
        self.name = checker if isinstance(checker, str) else name_of(checker)
        self.checker = get_checker(checker) if isinstance(checker, str) else checker
        self.examples, self.tokenizer = examples, tokenizer
        self._judge = cache(self._judge_one)

    def _judge_one(self, place: int, output: tuple[int, ...]) -> Verdict:
        response = self.tokenizer.decode(list(output), skip_special_tokens=True)
        return judge(self.checker, response, self.examples[place], self.name)

    def grade(self, outputs: Sequence[Sequence[int]], places: Sequence[int] | None = None) -> list[Verdict]:
        """Judge an output of every problem, or of those at some places."""
        places = range(len(outputs)) if places is None else places
        return [self._judge(place, tuple(output)) for place, output in zip(places, outputs, strict=True)]


# The errors of a user's checker on a response that it did not expect.
CHECKER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError)


def judge(checker: Checker, response: str, example: Example, name: str | None = None) -> Verdict:
    """Return the verdict of a checker, which may be a user's own, on one response."""
    name = name_of(checker) if name is None else name
    where = f"at row {example.row} of the data ({example.id!r})"
    try:
        verdict = checker(response, example)
    except (*CHECKER_ERRORS, TypeError, ValueError) as error:
        raise ValueError(
            f"checker {name}: it raised {type(error).__name__} ({error}) {where}, with a response of {len(response)} "
            "characters. Make it judge any response, also one without an answer, and run the same again: finished "
            "work is kept in the output directory."
        ) from error
    if not isinstance(verdict, Verdict):
        raise TypeError(f"checker {name}: expected it to return a Verdict, got {type(verdict).__name__} {where}.")
    return verdict


def name_of(checker: Checker) -> str:
    """Return the name by which a checker can be found: its module and its function or class."""
    named: Any = checker if hasattr(checker, "__qualname__") else type(checker)
    return f"{named.__module__}:{named.__qualname__}"


# --- One evaluation -------------------------------------------------------------------------------------------------

# A way to decode all problems: a pair, the name of its router, and a threshold or one of the models alone.
Way = tuple[CiterForCausalLM, str, float | None, Alone | None]


class _Judged(NamedTuple):
    tokens: list[int]
    to_llm: list[bool]
    correct: bool
    extracted: bool
    seconds: float


@dataclass(frozen=True)
class _Evaluation:
    model: CiterForCausalLM
    prompts: list[list[int]]
    grader: Grader
    options: EvaluateOptions
    work: runs.Work
    progress: runs.Progress
    costs: PairCosts

    @property
    def sizes(self) -> dict[str, int]:
        return {"max_new_tokens": self.options.max_new_tokens, "batch_tokens": self.options.batch_tokens}

    def decode(self, description: str, ways: Sequence[Way]) -> list[list[_Judged]]:
        """Decode all problems in several ways; the processes divide the batches."""
        lengths, limit = [len(prompt) for prompt in self.prompts], self.model.config.max_position_embeddings
        # Every way decodes the same batches, in any number of processes.
        parts = [places for places, _ in batches(lengths, limit=limit, **self.sizes)]
        units = [(way, places) for way in ways for places in parts]
        self.progress.begin(description, math.ceil(len(units) / self.work.processes))
        done = iter(self.work.run(description, units, self._decode_batch, self.progress))
        order = np.argsort([place for places in parts for place in places])
        outputs = []
        for _ in ways:
            of_way = [_Judged(*output) for _ in parts for output in next(done)]
            outputs.append([of_way[index] for index in order])
        return outputs

    def _decode_batch(self, unit: tuple[Way, list[int]]) -> list[_Judged]:
        (model, router, threshold, alone), places = unit
        prompts = [self.prompts[place] for place in places]
        outputs = decode(model, prompts, router_threshold=threshold, alone=alone, **self.sizes)  # type: ignore[arg-type]
        if alone is None:
            scores_of(router, outputs)
        verdicts = self.grader.grade([one.tokens for one in outputs], places)
        return [
            _Judged(one.tokens, one.to_llm, bool(verdict.correct), verdict.extracted is not None, one.seconds)
            for one, verdict in zip(outputs, verdicts, strict=True)
        ]

    def ends(self) -> dict[str, list[_Judged]]:
        """Decode with each model alone."""
        names: tuple[Alone, ...] = ("slm", "llm")
        # Every model runs once before, so that the first point does not pay for what happens only once.
        for alone in (*names, None):
            decode(self.model, self.prompts[:2], max_new_tokens=2, alone=alone, router_threshold=0.5)
        ways: list[Way] = [(self.model, "", None, name) for name in names]
        return dict(zip(names, self.decode("models alone", ways), strict=True))

    def sweeps(
        self, routers: Mapping[str, nn.Module], llm: Sequence[_Judged], given: Mapping[str, list[float]]
    ) -> dict[str, list[float]]:
        """Return the thresholds of each router: given ones, or quantiles of its scores along the LLM's outputs."""

        def compute() -> dict[str, list[float]]:
            scores = score_outputs(self.model, unknown, self.prompts, [one.tokens for one in llm], batch_tokens)
            return {name: spread_thresholds(one, self.options.shares) for name, one in scores.items()}

        unknown, batch_tokens = (
            {name: routers[name] for name in routers if name not in given},
            self.options.batch_tokens,
        )
        self.progress.begin("scores", None)
        return {**(self.work.once("scores", compute) if unknown else {}), **given}

    def routed(
        self, routers: Mapping[str, nn.Module], sweeps: Mapping[str, Sequence[float]]
    ) -> dict[str, list[list[_Judged]]]:
        """Decode with every router at each of its thresholds."""
        pairs = {name: with_router(self.model, router) for name, router in routers.items()}
        ways: list[Way] = [(pairs[name], name, threshold, None) for name in routers for threshold in sweeps[name]]
        done = iter(self.decode("routers at thresholds", ways))
        return {name: [next(done) for _ in sweeps[name]] for name in routers}

    def end_point(self, name: str, outputs: Sequence[_Judged]) -> Point:
        """Return the point of a model alone."""
        by_llm = name == "llm"
        sizes = zip(self.prompts, outputs, strict=True)
        costs = [self.costs.alone(by_llm, len(prompt), len(output.tokens)) for prompt, output in sizes]
        return self._point(LLM_ALONE if by_llm else SLM_ALONE, outputs, costs)

    def points(self, router: nn.Module, thresholds: Sequence[float], done: Sequence[list[_Judged]]) -> list[Point]:
        """Return the points of a router at its thresholds."""
        scoring, points = scoring_cost(router), []
        for threshold, outputs in zip(thresholds, done, strict=True):
            sizes = zip(self.prompts, outputs, strict=True)
            costs = [self.costs.routed(scoring, len(prompt), output.to_llm) for prompt, output in sizes]
            points.append(self._point(threshold, outputs, costs))
        return points

    def query_points(
        self, name: str, router: nn.Module, ends: Mapping[str, list[_Judged]], given: list[float] | None
    ) -> list[Point]:
        """Return the points of a router that decides once per prompt, from the outputs of both models alone."""
        began = time.perf_counter()
        first = [output.tokens[:1] for output in ends["llm"]]
        scores = score_outputs(self.model, {name: router}, self.prompts, first, self.options.batch_tokens)[name]
        prefill = (time.perf_counter() - began) / len(self.prompts)
        scoring, points = scoring_cost(router), []
        for threshold in given or spread_thresholds(scores, self.options.shares):
            to_llm = defer(torch.from_numpy(scores), threshold).tolist()
            outputs = [ends["llm" if by_llm else "slm"][place] for place, by_llm in enumerate(to_llm)]
            sizes = zip(self.prompts, outputs, to_llm, strict=True)
            costs = [
                self.costs.routed_by_query(scoring, len(one), len(two.tokens), by_llm) for one, two, by_llm in sizes
            ]
            points.append(self._point(threshold, outputs, costs, prefill * sum(to_llm)))
        return points

    def _point(
        self, threshold: float, outputs: Sequence[_Judged], costs: Sequence[np.ndarray], seconds: float = 0.0
    ) -> Point:
        """Add up the outputs and costs of all problems."""
        tokens = sum(len(one.tokens) for one in outputs)
        moved, operations, passes = (np.sum(costs, axis=0) / tokens).tolist()
        correct = [one.correct for one in outputs]
        return Point(
            threshold=threshold,
            accuracy=sum(correct) / len(outputs),
            accuracy_ci=bootstrap_interval(correct, seed=self.options.seed),
            llm_share=sum(sum(one.to_llm) for one in outputs) / tokens,
            llm_calls=passes,
            bytes=moved,
            flops=operations,
            seconds=(sum(one.seconds for one in outputs) + seconds) / tokens,
            extracted=sum(one.extracted for one in outputs) / len(outputs),
        )
