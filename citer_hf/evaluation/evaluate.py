"""`evaluate`: accuracy and cost of both models alone, and of routers at many thresholds, on the same problems."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from citer_hf import runs
from citer_hf.costs import ModelCost, cost_of_model
from citer_hf.data.checkers import Checker, answer_of, named
from citer_hf.data.examples import Example
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, UNTRAINED, as_threshold, as_veto, defer
from citer_hf.scale.ray_work import Load, pool_of

from . import decode as decoding
from . import results as figures
from .decode import Alone, DecodeOptions, with_router
from .plot import draw
from .results import Point, Results, bootstrap_interval

# LLM shares at which points are wanted: close to each other where curves bend.
SHARES = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
# The methods of routers whose kind does not name one.
METHODS = {"mlp": "citer", "linear": "co-llm"}
# Baselines with a veto of their own, of the confidence router: fallback and rollback at several thresholds (BiLD,
# arXiv 2302.07863), and speculative decoding (arXiv 2211.17192), whose threshold is above every score.
BILD, SPECULATIVE = "bild", "speculative"
OWN_VETO = {BILD: 0.3, SPECULATIVE: 0.0}
# The method whose router decides once per prompt.
QUERY = "query"
RESULTS = "results.json"


@dataclass(frozen=True)
class EvaluateOptions(DecodeOptions):
    shares: tuple[float, ...] = runs.option(SHARES, "LLM shares at which points are wanted.", "P,...")
    thresholds: tuple[float, ...] = runs.option((), "Thresholds of the pair's own router instead.", "X,...")
    vetoes: tuple[float, ...] = runs.option(
        (), "The LLM's vetoes, at each of which thresholds are swept. [default: the pair's]", "X,..."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"shares: expected shares of LLM tokens above 0 and below 1, got {self.shares}.")
        for threshold in self.thresholds:
            as_threshold(threshold)
        for veto in self.vetoes:
            as_veto(veto)


def evaluate(
    model: CiterForCausalLM,
    examples: Sequence[Example],
    checker: Checker | str,
    *,
    routers: Mapping[str, nn.Module] | None = None,
    out: str | Path | None = None,
    ray: bool | Load = False,
    **options: Any,
) -> Results:
    """Measure accuracy and cost of the SLM alone, the LLM alone, and routers at thresholds spread over LLM shares.

    All decode greedily. Costs are those of the passes in which an output took part, as if no other took part in them.
    The same call with the same `out` resumes an interrupted run, and returns the results of a complete one. Under
    `accelerate launch`, processes divide the work and need one `out` that all of them see.

    Args:
        model: The pair.
        examples: The problems, each with an answer.
        checker: The checker that judges the outputs, or its name; see `docs/data.md`.
        routers: The routers by the names of their methods. Default: the pair's own. Two names have dials of their own:
            `bild` a veto of 0.3, `speculative` the threshold 2. The router `query` decides once per prompt, by its
            score after the last token (RouteLLM's setting); its outputs are those of the models alone.
        out: Directory for `results.json`, `results.md` and `curve.png`; `out/.work` holds unfinished work.
        ray: As for `label_preferences`.
        options: The fields of `EvaluateOptions`. Thresholds for `shares` are quantiles of a router's scores along the
            LLM's own outputs, so that resulting shares may differ.

    Returns:
        The points of every method, their figures and the provenance.

    Raises:
        ValueError: for unusable problems or options, a router that gives NaN, or an `out` of other arguments.
        FileExistsError: when `out` holds anything else.
    """
    settings = EvaluateOptions(**options)
    settings = replace(settings, vetoes=tuple(dict.fromkeys(settings.vetoes)) or (model.default_veto,))
    name, check = named(checker)
    for example in examples:
        answer_of(name, example)
    decoding.check_answers(check, examples)
    prompts = decoding.encode_prompts(model, examples)
    routers = {method_name(model): model.router} if routers is None else routers
    if settings.thresholds and all(router is not model.router for router in routers.values()):
        raise ValueError(f"thresholds: they are those of the pair's own router, which is not among {sorted(routers)}.")
    routers = {name: router.to(model.slm.device) for name, router in routers.items()}
    data = [[asdict(example), prompt] for example, prompt in zip(examples, prompts, strict=True)]
    provenance = runs.provenance(model, settings) | {
        "problems": len(examples),
        "checker": name,
        "data_sha256": runs.sha256_of(data),
        "routers_sha256": {
            method: runs.router_sha256(router)
            for name, router in routers.items()
            for method in methods_of(name, settings.vetoes)
        },
        "dtypes": [str(part.dtype).removeprefix("torch.") for part in (model.slm, model.llm)],
    }
    if out is not None:
        out = Path(out)
        # For the plot: before hours of work.
        runs.import_extra("matplotlib.figure", "plot")
        if (out / RESULTS).is_file():
            finished = Results.read(out / RESULTS)
            runs.check_arguments(out, runs.arguments_of(finished.provenance), runs.arguments_of(provenance))
            return finished

    with runs.work_in(out, runs.arguments_of(provenance), pool_of(model, ray)) as work:
        ends, methods = Evaluation(model, examples, prompts, check, settings, work).measure(routers, settings)
        results = figures.make_results(ends, methods, provenance | {"processes": work.processes})
        if out is not None and work.process == 0:
            write_report(results, out)
    return results


def write_report(results: Results, out: Path) -> None:
    """Write `results.md`, `curve.png` and, last, `results.json`."""
    with runs.atomic_write(out / "results.md") as file:
        file.write(f"{results.table()}\n".encode())
    draw(results, out / "curve.png")
    runs.write_json(out / RESULTS, asdict(results))


def method_name(model: CiterForCausalLM) -> str:
    """Return the method of the pair's own router, as far as its kind names it."""
    kind = model.config.router["type"]
    return UNTRAINED if model.router_is_untrained else METHODS.get(kind, kind)


def methods_of(name: str, vetoes: Iterable[float]) -> dict[str, float]:
    """Return the methods that a router is measured as, with their vetoes."""
    if name == QUERY or name in OWN_VETO:
        return {name: OWN_VETO.get(name, 0.0)}
    return {f"{name}, veto {veto:g}" if veto else name: veto for veto in vetoes}


class Graded(NamedTuple):
    """A judged output, with the LLM passes that it took and the bytes that they moved."""

    tokens: list[int]
    to_llm: list[bool]
    seconds: float
    llm_passes: int
    bytes: float
    correct: bool


# A way to decode all problems: a pair, and a threshold and a veto or one of its models alone.
Way = tuple[CiterForCausalLM, float, float, Alone | None]


@dataclass(frozen=True)
class Evaluation:
    """Decodes all problems in different ways and judges the outputs, where there is a checker."""

    model: CiterForCausalLM
    examples: Sequence[Example]
    prompts: list[list[int]]
    checker: Checker | None
    options: DecodeOptions
    work: runs.Work

    @cached_property
    def costs(self) -> dict[str, ModelCost]:
        return {"slm": cost_of_model(self.model.slm), "llm": cost_of_model(self.model.llm)}

    @cached_property
    def is_correct(self) -> Callable[[int, tuple[int, ...]], bool]:
        """Judges every output of every problem once: many thresholds give the same text."""
        checker, tokenizer = self.checker, self.model.load_tokenizer()
        if checker is None:
            return lambda place, output: False
        text = partial(tokenizer.decode, skip_special_tokens=True)
        return cache(lambda place, output: bool(checker(text(list(output)), self.examples[place]).correct))

    def measure(
        self, routers: Mapping[str, nn.Module], options: EvaluateOptions
    ) -> tuple[dict[str, Point], dict[str, list[Point]]]:
        """Return the points of both models alone, and those of every router at its thresholds and vetoes."""
        # 1. Both models alone. Each runs once before, so that no point pays for what happens only once.
        alone: list[Way] = [(self.model, SLM_ALONE, 0.0, "slm"), (self.model, SLM_ALONE, 0.0, "llm")]
        for way in (*alone, (self.model, 0.5, 0.0, None)):
            decoding.decode(way[0], self.prompts[:2], router_threshold=way[1], alone=way[3], max_new_tokens=2)
        by_slm, by_llm = self.decode("models alone", alone)
        decoding.warn_of_llm([one.correct for one in by_llm])
        ends = {"slm": self.point(SLM_ALONE, 0.0, by_slm), "llm": self.point(LLM_ALONE, 0.0, by_llm)}

        # 2. Thresholds. A router that decides once per prompt looks at the scores after the prompts alone.
        def scores() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
            tokens = [one.tokens for one in by_llm]
            scores = decoding.score_outputs(self.model, routers, self.prompts, tokens)
            first = {name: [float(one[0]) for one in scores[name]] for name in routers if name == QUERY}
            along = {name: first[name] if name in first else np.concatenate(scores[name]) for name in routers}
            return first, {name: decoding.spread_thresholds(one, options.shares) for name, one in along.items()}

        first, thresholds = self.work.once("scores", scores)
        own = [name for name, router in routers.items() if router is self.model.router and options.thresholds]
        thresholds |= dict.fromkeys(own, sorted(set(options.thresholds)))
        thresholds |= {name: [LLM_ALONE] for name in routers if name == SPECULATIVE}
        # 3. The pair with every other router at each of its thresholds and vetoes.
        known = [(name, *one) for name in routers for one in methods_of(name, options.vetoes).items()]
        dials = [(name, method, threshold, veto) for name, method, veto in known for threshold in thresholds[name]]
        pairs = {name: with_router(self.model, router) for name, router in routers.items()}
        ways: list[Way] = [(pairs[name], *dial, None) for name, _, *dial in dials if name != QUERY]
        routed = iter(self.decode("routers at thresholds", ways))
        # 4. Points.
        methods: dict[str, list[Point]] = {method: [] for _, method, _ in known}
        for name, method, threshold, veto in dials:
            chosen = self.per_query(first[name], threshold, routers[name], by_slm, by_llm) if name in first else None
            outputs = chosen or next(routed)
            methods[method].append(self.point(threshold, veto, outputs))
        return ends, methods

    def per_query(
        self, scores: list[float], threshold: float, router: nn.Module, by_slm: list[Graded], by_llm: list[Graded]
    ) -> list[Graded]:
        """Return outputs of the models alone, chosen after the SLM's pass over the prompt."""
        deferred, scoring = defer(torch.tensor(scores), threshold).tolist(), figures.scoring_cost(router)
        outputs = []
        for prompt, small, large, later in zip(self.prompts, by_slm, by_llm, deferred, strict=True):
            chosen, more = (large, figures.pass_cost(self.costs["slm"], 0, len(prompt))) if later else (small, 0)
            outputs.append(chosen._replace(bytes=chosen.bytes + scoring + more))
        return outputs

    def decode(self, description: str, ways: Sequence[Way]) -> list[list[Graded]]:
        """Decode all problems in several ways; the processes divide units of problems that follow each other."""
        longest = max(map(len, self.prompts)) + self.options.max_new_tokens
        parts = decoding.units(range(len(self.prompts)), longest, self.options.batch_tokens)
        done = iter(self.work.run(description, [(way, part) for way in ways for part in parts], self.decode_unit))
        return [[Graded(*output) for _ in parts for output in next(done)] for _ in ways]

    def decode_unit(self, unit: tuple[Way, Sequence[int]]) -> list[tuple[Any, ...]]:
        """Return the fields of `Graded` for each problem of a unit."""
        (model, threshold, veto, alone), places = unit
        outputs = decoding.decode(
            model,
            [self.prompts[place] for place in places],
            router_threshold=threshold,
            llm_veto=veto,
            alone=alone,
            max_new_tokens=self.options.max_new_tokens,
            batch_tokens=self.options.batch_tokens,
        )
        # Every pass of the SLM is followed by a score.
        scoring = figures.scoring_cost(model.router) * (alone is None)
        graded = []
        for place, (tokens, to_llm, seconds, passes) in zip(places, outputs, strict=True):
            moved = sum(figures.cost_of_passes(self.costs[role], passes[role]) for role in self.costs)
            moved += scoring * len(passes["slm"])
            correct = self.is_correct(place, tuple(tokens))
            graded.append((tokens, to_llm, seconds, len(passes["llm"]), moved, correct))
        return graded

    def point(self, threshold: float, veto: float, outputs: Sequence[Graded]) -> Point:
        tokens = sum(len(one.tokens) for one in outputs)
        correct = [one.correct for one in outputs]
        return Point(
            threshold=threshold,
            accuracy=sum(correct) / len(outputs),
            accuracy_ci=bootstrap_interval(correct, seed=self.options.seed),
            llm_share=sum(sum(one.to_llm) for one in outputs) / tokens,
            llm_calls=sum(one.llm_passes for one in outputs) / tokens,
            bytes=sum(one.bytes for one in outputs) / tokens,
            seconds=sum(one.seconds for one in outputs) / tokens,
            veto=veto,
        )
