"""The threshold for a budget: an LLM share, or a fraction of the LLM's accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from citer_hf import CiterForCausalLM
from citer_hf.runs import atomic_write, read_json

from ..data.checkers import Checker, Grader
from ..data.examples import Example
from ..data.tokens import encode_prompt
from .decoding import BATCH_TOKENS, Decoded, check_room, decode
from .points import bootstrap_interval
from .progress import Steps, progress_bar
from .provenance import data_fingerprint
from .scoring import check_scores, score_texts, threshold_for_share

__all__ = ["Calibration", "calibrate", "write_threshold"]

# Decodes of all problems, at most, and when a share is near enough.
MOST_TRIALS = 8
NEAR = 0.003
# Shares that are tried in turn until one is accurate enough; then the gap below it is halved.
STAIRS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.95)
HALVINGS = 4


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what decoding with it gave on the problems."""

    threshold: float
    llm_share: float
    llm_share_ci: tuple[float, float]
    problems: int
    accuracy: float | None = None
    accuracy_ci: tuple[float, float] | None = None
    llm_accuracy: float | None = None
    wanted: Mapping[str, float] | None = None
    data_sha256: str | None = None


def calibrate(
    model: CiterForCausalLM,
    examples: Sequence[Example],
    checker: Checker | str | None = None,
    *,
    llm_share: float | None = None,
    accuracy: float | None = None,
    max_new_tokens: int = 512,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    tokenizer: Any = None,
) -> Calibration:
    """Find the threshold for a budget, by decoding with it: what a router sends to the LLM changes what it reads next.

    Args:
        model: The pair with its router.
        examples: Problems like those that the pair will meet.
        checker: Says whether a text answers a problem, or the name of one that does; needed for `accuracy`.
        llm_share: Share of tokens that the LLM should write.
        accuracy: The cheapest threshold that reaches this fraction of the LLM's accuracy.
        max_new_tokens: Where to stop a text that does not end by itself.
        batch_tokens: Prompt and new tokens of all rows of a batch, at most.
        seed: Of the bootstrap.
        tokenizer: Default: the pair's.

    Raises:
        ValueError: when not exactly one of `llm_share` and `accuracy` is given, when it is not above 0 and below 1,
            when `accuracy` comes without a checker, when no threshold reaches it, or for unusable problems.
    """
    wanted = {name: value for name, value in (("llm_share", llm_share), ("accuracy", accuracy)) if value is not None}
    if len(wanted) != 1:
        raise ValueError(f"llm_share, accuracy: expected exactly one of them, got {sorted(wanted) or 'neither'}.")
    for name, value in wanted.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number above 0 and below 1, such as 0.2 or 0.95, got {value!r}.")
    if accuracy is not None and checker is None:
        raise ValueError("accuracy: it needs a checker, which says whether a text answers a problem.")
    if not examples:
        raise ValueError("examples: expected at least one, got none. Is the file empty?")
    tokenizer = tokenizer if tokenizer is not None else model.load_tokenizer()
    grader = None if checker is None else Grader(checker, examples, tokenizer)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    rows = [example.row for example in examples]
    check_room([len(prompt) for prompt in prompts], model.config.max_position_embeddings, "row {}: its prompt", rows)

    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    with progress_bar(None) as steps:
        trials = _Trials(model, prompts, grader, sizes, seed, steps)
        found = trials.for_share(llm_share) if llm_share is not None else trials.for_accuracy(float(accuracy or 0))
    own = asdict(found) | {"wanted": wanted, "data_sha256": data_fingerprint(examples, prompts)}
    return Calibration(**own)


