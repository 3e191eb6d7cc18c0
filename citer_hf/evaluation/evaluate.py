"""`evaluate`: accuracy and cost of both models alone, and of routers at many thresholds, on the same problems."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from citer_hf import runs
from citer_hf.costs import cost_of_model
from citer_hf.data.checkers import Checker, Verdict, answer_of, get_checker
from citer_hf.data.examples import Example
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, UNTRAINED, as_threshold, defer

from . import decode as decoding
from . import results as figures
from .decode import Alone, DecodeOptions, Output, with_router
from .plot import draw
from .results import Point, Results, alone_cost, bootstrap_interval

# LLM shares at which points are wanted: close to each other where curves bend.
SHARES = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
# The methods of routers whose kind does not name one.
METHODS = {"mlp": "citer", "linear": "co-llm"}
RESULTS = "results.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions(DecodeOptions):
    shares: tuple[float, ...] = runs.option(SHARES, "LLM shares at which points are wanted.", "P,...")
    thresholds: tuple[float, ...] = runs.option((), "Thresholds of the pair's own router instead.", "X,...")

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(f"shares: expected shares of LLM tokens above 0 and below 1, got {share!r}.")
        for threshold in self.thresholds:
            as_threshold(threshold)


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

    All decode greedily, the same problems in the same batches. Costs are those of each output decoded alone. The same
    call with the same `out` resumes an interrupted run, and returns the results of a complete one. Under `accelerate
    launch`, processes divide the work and need one `out` that all of them see.

    Args:
        model: The pair.
        examples: The problems, each with an answer.
        checker: The checker that judges the outputs, or its name; see `docs/data.md`.
        routers: The routers by the names of their methods. Default: the pair's own.
        query_level: Names of routers that decide once per prompt, by their score after its last token (RouteLLM's
            setting). Their outputs are those of the models alone.
        out: Directory for `results.json`, `results.md` and `curve.png`; `out/.work` holds unfinished work.
        tokenizer: Default: the pair's.
        options: The fields of `EvaluateOptions`. Thresholds for `shares` are quantiles of a router's scores along the
            LLM's own outputs, so that resulting shares may differ.

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
    prompts = decoding.encode_prompts(model, examples, tokenizer)
    routers = {method_name(model): model.router} if routers is None else routers
    if settings.thresholds and all(router is not model.router for router in routers.values()):
        raise ValueError(f"thresholds: they are those of the pair's own router, which is not among {sorted(routers)}.")
    routers = {name: router.to(model.slm.device) for name, router in routers.items()}
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

    with runs.work_in(out, _arguments(provenance)) as work:
        ends, methods = Evaluation(model, prompts, grader, settings, work).measure(routers, query_level, settings)
        results = figures.make_results(ends, methods, provenance | {"processes": work.processes})
        if out is not None and work.process == 0:
            write_report(results, out)
    return results


def write_report(results: Results, out: Path) -> None:
    """Write `results.md`, `curve.png` and, last, `results.json`."""
    with runs.atomic_write(out / "results.md") as file:
        file.write(f"{results.table()}\n".encode())
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


class Grader:
    """A checker that judges every output of every problem once."""

    def __init__(self, checker: Checker | str, examples: Sequence[Example], tokenizer: Any):
        self.name = checker if isinstance(checker, str) else name_of(checker)
        for example in examples:
            answer_of(self.name, example)
        self.checker = get_checker(checker) if isinstance(checker, str) else checker
        self.examples, self.tokenizer = examples, tokenizer
        self.grade = cache(self._grade)

    def _grade(self, place: int, output: tuple[int, ...]) -> Verdict:
        response = self.tokenizer.decode(list(output), skip_special_tokens=True)
        return judge(self.checker, response, self.examples[place])


# The errors of a user's checker on a response that it did not expect.
CHECKER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError)


def judge(checker: Checker, response: str, example: Example) -> Verdict:
    """Return the verdict of a checker, which may be a user's own, on one response."""
    name, where = name_of(checker), f"at row {example.row} of the data ({example.id!r})"
    try:
        verdict = checker(response, example)
    except (*CHECKER_ERRORS, TypeError, ValueError) as error:
        raise ValueError(
            f"checker {name}: it raised {type(error).__name__} ({error}) {where}. Make it judge any response, "
            "also one without an answer, and run the same again: finished work is kept in the output directory."
        ) from error
    if not isinstance(verdict, Verdict):
        raise TypeError(f"checker {name}: expected it to return a Verdict, got {type(verdict).__name__} {where}.")
    return verdict


def name_of(checker: Checker) -> str:
    """Return the name by which a checker can be found: its module and its function or class."""
    named: Any = checker if hasattr(checker, "__qualname__") else type(checker)
    return f"{named.__module__}:{named.__qualname__}"


# A way to decode all problems: a pair, and a threshold or one of its models alone.
Way = tuple[CiterForCausalLM, float | None, Alone | None]


