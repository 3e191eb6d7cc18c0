"""`evaluate`: accuracy and cost of both models alone, and of routers at many thresholds, on the same problems."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from citer_hf import runs
from citer_hf.data.checkers import Checker, Verdict, get_checker
from citer_hf.data.examples import Example
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, UNTRAINED, as_threshold, defer

from .decode import (
    BATCH_TOKENS,
    Alone,
    batches,
    check_scores,
    check_sizes,
    decode,
    encode_prompts,
    score_outputs,
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
class EvaluateOptions:
    """Options of `citer evaluate`."""

    shares: tuple[float, ...] = runs.option(SHARES, "LLM shares at which points are wanted.", "P,...")
    thresholds: tuple[float, ...] = runs.option((), "Thresholds of the pair's own router instead.", "X,...")
    max_new_tokens: int = runs.option(512, "Longest output, in tokens.", "N", min=1)
    batch_tokens: int = runs.option(BATCH_TOKENS, "Tokens in a batch, padding included.", "N", min=1)
    seed: int = runs.option(0, "Seed of the bootstrap.", "N")

    def __post_init__(self) -> None:
        check_sizes(self.max_new_tokens, self.batch_tokens)
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(f"shares: expected shares of LLM tokens above 0 and below 1, got {share!r}.")
        # From Python, thresholds may also be given by method.
        given = self.thresholds.values() if isinstance(self.thresholds, Mapping) else [self.thresholds]
        for value in (value for values in given for value in values):
            as_threshold(value)


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
    results.

    Under `accelerate launch` with an `out` that all processes see, the processes divide the batches; each of them
    calls this. The results are the same for any number of processes; `seconds` are added up over them.

    Args:
        model: The pair.
        examples: The problems, each with an answer.
        checker: The checker that judges the outputs, or its name; see `docs/data.md`.
        routers: The routers by the names of their methods, moved to where the SLM is. Default: the pair's own.
        query_level: Names of routers that decide once per prompt, by their score after its last token (RouteLLM's
            setting). Their outputs are those of the models alone.
        out: Directory for `results.json`, `results.md` and `curve.png`; `out/.work` holds what is done until then.
        tokenizer: Default: the pair's.
        options: The fields of `EvaluateOptions`: `shares` (LLM shares at which points are wanted; thresholds are
            quantiles of a router's scores along the LLM's own outputs, so that the share that results may differ),
            `thresholds` (of the pair's own router, or by method, instead), `max_new_tokens` (512), `batch_tokens`
            (prompt and new tokens of all sequences of a batch) and `seed` (of the bootstrap).

    Returns:
        The results: points of every method, their figures and the provenance.

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
    thresholds = _thresholds_by_method(settings.thresholds, routers, model)
    provenance = runs.provenance(model, settings) | {
        "problems": len(examples),
        "checker": grader.name,
        "data_sha256": runs.sha256_of(
            [[asdict(example), prompt] for example, prompt in zip(examples, prompts, strict=True)]
        ),
        "routers_sha256": {name: runs.router_sha256(router) for name, router in routers.items()},
        "query_level": sorted(set(query_level) & set(routers)),
        "dtypes": [str(part.dtype).removeprefix("torch.") for part in (model.slm, model.llm)],
    }
    arguments = _arguments(provenance)
    out = None if out is None else Path(out)
    if out is not None and (out / RESULTS).is_file():
        finished = Results.read(out / RESULTS)
        runs.check_arguments(out, _arguments(finished.provenance), arguments)
        return finished

    work = runs.Work(out, arguments)
    with runs.progress_bar(shown=work.process == 0) as progress:
        run = _Evaluation(model, prompts, grader, settings, work, progress)
        ends = run.ends()
        per_token = {name: router for name, router in routers.items() if name not in query_level}
        sweeps = run.sweeps(per_token, ends["llm"], thresholds)
        outputs = run.outputs(per_token, sweeps)
    if out is not None and work.process > 0:
        work.finish()
        return Results.read(out / RESULTS)
    methods = {
        name: run.points(router, outputs[name], sweeps[name])
        if name in per_token
        else run.query_points(name, router, ends, thresholds.get(name))
        for name, router in routers.items()
    }
    points = {name: run.end_point(name, outputs_of_end) for name, outputs_of_end in ends.items()}
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
    if model.router_is_untrained:
        return UNTRAINED
    kind = model.config.router["type"]
    return METHODS.get(kind, kind)


def _thresholds_by_method(given: Any, routers: Mapping[str, nn.Module], model: CiterForCausalLM) -> dict[str, list]:
    if not isinstance(given, Mapping):
        own = [name for name, router in routers.items() if router is model.router]
        if given and not own:
            raise ValueError("thresholds: they are for the pair's own router, which is not among routers.")
        given = {name: given for name in own if given}
    unknown = sorted(set(given) - set(routers))
    if unknown:
        raise ValueError(f"thresholds: there is no router named {unknown[0]!r}; expected some of {sorted(routers)}.")
    return {name: sorted(set(values)) for name, values in given.items()}


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
        self._known: dict[tuple[int, tuple[int, ...]], Verdict] = {}

    def grade(self, outputs: Sequence[Sequence[int]], places: Sequence[int] | None = None) -> list[Verdict]:
        """Judge an output of every problem, or of those at some places."""
        places = range(len(outputs)) if places is None else places
        keys = [(place, tuple(output)) for place, output in zip(places, outputs, strict=True)]
        for place, output in (key for key in keys if key not in self._known):
            response = self.tokenizer.decode(list(output), skip_special_tokens=True)
            self._known[place, output] = judge(self.checker, response, self.examples[place], self.name)
        return [self._known[key] for key in keys]


# What a user's checker may raise on a response that it did not expect.
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
            "characters. A checker must judge any response, also one without an answer. Mend it and run the same "
            "again: finished work is kept in the output directory."
        ) from error
    if not isinstance(verdict, Verdict):
        raise TypeError(f"checker {name}: expected it to return a Verdict, got {type(verdict).__name__} {where}.")
    return verdict


def name_of(checker: Checker) -> str:
    """Return the name by which a checker can be found: its module and its function or class."""
    named: Any = checker if hasattr(checker, "__qualname__") else type(checker)
    return f"{named.__module__}:{named.__qualname__}"


# --- One evaluation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """An output for every problem, and the checker's verdict on it."""

    tokens: list[list[int]]
    to_llm: list[list[bool]]
    correct: list[bool]
    extracted: list[bool]
    seconds: float


