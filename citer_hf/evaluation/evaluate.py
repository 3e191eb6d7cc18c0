"""Accuracy and cost of routers, at many thresholds, on the same problems."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from citer_hf import CiterForCausalLM
from citer_hf.runs import process_state, wait_for_all

from ..data.checkers import Checker
from ..data.examples import Example
from ..data.tokens import encode_prompt
from ..model.routers import LLM_ALONE, SLM_ALONE, as_threshold, defer
from .costs import PairCosts, TextCost, scoring_cost
from .decoding import BATCH_TOKENS, Alone, check_room, decode, with_router
from .grading import Grader
from .points import Point, TextResult, make_point
from .progress import progress_bar
from .provenance import anonymous, data_fingerprint, describe_run, fingerprint, model_fingerprint, module_fingerprint
from .report import write_report
from .results import SHARES, Results, make_results
from .scoring import score_texts, spread_thresholds
from .store import RESULTS, Store
from .writing import Texts, Way, Writer

__all__ = ["evaluate", "method_name"]

# What a router that needs no name of its own is called, by its kind.
METHODS = {"mlp": "citer", "linear": "co-llm"}


def method_name(model: CiterForCausalLM) -> str:
    """Return the method that the pair's own router belongs to, as far as its kind tells."""
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

    Run under `accelerate launch` with an `out`, which all processes see, they divide the batches; every process calls
    this. The results are the same for any number of processes; `seconds` are added up over them.

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
        ValueError: when the checker raises, or the processes have different arguments.
        ConnectionError: when another process has ended before its work was done.
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
    # Without a directory there is nothing to share: then every process does everything.
    process, processes = (0, 1) if out is None else position()
    store = Store(out, fingerprint(settings))
    if processes > 1:
        wait_for_all()
        store.check_agreement()
    if store.finished is not None:
        return Results.read(store.finished)

    per_token = {name: router for name, router in routers.items() if name not in query_level}
    with progress_bar(len(examples) * (2 + len(shares) * len(per_token)) // processes, shown=process == 0) as steps:
        sizes = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
        limit = model.config.max_position_embeddings
        writer = Writer(prompts, grader, store, steps, sizes, limit, process, processes)
        run = _Run(model, prompts, writer, store, settings)
        run.warm_up()
        ends = run.ends()
        sweeps = run.sweeps(per_token, ends["llm"], shares, thresholds)
        steps.expect(len(examples) * (2 + sum(map(len, sweeps.values()))) // processes)
        texts = run.texts(per_token, sweeps)
    if process == 0:
        methods = {
            name: run.points(router, texts[name], sweeps[name])
            if name in per_token
            else run.query_points(name, router, ends, shares, thresholds.get(name))
            for name, router in routers.items()
        }
        provenance = describe_run(model) | settings | {"problems": len(examples), "processes": processes}
        provenance |= {"arguments": anonymous(arguments or {}), "fingerprint": fingerprint(settings)}
        results = make_results({name: end.point for name, end in ends.items()}, methods, provenance)
        if out is not None:
            write_report(results, out)
            store.forget()
    if processes > 1:
        wait_for_all()
    return results if out is None or process == 0 else Results.read(out / RESULTS)


def position() -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are."""
    state = process_state()
    return state.process_index, state.num_processes


def _check_sweep(
    routers: Mapping[str, nn.Module], shares: Sequence[float], thresholds: Mapping[str, Sequence[float]]
) -> None:
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"shares: expected shares of LLM tokens above 0 and below 1, got {share!r}.")
    unknown = sorted(set(thresholds) - set(routers))
    if unknown:
        raise ValueError(f"thresholds: there is no router named {unknown[0]!r}; there are {sorted(routers)}.")
    for values in thresholds.values():
        for value in values:
            as_threshold(value)


@dataclass(frozen=True)
class _End:
    """One model alone: its texts, what became of them, and what that adds up to."""

    tokens: list[list[int]]
    results: list[TextResult]
    point: Point


class _Run:
    """What all points of an evaluation share."""

    def __init__(
        self,
        model: CiterForCausalLM,
        prompts: list[list[int]],
        writer: Writer,
        store: Store,
        settings: Mapping[str, Any],
    ):
        self.model, self.prompts, self.writer, self.store = model, prompts, writer, store
        self.batch_tokens, self.seed = settings["batch_tokens"], settings["seed"]
        self.costs = PairCosts(model)

    def warm_up(self) -> None:
        """Let every model run once, so that the first point does not pay for what is done only once."""
        for alone in ("slm", "llm", None):
            decode(self.model, self.prompts[:2], max_new_tokens=2, alone=alone, router_threshold=0.5)

    def ends(self) -> dict[str, _End]:
        """Measure each model alone."""
        names: tuple[Alone, ...] = ("slm", "llm")
        ways = [Way(f"end-{name}", f"{name.upper()} alone", self.model, alone=name) for name in names]
        return {name: self._end(name, texts) for name, texts in zip(names, self.writer.write(ways), strict=True)}

    def _end(self, name: str, texts: Texts) -> _End:
        by_llm = name == "llm"
        results = [
            TextResult(correct, extracted, len(text), len(text) * by_llm, self.costs.alone(by_llm, prompt, len(text)))
            for correct, extracted, text, prompt in zip(
                texts.correct, texts.extracted, texts.tokens, map(len, self.prompts), strict=True
            )
        ]
        threshold = LLM_ALONE if by_llm else SLM_ALONE
        return _End(texts.tokens, results, make_point(results, threshold, texts.seconds, self.seed))

    def sweeps(
        self,
        routers: Mapping[str, nn.Module],
        llm: _End,
        shares: Sequence[float],
        given: Mapping[str, Sequence[float]],
    ) -> dict[str, list[float]]:
        """Choose the thresholds of each router: those that are given, or by its scores along the LLM's texts."""
        self.writer.steps.name("scores")

        def compute() -> dict[str, list[float]]:
            scored = score_texts(self.model, chosen, self.prompts, llm.tokens, self.batch_tokens)
            return {name: spread_thresholds(np.concatenate(of_one), shares) for name, of_one in scored.scores.items()}

        chosen = {name: router for name, router in routers.items() if name not in given}
        if chosen and self.writer.process == 0:
            self.store.remember("thresholds", compute)
        if self.writer.processes > 1:
            wait_for_all()
        found: dict[str, list[float]] = self.store.recall("thresholds") if chosen else {}
        return {name: found[name] if name in found else sorted(set(given[name])) for name in routers}

    def texts(self, routers: Mapping[str, nn.Module], sweeps: Mapping[str, Sequence[float]]) -> dict[str, list[Texts]]:
        """Write the texts of every router at each of its thresholds."""
        ways = [
            Way(f"{name}-{threshold!r}", f"{name} at {threshold:.4g}", pair, name, threshold)
            for name, pair in ((name, with_router(self.model, router)) for name, router in routers.items())
            for threshold in sweeps[name]
        ]
        written = iter(self.writer.write(ways))
        return {name: [next(written) for _ in sweeps[name]] for name in routers}

    def points(self, router: nn.Module, written: Sequence[Texts], thresholds: Sequence[float]) -> list[Point]:
        """Measure one router at its thresholds."""
        scoring = scoring_cost(router)
        return [self._point(scoring, texts, threshold) for texts, threshold in zip(written, thresholds, strict=True)]

    def _point(self, scoring: TextCost, texts: Texts, threshold: float) -> Point:
        results = [
            TextResult(correct, extracted, len(by_llm), sum(by_llm), self.costs.routed(scoring, len(prompt), by_llm))
            for correct, extracted, by_llm, prompt in zip(
                texts.correct, texts.extracted, texts.to_llm, self.prompts, strict=True
            )
        ]
        return make_point(results, threshold, texts.seconds, self.seed)

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
        scores = torch.from_numpy(np.concatenate(scored.scores[name]))
        scoring = scoring_cost(router)
        chosen = sorted(set(given)) if given is not None else spread_thresholds(scores.numpy(), shares)
        return [
            self._query_point(defer(scores, threshold).numpy(), threshold, ends, scoring, scored.seconds)
            for threshold in chosen
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