@dataclass(frozen=True)
class Evaluation:
    """Decodes all problems in different ways and judges the outputs, where there is a grader."""

    model: CiterForCausalLM
    prompts: list[list[int]]
    grader: Grader | None
    options: DecodeOptions
    work: runs.Work

    def measure(
        self, routers: Mapping[str, nn.Module], per_query: Collection[str], options: EvaluateOptions
    ) -> tuple[dict[str, Point], dict[str, list[Point]]]:
        """Return the points of both models alone, and those of every router at its thresholds."""
        # 1. Both models alone. Each runs once before, so that no point pays for what happens only once.
        for alone in ("slm", "llm", None):
            decoding.decode(self.model, self.prompts[:2], max_new_tokens=2, alone=alone, router_threshold=0.5)
        by_slm, by_llm = self.decode("models alone", [(self.model, None, "slm"), (self.model, None, "llm")])

        # 2. Thresholds. A router that decides once per prompt looks at the scores after the prompts alone.
        def scores() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
            tokens = [one.tokens for one in by_llm]
            scores = decoding.score_outputs(self.model, routers, self.prompts, tokens, self.options.batch_tokens)
            first = {name: [float(one[0]) for one in scores[name]] for name in routers if name in per_query}
            along = {name: first[name] if name in first else np.concatenate(scores[name]) for name in routers}
            return first, {name: decoding.spread_thresholds(one, options.shares) for name, one in along.items()}

        first, thresholds = self.work.once("scores", scores)
        own = [name for name, router in routers.items() if router is self.model.router and options.thresholds]
        thresholds |= dict.fromkeys(own, sorted(set(options.thresholds)))
        # 3. The pair with every other router at each of its thresholds.
        pairs = {name: with_router(self.model, routers[name]) for name in routers if name not in per_query}
        ways: list[Way] = [(pairs[name], threshold, None) for name in pairs for threshold in thresholds[name]]
        routed = iter(self.decode("routers at thresholds", ways))
        # 4. Points.
        slm, llm = cost_of_model(self.model.slm), cost_of_model(self.model.llm)
        ends = {
            "slm": self.point(SLM_ALONE, by_slm, lambda prompt, to_llm: alone_cost(slm, prompt, len(to_llm))),
            "llm": self.point(LLM_ALONE, by_llm, lambda prompt, to_llm: alone_cost(llm, prompt, len(to_llm))),
        }
        methods: dict[str, list[Point]] = {name: [] for name in routers}
        for name, router in routers.items():
            cost_of = figures.query_cost if name in per_query else figures.routed_cost
            cost = partial(cost_of, slm, llm, figures.scoring_cost(router))
            for threshold in thresholds[name]:
                if name in per_query:
                    deferred = defer(torch.tensor(first[name]), threshold).tolist()
                    outputs = [two if later else one for one, two, later in zip(by_slm, by_llm, deferred, strict=True)]
                else:
                    outputs = next(routed)
                methods[name].append(self.point(threshold, outputs, cost))
        return ends, methods

    def decode(self, description: str, ways: Sequence[Way]) -> list[list[Output]]:
        """Decode all problems in several ways; the processes divide the batches."""
        lengths, limit = [len(prompt) for prompt in self.prompts], self.model.config.max_position_embeddings
        # Every way decodes the same batches, in any number of processes.
        parts = [places for places, _ in decoding.batches(lengths, limit=limit, **self.options.sizes)]
        units = [(way, places) for way in ways for places in parts]
        done = iter(self.work.run(description, units, self.decode_batch))
        order = np.argsort([place for places in parts for place in places])
        outputs = []
        for _ in ways:
            of_way = [Output(*output) for _ in parts for output in next(done)]
            outputs.append([of_way[index] for index in order])
        return outputs

    def decode_batch(self, unit: tuple[Way, list[int]]) -> list[Output]:
        (model, threshold, alone), places = unit
        prompts = [self.prompts[place] for place in places]
        outputs = decoding.decode(model, prompts, router_threshold=threshold, alone=alone, **self.options.sizes)
        if self.grader is None:
            return outputs
        verdicts = [self.grader.grade(place, tuple(one.tokens)) for place, one in zip(places, outputs, strict=True)]
        found = [(bool(one.correct), one.extracted is not None) for one in verdicts]
        return [Output(*one[:3], *verdict) for one, verdict in zip(outputs, found, strict=True)]

    def point(
        self, threshold: float, outputs: Sequence[Output], cost: Callable[[int, list[bool]], np.ndarray]
    ) -> Point:
        tokens = sum(len(one.tokens) for one in outputs)
        costs = [cost(len(prompt), one.to_llm) for prompt, one in zip(self.prompts, outputs, strict=True)]
        moved, operations = (np.sum(costs, axis=0) / tokens).tolist()
        correct = [one.correct for one in outputs]
        share = sum(sum(one.to_llm) for one in outputs) / tokens
        return Point(
            threshold=threshold,
            accuracy=sum(correct) / len(outputs),
            accuracy_ci=bootstrap_interval(correct, seed=self.options.seed),
            llm_share=share,
            # An output that is decoded alone takes a pass for every token of the LLM.
            llm_calls=share,
            bytes=moved,
            flops=operations,
            seconds=sum(one.seconds for one in outputs) / tokens,
            extracted=sum(one.extracted for one in outputs) / len(outputs),
        )