PER_PROBLEM = ("tokens", "to_llm", "correct", "extracted")
# A way to decode all problems: a pair, the name of its router, and a threshold or one of the models alone.
Way = tuple[CiterForCausalLM, str, float | None, Alone | None]


class _Evaluation:
    def __init__(
        self,
        model: CiterForCausalLM,
        prompts: list[list[int]],
        grader: Grader,
        options: EvaluateOptions,
        work: runs.Work,
        progress: runs.Progress,
    ):
        self.model, self.prompts, self.grader, self.options = model, prompts, grader, options
        self.work, self.progress, self.costs = work, progress, PairCosts(model)
        self.lengths = [len(prompt) for prompt in prompts]
        limit, new_tokens = model.config.max_position_embeddings, options.max_new_tokens
        # Every way decodes the same batches, in any number of processes.
        self.batches = [places for places, _ in batches(self.lengths, new_tokens, limit, options.batch_tokens)]
        self.order = np.argsort(np.concatenate(self.batches)).tolist()

    def decode(self, description: str, ways: Sequence[Way]) -> list[_Outputs]:
        """Decode all problems in several ways; the processes divide the batches."""
        units = [(way, places) for way in ways for places in self.batches]
        self.progress.begin(description, math.ceil(len(units) / self.work.processes))
        done = self.work.run(description, units, self._decode_batch, self.progress)
        size = len(self.batches)
        return [self._joined(done[start : start + size]) for start in range(0, len(done), size)]

    def _decode_batch(self, unit: tuple[Way, list[int]]) -> dict[str, Any]:
        (model, router, threshold, alone), places = unit
        decoded = decode(
            model,
            [self.prompts[place] for place in places],
            router_threshold=threshold,
            alone=alone,
            max_new_tokens=self.options.max_new_tokens,
            batch_tokens=self.options.batch_tokens,
        )
        if alone is None:
            check_scores(router, np.concatenate([np.asarray(scores) for scores in decoded.scores]))
        verdicts = self.grader.grade(decoded.tokens, places)
        return {
            "tokens": decoded.tokens,
            "to_llm": decoded.to_llm,
            "correct": [bool(verdict.correct) for verdict in verdicts],
            "extracted": [verdict.extracted is not None for verdict in verdicts],
            "seconds": decoded.seconds,
        }

    def _joined(self, parts: Sequence[Mapping[str, Any]]) -> _Outputs:
        """Put the outputs of all batches into the order of the problems."""
        joined = {name: [value for part in parts for value in part[name]] for name in PER_PROBLEM}
        ordered = {name: [values[index] for index in self.order] for name, values in joined.items()}
        return _Outputs(**ordered, seconds=sum(part["seconds"] for part in parts))

    def ends(self) -> dict[str, _Outputs]:
        """Decode with each model alone."""
        names: tuple[Alone, ...] = ("slm", "llm")
        # Every model runs once before, so that the first point does not pay for what happens only once.
        for alone in (*names, None):
            decode(self.model, self.prompts[:2], max_new_tokens=2, alone=alone, router_threshold=0.5)
        ways: list[Way] = [(self.model, "", None, name) for name in names]
        return dict(zip(names, self.decode("models alone", ways), strict=True))

    def sweeps(
        self, routers: Mapping[str, nn.Module], llm: _Outputs, given: Mapping[str, list[float]]
    ) -> dict[str, list[float]]:
        """Return the thresholds of each router: given ones, or quantiles of its scores along the LLM's outputs."""

        def compute() -> dict[str, list[float]]:
            scores = score_outputs(self.model, unknown, self.prompts, llm.tokens, self.options.batch_tokens)
            return {name: spread_thresholds(np.concatenate(one), self.options.shares) for name, one in scores.items()}

        unknown = {name: router for name, router in routers.items() if name not in given}
        self.progress.begin("scores", None)
        found = self.work.once("scores", compute) if unknown else {}
        return {name: found[name] if name in found else given[name] for name in routers}

    def outputs(
        self, routers: Mapping[str, nn.Module], sweeps: Mapping[str, Sequence[float]]
    ) -> dict[str, list[_Outputs]]:
        """Decode with every router at each of its thresholds."""
        pairs = {name: with_router(self.model, router) for name, router in routers.items()}
        ways: list[Way] = [(pairs[name], name, threshold, None) for name in routers for threshold in sweeps[name]]
        done = iter(self.decode("routers at thresholds", ways))
        return {name: [next(done) for _ in sweeps[name]] for name in routers}

    def end_point(self, name: str, outputs: _Outputs) -> Point:
        """Return the point of a model alone."""
        by_llm = name == "llm"
        lengths = map(len, outputs.tokens)
        costs = [self.costs.alone(by_llm, *sizes) for sizes in zip(self.lengths, lengths, strict=True)]
        return self._point(LLM_ALONE if by_llm else SLM_ALONE, outputs, costs)

    def points(self, router: nn.Module, outputs: Sequence[_Outputs], thresholds: Sequence[float]) -> list[Point]:
        """Return the points of a router at its thresholds."""
        scoring, points = scoring_cost(router), []
        for threshold, one in zip(thresholds, outputs, strict=True):
            costs = [self.costs.routed(scoring, *sizes) for sizes in zip(self.lengths, one.to_llm, strict=True)]
            points.append(self._point(threshold, one, costs))
        return points

    def query_points(
        self, name: str, router: nn.Module, ends: Mapping[str, _Outputs], given: list[float] | None
    ) -> list[Point]:
        """Return the points of a router that decides once per prompt, from the outputs of both models alone."""
        began = time.perf_counter()
        first = [tokens[:1] for tokens in ends["llm"].tokens]
        found = score_outputs(self.model, {name: router}, self.prompts, first, self.options.batch_tokens)
        prefill = (time.perf_counter() - began) / len(self.prompts)
        scores, scoring = torch.from_numpy(np.concatenate(found[name])), scoring_cost(router)
        per_token = {end: one.seconds / sum(map(len, one.tokens)) for end, one in ends.items()}
        points = []
        for threshold in spread_thresholds(scores.numpy(), self.options.shares) if given is None else given:
            to_llm = defer(scores, threshold).tolist()
            chosen = ["llm" if by_llm else "slm" for by_llm in to_llm]
            of_chosen = {
                field: [getattr(ends[end], field)[place] for place, end in enumerate(chosen)] for field in PER_PROBLEM
            }
            sizes = [*zip(self.lengths, map(len, of_chosen["tokens"]), to_llm, strict=True)]
            seconds = sum(per_token[end] * tokens for end, (_, tokens, _) in zip(chosen, sizes, strict=True))
            outputs = _Outputs(**of_chosen, seconds=seconds + prefill * sum(to_llm))
            points.append(
                self._point(threshold, outputs, [self.costs.routed_by_query(scoring, *size) for size in sizes])
            )
        return points

    def _point(self, threshold: float, outputs: _Outputs, costs: Sequence[np.ndarray]) -> Point:
        """Add up the outputs and costs of all problems."""
        tokens, problems = sum(map(len, outputs.tokens)), len(self.prompts)
        moved, operations, passes = (np.sum(costs, axis=0) / tokens).tolist()
        return Point(
            threshold=threshold,
            accuracy=sum(outputs.correct) / problems,
            accuracy_ci=bootstrap_interval(outputs.correct, seed=self.options.seed),
            llm_share=sum(map(sum, outputs.to_llm)) / tokens,
            llm_calls=passes,
            bytes=moved,
            flops=operations,
            seconds=outputs.seconds / tokens,
            extracted=sum(outputs.extracted) / problems,
        )