class _Trials:
    """Decodes all problems with one threshold after the other."""

    def __init__(
        self,
        model: CiterForCausalLM,
        prompts: list[list[int]],
        grader: Grader | None,
        sizes: Mapping[str, Any],
        seed: int,
        steps: Steps,
    ):
        self.model, self.prompts, self.grader = model, prompts, grader
        self.sizes, self.seed, self.steps = sizes, seed, steps
        self.llm = self._decode("LLM alone", alone="llm")
        scored = score_texts(model, {"of the pair": model.router}, prompts, self.llm.tokens, sizes["batch_tokens"])
        self.scores = np.sort(np.concatenate(scored.scores["of the pair"]))

    def _decode(self, name: str, **options: Any) -> Decoded:
        self.steps.name(name)
        return decode(self.model, self.prompts, progress=self.steps.advance, **options, **self.sizes)

    def _at(self, threshold: float) -> Decoded:
        decoded = self._decode(f"threshold {threshold:.5g}", router_threshold=threshold)
        check_scores("of the pair", _scores(decoded))
        return decoded

    def for_share(self, wanted: float) -> Calibration:
        """Close in on a share; what was decoded last says best which threshold comes next."""
        low, high = 0.0, float(np.nextafter(np.float32(self.scores[-1]), np.float32(2)))
        threshold = threshold_for_share(self.scores, wanted)
        tried: dict[float, Decoded] = {}
        while len(tried) < MOST_TRIALS and threshold not in tried:
            decoded = tried[threshold] = self._at(threshold)
            share = _share(decoded)
            if abs(share - wanted) <= NEAR:
                break
            low, high = (threshold, high) if share < wanted else (low, threshold)
            threshold = threshold_for_share(np.sort(_scores(decoded)), wanted)
            if not low < threshold < high:
                threshold = float(np.float32((low + high) / 2))
        best = min(tried, key=lambda one: abs(_share(tried[one]) - wanted))
        return self._calibration(best, tried[best])

    def for_accuracy(self, wanted: float) -> Calibration:
        """Climb shares until one is accurate enough, then look for a cheaper one below."""
        assert self.grader is not None
        of_llm = _mean(self._correct(self.llm))
        tried: dict[float, tuple[float, Decoded]] = {}
        failed = 0.0
        for share in STAIRS:
            if self._reaches(share, wanted * of_llm, tried):
                break
            failed = share
        else:
            best = max(tried, key=lambda one: (tried[one][0], -one))
            raise ValueError(
                f"accuracy: no threshold reaches {wanted:.1%} of the LLM's accuracy ({of_llm:.1%}). The best is "
                f"{self._threshold(best):.6g}, with an accuracy of {tried[best][0]:.1%} and "
                f"{_share(tried[best][1]):.1%} LLM tokens. Ask for less, use the LLM alone, or train the router."
            )
        reached = share
        for _ in range(HALVINGS if reached > 0 else 0):
            middle = (failed + reached) / 2
            if self._reaches(middle, wanted * of_llm, tried):
                reached = middle
            else:
                failed = middle
        calibration = self._calibration(self._threshold(reached), tried[reached][1])
        return Calibration(**asdict(calibration) | {"llm_accuracy": of_llm})

    def _threshold(self, share: float) -> float:
        return threshold_for_share(self.scores, share) if share > 0 else 0.0

    def _reaches(self, share: float, wanted: float, tried: dict[float, tuple[float, Decoded]]) -> bool:
        threshold = self._threshold(share)
        same = next((one for one in tried if self._threshold(one) == threshold), None)
        if same is not None:
            tried[share] = tried[same]
        else:
            decoded = self._at(threshold)
            tried[share] = (_mean(self._correct(decoded)), decoded)
        return tried[share][0] >= wanted

    def _correct(self, decoded: Decoded) -> list[float]:
        assert self.grader is not None
        return [float(verdict.correct) for verdict in self.grader.grade(decoded.tokens)]

    def _calibration(self, threshold: float, decoded: Decoded) -> Calibration:
        by_llm, lengths = [sum(row) for row in decoded.to_llm], [len(row) for row in decoded.to_llm]
        correct = None if self.grader is None else self._correct(decoded)
        return Calibration(
            threshold=threshold,
            llm_share=_share(decoded),
            llm_share_ci=bootstrap_interval(by_llm, lengths, seed=self.seed),
            problems=len(self.prompts),
            accuracy=None if correct is None else _mean(correct),
            accuracy_ci=None if correct is None else bootstrap_interval(correct, seed=self.seed),
        )


def _scores(decoded: Decoded) -> np.ndarray:
    return np.concatenate([np.asarray(scores, dtype=np.float32) for scores in decoded.scores])


def _share(decoded: Decoded) -> float:
    return sum(map(sum, decoded.to_llm)) / sum(map(len, decoded.to_llm))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_threshold(directory: Path, calibration: Calibration) -> None:
    """Write a threshold into a router repository, and how it was found into its `provenance.json`."""
    config, provenance = directory / "config.json", directory / "provenance.json"
    if not config.is_file():
        raise FileNotFoundError(f"{directory} is no router repository on this machine: it holds no config.json.")
    record = asdict(calibration) | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    settings = read_json(config) | {"router_threshold": calibration.threshold}
    origin = (read_json(provenance) if provenance.exists() else {}) | {"calibration": record}
    with ExitStack() as both:
        for path, values in ((provenance, origin), (config, settings)):
            both.enter_context(atomic_write(path)).write((json.dumps(values, indent=2) + "\n").encode())
