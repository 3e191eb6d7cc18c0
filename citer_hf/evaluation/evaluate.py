"""Accuracy and cost of routers, at many thresholds, on the same problems."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from citer_hf import CiterForCausalLM

from .checkers import Checker
from .costs import PairCosts, TextCost, scoring_cost
from .decoding import BATCH_TOKENS, Decoded, check_room, decode, with_router
from .examples import Example
from .grading import Grader
from .points import Point, TextResult, make_point
from .progress import Steps, progress_bar
from .provenance import anonymous, data_fingerprint, describe_run, fingerprint, model_fingerprint, module_fingerprint
from .report import write_report
from .results import SHARES, Results, make_results
from .scoring import check_scores, score_texts, spread_thresholds
from .store import Store
from .tokens import encode_prompt

__all__ = ["evaluate", "method_name"]

# What a router that needs no name of its own is called, by its kind.
METHODS = {"mlp": "citer", "linear": "co-llm"}
SLM_ALONE, LLM_ALONE = 0.0, 2.0


def method_name(model: CiterForCausalLM) -> str:
    """Return the method that the pair's own router belongs to, as far as its kind tells.

    Args:
        model: The pair.
    """
    kind = model.config.router["type"]
    return METHODS.get(kind, kind)


def evaluate(
    model: CiterForCausalLM,
    examples: Sequence[Example],
    checker: Checker | str,
    *,
    routers: Mapping[str, nn.Module] | None = None,
    query_level: Collection[str] = ("query",),
    shares: Sequence[float] = SHARES,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    max_new_tokens: int = 512,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    out: Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Results:
    """Measure accuracy and cost of the SLM alone, the LLM alone, and routers at thresholds spread over LLM shares.

    All decode greedily, the same problems in the same batches. Costs are those of each text decoded alone. A run that
    was interrupted goes on where it stopped when it is repeated with the same arguments and the same `out`.

    Args:
        model: The pair.
        examples: The problems, each with an answer.
        checker: Says whether a text answers a problem, or the name of one that does; see `get_checker`.
        routers: The routers by the names of their methods, moved to where the SLM is. Default: the pair's own.
        query_level: Names of those that decide once per prompt, by their score after its last token (RouteLLM's
            setting). Their texts are those of the models alone.
        shares: LLM shares at which points are wanted. The thresholds are quantiles of a router's scores along the
            LLM's own texts, so that the share that results may be another.
        thresholds: For some routers, by name: these thresholds instead.
        max_new_tokens: Where to stop a text that does not end by itself.
        batch_tokens: Prompt and new tokens of all rows of a batch, at most.
        seed: Of the bootstrap.
        out: Directory for `results.json`, `results.md` and `curve.png`; until then, it keeps what is done.
        arguments: What else to note in the provenance, such as a command's arguments.
        tokenizer: Default: the pair's.

    Raises:
        ValueError: for problems without answers, prompts that fill the context, senseless shares or thresholds, or a
            router that gives NaN.
        ValueError: when the checker raises.
        FileExistsError: when `out` holds anything else.
    """
    tokenizer = tokenizer if tokenizer is not None else model.load_tokenizer()
    grader = Grader(checker, examples, tokenizer)
    routers = routers if routers is not None else {method_name(model): model.router}
    routers = {name: router.to(model.slm.device) for name, router in routers.items()}
    thresholds = dict(thresholds or {})
    _check_sweep(routers, shares, thresholds)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    rows = [example.row for example in examples]
    check_room([len(prompt) for prompt in prompts], model.config.max_position_embeddings, "row {}: its prompt", rows)

    settings = {
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "shares": list(shares),
        "thresholds": {name: list(values) for name, values in thresholds.items()},
        "query_level": sorted(set(query_level) & set(routers)),
        "checker": grader.name,
        "data_sha256": data_fingerprint(examples, prompts),
        "models_sha256": model_fingerprint(model),
        "routers_sha256": {name: module_fingerprint(router) for name, router in routers.items()},
    }
    store = Store(out, fingerprint(settings))
    if store.finished is not None:
        return Results.read(store.finished)

    with progress_bar(len(examples) * (2 + len(shares) * len(set(routers) - set(query_level)))) as steps:
        run = _Run(model, prompts, grader, store, settings, steps)
        run.warm_up()
        ends = {"slm": run.end("slm"), "llm": run.end("llm")}
        per_token = {name: router for name, router in routers.items() if name not in query_level}
        sweeps = run.sweeps(per_token, ends["llm"], shares, thresholds)
        steps.expect(len(examples) * (2 + sum(map(len, sweeps.values()))))
        methods = {
            name: [run.point(name, router, threshold) for threshold in sweeps[name]]
            if name in per_token
            else run.query_points(name, router, ends, shares, thresholds.get(name))
            for name, router in routers.items()
        }
    provenance = describe_run(model) | settings | {"problems": len(examples), "arguments": anonymous(arguments or {})}
    provenance["fingerprint"] = fingerprint(settings)
    results = make_results({name: end.point for name, end in ends.items()}, methods, provenance)
    if out is not None:
        write_report(results, out)
        store.forget()
    return results


def _check_sweep(
    routers: Mapping[str, nn.Module], shares: Sequence[float], thresholds: Mapping[str, Sequence[float]]
) -> None:
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"shares: expected shares of LLM tokens above 0 and below 1, got {share!r}.")
    unknown = sorted(set(thresholds) - set(routers))
    if unknown:
        raise ValueError(f"thresholds: there is no router named {unknown[0]!r}; there are {sorted(routers)}.")
    for name, values in thresholds.items():
        if not all(value >= 0 for value in values):
            raise ValueError(f"thresholds: expected numbers from 0 up for {name!r}, got {list(values)!r}.")


@dataclass(frozen=True)
class _End:
    """One model alone: its texts, what became of them, and what that adds up to."""

    tokens: list[list[int]]
    results: list[TextResult]
    seconds: float
    point: Point


class _Run:
    """What all points of an evaluation share.

    Args:
        model: The pair.
        prompts: Token ids of each prompt.
        grader: Judges the texts.
        store: Remembers what is done.
        settings: `max_new_tokens`, `batch_tokens` and `seed`.
        steps: Told about every text.
    """

    def __init__(
        self,
        model: CiterForCausalLM,
        prompts: list[list[int]],
        grader: Grader,
        store: Store,
        settings: Mapping[str, Any],
        steps: Steps,
    ):
        self.model, self.prompts, self.grader, self.store, self.steps = model, prompts, grader, store, steps
        self.max_new_tokens, self.batch_tokens = settings["max_new_tokens"], settings["batch_tokens"]
        self.seed = settings["seed"]
        self.costs = PairCosts(model)

    def warm_up(self) -> None:
        """Let every model run once, so that the first point does not pay for what is done only once."""
        for alone in ("slm", "llm", None):
            decode(self.model, self.prompts[:2], max_new_tokens=2, alone=alone, router_threshold=0.5)

    def decode(self, model: CiterForCausalLM, **options: Any) -> Decoded:
        """Write a text for every problem."""
        sizes = {"max_new_tokens": self.max_new_tokens, "batch_tokens": self.batch_tokens}
        return decode(model, self.prompts, **sizes, progress=self.steps.advance, **options)

    def _remember(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what came of a text for every problem, written now or in an earlier run."""
        if self.store.holds(key):
            self.steps.skip(len(self.prompts))
        found: dict[str, Any] = self.store.remember(key, compute)
        return found

    def end(self, name: str) -> _End:
        """Measure one model alone."""
        self.steps.name(f"{name.upper()} alone")

        def compute() -> dict[str, Any]:
            decoded = self.decode(self.model, alone=name)
            return {"tokens": decoded.tokens, "seconds": decoded.seconds}

        found = self._remember(f"end-{name}", compute)
        tokens, seconds, by_llm = found["tokens"], found["seconds"], name == "llm"
        results = [
            TextResult(
                verdict.correct,
                verdict.extracted is not None,
                len(text),
                len(text) * by_llm,
                self.costs.alone(by_llm, len(prompt), len(text)),
            )
            for verdict, text, prompt in zip(self.grader.grade(tokens), tokens, self.prompts, strict=True)
        ]
        threshold = LLM_ALONE if by_llm else SLM_ALONE
        return _End(tokens, results, seconds, make_point(results, threshold, seconds, self.seed))

    def sweeps(
        self,
        routers: Mapping[str, nn.Module],
        llm: _End,
        shares: Sequence[float],
        given: Mapping[str, Sequence[float]],
    ) -> dict[str, list[float]]:
        """Choose the thresholds of each router: those that are given, or by its scores along the LLM's texts."""
        self.steps.name("scores")

        def compute() -> dict[str, list[float]]:
            scored = score_texts(self.model, chosen, self.prompts, llm.tokens, self.batch_tokens)
            return {name: spread_thresholds(np.concatenate(of_one), shares) for name, of_one in scored.scores.items()}

        chosen = {name: router for name, router in routers.items() if name not in given}
        found: dict[str, list[float]] = self.store.remember("thresholds", compute) if chosen else {}
        return {name: found[name] if name in found else sorted(set(given[name])) for name in routers}

    def point(self, name: str, router: nn.Module, threshold: float) -> Point:
        """Measure one router at one threshold."""
        self.steps.name(f"{name} at {threshold:.4g}")

        def compute() -> dict[str, Any]:
            return self._point(name, router, threshold).as_dict()

        return Point.from_dict(self._remember(f"{name}-{threshold!r}", compute))

    def _point(self, name: str, router: nn.Module, threshold: float) -> Point:
        decoded = self.decode(with_router(self.model, router), router_threshold=threshold)
        check_scores(name, np.concatenate([np.asarray(scores) for scores in decoded.scores]))
        scoring = scoring_cost(router)
        verdicts = self.grader.grade(decoded.tokens)
        results = [
            TextResult(
                verdict.correct,
                verdict.extracted is not None,
                len(by_llm),
                sum(by_llm),
                self.costs.routed(scoring, len(prompt), by_llm),
            )
            for verdict, by_llm, prompt in zip(verdicts, decoded.to_llm, self.prompts, strict=True)
        ]
        return make_point(results, threshold, decoded.seconds, self.seed)

    def query_points(
        self,
        name: str,
        router: nn.Module,
        ends: Mapping[str, _End],
        shares: Sequence[float],
        given: Sequence[float] | None,
    ) -> list[Point]:
        """Measure a router that decides once per prompt, from the texts of both models alone."""
        first = [text[:1] for text in ends["llm"].tokens]
        scored = score_texts(self.model, {name: router}, self.prompts, first, self.batch_tokens)
        scores = np.concatenate(scored.scores[name])
        scoring = scoring_cost(router)
        chosen = sorted(set(given)) if given is not None else spread_thresholds(scores, shares)
        return [
            self._query_point(scores < threshold, threshold, ends, scoring, scored.seconds) for threshold in chosen
        ]

    def _query_point(
        self, to_llm: np.ndarray, threshold: float, ends: Mapping[str, _End], scoring: TextCost, reading: float
    ) -> Point:
        results, seconds = [], 0.0
        for row, by_llm in enumerate(to_llm.tolist()):
            end = ends["llm" if by_llm else "slm"]
            one = end.results[row]
            cost = self.costs.routed_by_query(scoring, len(self.prompts[row]), one.tokens, by_llm)
            results.append(TextResult(one.correct, one.extracted, one.tokens, one.llm_tokens, cost))
            seconds += end.point.seconds * one.tokens + by_llm * reading / len(to_llm)
        return make_point(results, threshold, seconds, self.seed)
