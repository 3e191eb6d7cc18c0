"""`calibrate`: threshold and veto for a quality or a speed, the threshold for an LLM share or an accuracy."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from transformers.utils import logging

from citer_hf import runs
from citer_hf.data.checkers import Checker, named
from citer_hf.data.examples import Example
from citer_hf.model.cache import CiterCache
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.quality import as_quality, pair_of, with_setting
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE
from citer_hf.model.slots import takes_back
from citer_hf.terminal import table

from .decode import Alone, DecodeOptions, check_answers, decode, encode_prompts, score_outputs, threshold_for_share
from .evaluate import Evaluation, Graded
from .results import Point, bootstrap_interval

logger = logging.get_logger(__name__)

# The most thresholds that are tried for a share, and the difference at which it is near enough.
MOST_TRIALS, NEAR = 8, 0.003
# Shares that are tried in turn until one is accurate enough; then the gap below it is halved so often.
STAIRS, HALVINGS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.95), 4
# The vetoes that are tried for a quality or a speed, and the shares for each of them.
VETOES, FLAGGED = (0.0, 0.05, 0.3, 0.6), (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
# Time is measured one sequence at a time, on so many problems, in so many turns.
TIMED, TURNS = 8, 3
# With fewer problems than this an interval says little.
FEW = 30
TARGETS = ("quality", "speedup", "accuracy", "llm_share")
PACKAGE = Path(__file__).resolve().parents[1]
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class CalibrateOptions(DecodeOptions):
    quality: float | None = runs.option(
        None, "Fraction of the LLM's accuracy to keep in the least measured time, by threshold and veto.", "P"
    )
    speedup: float | None = runs.option(
        None, "How many times as fast as the LLM alone, as accurately as possible, by threshold and veto.", "X"
    )
    accuracy: float | None = runs.option(
        None, "Fraction of the LLM's accuracy to reach with the least LLM share, by the threshold alone.", "P"
    )
    llm_share: float | None = runs.option(None, "Share of the tokens that the LLM should decide.", "P")
    write: bool = runs.option(False, "Write what was found into MODEL, a directory.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"{', '.join(TARGETS)}: expected exactly one, got {given}.")
        if self.quality is not None:
            as_quality(self.quality)
        elif self.speedup is not None:
            if not 0 < self.speedup < float("inf"):
                raise ValueError(f"speedup: expected a number above 0, got {self.speedup}.")
        elif not 0 < next(iter(given.values())) < 1:
            raise ValueError(f"{next(iter(given))}: expected a number above 0 and below 1, got {given}.")


@dataclass(frozen=True)
class Calibration:
    """A threshold and a veto, and what decoding with them gave on the problems, with 95 % intervals."""

    threshold: float
    llm_share: float
    llm_share_ci: tuple[float, float]
    problems: int
    accuracy: float | None = None  # with a checker
    accuracy_ci: tuple[float, float] | None = None
    llm_veto: float | None = None
    llm_calls: float | None = None  # LLM passes per token
    bytes: float | None = None  # per token
    # For a quality or a speed, on problems that were not searched on: the part of the LLM's accuracy, and times.
    quality: float | None = None
    kept: float | None = None
    kept_ci: tuple[float, float] | None = None
    seconds: float | None = None  # per token, one sequence at a time
    speedup: float | None = None  # over the LLM alone
    tried: tuple[dict[str, str], ...] = ()
    saved: dict[str, Any] | None = None  # thresholds and vetoes by quality, for the configuration

    def summary(self) -> str:
        """Return threshold, veto, LLM share, accuracy, passes, bytes and times as text."""
        low, high = self.llm_share_ci
        text = f"router_threshold {self.threshold:.6g}"
        text += "" if self.llm_veto is None else f", llm_veto {self.llm_veto:g}"
        text += f": LLM share {self.llm_share:.1%} ({low:.1%} to {high:.1%})"
        if self.accuracy is not None and self.accuracy_ci is not None:
            low, high = self.accuracy_ci
            text += f", accuracy {self.accuracy:.1%} ({low:.1%} to {high:.1%})"
        text += f"; {self.problems} problems"
        if self.llm_calls is not None and self.bytes is not None:
            text += f". Per token: {self.llm_calls:.3f} LLM passes, {self.bytes / 1e6:.4g} MB"
        if self.seconds is not None and self.speedup is not None:
            text += (
                f", {self.seconds * 1e3:.3g} ms one sequence at a time, {self.speedup:.2f} times as fast as the LLM"
            )
        if self.kept is not None and self.kept_ci is not None:
            low, high = self.kept_ci
            text += f". It keeps {self.kept:.1%} of the LLM's accuracy ({low:.1%} to {high:.1%}) on fresh problems."
        return f"{table(self.tried)}\n\n{text}" if self.tried else text

    def write(self, directory: str | Path) -> None:
        """Write threshold and veto into a router repository, and the calibration into its `provenance.json`."""
        directory = Path(directory)
        _check_directory(directory)
        record = asdict(replace(self, tried=(), saved=None))
        record |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        dials: dict[str, Any] = {"router_threshold": self.threshold}
        dials |= {} if self.llm_veto is None else {"llm_veto": self.llm_veto}
        found = {
            name: runs.read_json(directory / name) if (directory / name).exists() else {}
            for name in ("provenance.json", "config.json", GENERATION)
        }
        # Dials in the generation settings would win over those in the configuration.
        changes = {"provenance.json": {"calibration": record}, "config.json": dict(dials)}
        changes |= {GENERATION: {name: dials[name] for name in dials if name in found[GENERATION]}}
        if self.saved is not None:
            changes["config.json"]["calibration"] = self.saved
        for name, change in changes.items():
            if change:
                runs.write_json(directory / name, found[name] | change)


def _check_directory(name: str | Path) -> None:
    directory = Path(name).resolve()
    if not str(name) or not (directory / "config.json").is_file():
        raise FileNotFoundError(f"write: expected the directory of a pair, with a config.json, got {str(name)!r}.")
    parents = (directory, *directory.parents)
    if PACKAGE in parents or any(parent.name.startswith("models--") for parent in parents):
        raise ValueError(
            f"write: {name} is part of the installed package or of the Hub's cache. Copy it, and calibrate the copy."
        )


def calibrate(
    model: CiterForCausalLM,
    examples: Sequence[Example],
    checker: Checker | str | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Calibration:
    """Find threshold and veto for a budget, by decoding with them: the decision about a token changes all that follow.

    For a quality or a speed, thresholds and vetoes are chosen on every other problem, and the others, which nothing
    was chosen on, confirm them. `generate(quality=...)` then knows the quality of this pair.

    Args:
        model: The pair with its router.
        examples: Problems like those that the pair will meet.
        checker: The checker that judges the outputs, or its name; only `llm_share` needs none.
        out: Directory, which does not exist yet, for the pair with what was found: a router repository.
        options: The fields of `CalibrateOptions`: exactly one of `quality`, `speedup`, `accuracy` and `llm_share`;
            `write` needs a pair that was loaded from a directory.

    Returns:
        Threshold and veto, and what decoding with them gave.

    Raises:
        ValueError: for options out of range, a target that nothing reaches, or unusable problems.
        FileNotFoundError, ValueError: when the pair was not loaded from a directory that may be written into.
        FileExistsError: when `out` exists.
    """
    settings = CalibrateOptions(**options)
    if settings.llm_share is None and checker is None:
        target = next(name for name in TARGETS if getattr(settings, name) is not None)
        raise ValueError(f"{target}: it needs a checker, which judges whether an output answers a problem.")
    # Before hours of work.
    if settings.write:
        _check_directory(model.name_or_path)
    if out is not None and Path(out).exists():
        raise FileExistsError(f"out: {out} exists. Give a directory that does not exist yet.")
    prompts, check = encode_prompts(model, examples), None if checker is None else named(checker)[1]
    check_answers(check, examples)
    if len(examples) < FEW:
        logger.warning(f"examples: {len(examples)} problems say little; see the interval. Give at least {FEW}.")
    trials = _Trials(Evaluation(model, examples, prompts, check, settings, runs.Work(None, {})))
    if settings.llm_share is not None:
        found = trials.for_share(settings.llm_share)
    elif settings.accuracy is not None:
        found = trials.for_accuracy(settings.accuracy)
    else:
        found = _Search(trials).best(settings.quality, settings.speedup)
    if settings.quality is not None:
        dials = {"router_threshold": found.threshold, "llm_veto": float(found.llm_veto or 0)}
        setting = {"quality": settings.quality, **dials}
        found = replace(found, saved=with_setting(model.config.calibration, pair_of(model), setting))
        model.config.calibration = found.saved
    if out is not None:
        model.save_pretrained(out)
        found.write(out)
    if settings.write:
        found.write(model.name_or_path)
    return found


class _Trials:
    """Decodes all problems with one threshold and veto after the other."""

    def __init__(self, run: Evaluation):
        self.run = run
        self.tried: dict[tuple[float, float], tuple[Point, list[Graded]]] = {}
        (self.llm,) = run.decode("LLM alone", [(run.model, SLM_ALONE, 0.0, "llm")])
        tokens = [one.tokens for one in self.llm]
        self.scores = np.concatenate(score_outputs(run.model, {"": run.model.router}, run.prompts, tokens)[""])

    def threshold(self, share: float) -> float:
        """Return the threshold under which a share of the scores along the LLM's outputs lies."""
        return threshold_for_share(self.scores, share) if share > 0 else SLM_ALONE

    def at(self, threshold: float, veto: float) -> tuple[Point, list[Graded]]:
        """Decode all problems, once for each threshold and veto."""
        dials = (threshold, veto)
        if dials not in self.tried:
            name = f"threshold {threshold:.4g}, veto {veto:g}"
            (outputs,) = self.run.decode(name, [(self.run.model, *dials, None)])
            self.tried[dials] = self.run.point(*dials, outputs), outputs
        return self.tried[dials]

    def with_share(self, share: float) -> Calibration:
        return self.calibration(self.threshold(share), self.run.model.default_veto)

    def calibration(self, threshold: float, veto: float) -> Calibration:
        """Return what decoding all problems gives."""
        point, outputs = self.at(threshold, veto)
        by_llm, lengths = [sum(one.to_llm) for one in outputs], [len(one.to_llm) for one in outputs]
        judged = self.run.checker is not None
        return Calibration(
            threshold=threshold,
            llm_share=point.llm_share,
            llm_share_ci=bootstrap_interval(by_llm, lengths, seed=self.run.options.seed),
            problems=len(outputs),
            accuracy=point.accuracy if judged else None,
            accuracy_ci=point.accuracy_ci if judged else None,
            llm_veto=veto,
            llm_calls=point.llm_calls,
            bytes=point.bytes,
        )

    def for_share(self, wanted: float) -> Calibration:
        """Close in on a share by false position."""
        # Shares of the scores along the LLM's outputs, with the LLM shares of decoding.
        guess, low, high, tried = wanted, (0.0, 0.0), (1.0, 1.0), list[Calibration]()
        for _ in range(MOST_TRIALS):
            tried.append(self.with_share(guess))
            share = tried[-1].llm_share
            if abs(share - wanted) <= NEAR:
                break
            low, high = ((guess, share), high) if share < wanted else (low, (guess, share))
            guess = float(np.interp(wanted, (low[1], high[1]), (low[0], high[0])))
        return min(tried, key=lambda one: abs(one.llm_share - wanted))

    def for_accuracy(self, fraction: float) -> Calibration:
        """Climb shares until one is accurate enough, then look for a cheaper one below."""
        of_llm = fmean(one.correct for one in self.llm)

        def is_enough(share: float) -> bool:
            return (self.with_share(share).accuracy or 0) >= fraction * of_llm

        share = next(filter(is_enough, STAIRS), None)
        if share is None:
            best = max(map(self.with_share, STAIRS), key=lambda one: (one.accuracy or 0, -one.threshold))
            raise ValueError(
                f"accuracy: no threshold reaches {fraction:.1%} of the LLM's accuracy ({of_llm:.1%}). The best is "
                f"{best.summary()}. Ask for less, or train the router."
            )
        failed = max((one for one in STAIRS if one < share), default=share)
        for _ in range(HALVINGS):
            middle = (failed + share) / 2
            failed, share = (failed, middle) if is_enough(middle) else (middle, share)
        return self.with_share(share)


class _Search:
    """Chooses threshold and veto by measured time and accuracy: on every other problem; the others confirm it."""

    def __init__(self, trials: _Trials):
        self.trials, self.run = trials, trials.run
        self.searched, self.fresh = slice(0, None, 2), slice(1 if len(trials.llm) > 1 else 0, None, 2)
        self.vetoes = VETOES if takes_back(CiterCache(self.run.model.config)) else VETOES[:1]
        self.seconds: dict[tuple[float, float], list[float]] = {}
        self.llm_seconds: list[float] = []
        if not any(one.correct for one in trials.llm):
            raise ValueError(
                "examples: the LLM answers none of the problems. Look at a prompt and at what the checker expects."
            )

    def best(self, quality: float | None, speedup: float | None) -> Calibration:
        """Return the fastest setting that keeps a quality, or the most accurate one of a speed."""
        lossless = (LLM_ALONE, 0.0)
        if quality == 1:
            self.time([lossless])
            return self.measured(lossless, quality)
        if quality is not None:
            found = [lossless, *self.of_quality(quality)]
            self.time(found)
            # The fastest first; what does not hold on the fresh problems too is passed over.
            for dials in sorted(found, key=self.time_of):
                if dials == lossless or self.kept(dials, self.fresh) >= quality:
                    return self.measured(dials, quality)
        known = [lossless, *chain.from_iterable(map(self.ladder, self.vetoes))]
        self.time(known)
        enough = [dials for dials in known if self.speedup(dials) >= (speedup or 0)]
        if not enough:
            best = replace(self.measured(max(known, key=self.speedup), None), tried=())
            raise ValueError(f"speedup: no setting is {speedup:g} times as fast as the LLM alone. {best.summary()}")
        # The accuracy of few problems ties often: then the faster.
        chosen = max(enough, key=lambda dials: (self.kept(dials, self.searched), self.speedup(dials)))
        return self.measured(chosen, None)

    def ladder(self, veto: float) -> list[tuple[float, float]]:
        """Return the thresholds for a veto, from cheap to dear."""
        # Above 0 the LLM checks every token, even where none is flagged.
        scores, steps = self.trials.scores, {SLM_ALONE} if veto == 0 else set[float]()
        steps |= {float(np.quantile(scores, share, method="midpoint")) for share in FLAGGED}
        return [(step, veto) for step in sorted(steps) if step > SLM_ALONE or veto == 0]

    def of_quality(self, quality: float) -> Iterable[tuple[float, float]]:
        """Return for each veto the cheapest threshold that keeps a quality, and the next one above it."""
        for veto in self.vetoes:
            enough = (dials for dials in self.ladder(veto) if self.kept(dials, self.searched) >= quality)
            yield from islice(enough, 2)

    def kept(self, dials: tuple[float, float], places: slice) -> float:
        """Return the part of the LLM's accuracy on some of the problems."""
        of_llm = sum(one.correct for one in self.trials.llm[places])
        return sum(one.correct for one in self.trials.at(*dials)[1][places]) / of_llm if of_llm else 1.0

    def time(self, found: Sequence[tuple[float, float]]) -> None:
        """Measure the seconds per token of several settings and of the LLM alone, in turns."""
        prompts = self.run.prompts[self.searched][:TIMED]
        for _ in range(TURNS):
            self.llm_seconds.append(self._seconds(prompts, SLM_ALONE, 0.0, "llm"))
            for dials in found:
                self.seconds.setdefault(dials, []).append(self._seconds(prompts, *dials, None))

    def _seconds(self, prompts: Sequence[Sequence[int]], threshold: float, veto: float, alone: Alone | None) -> float:
        outputs = decode(
            self.run.model,
            prompts,
            router_threshold=threshold,
            llm_veto=veto,
            alone=alone,
            max_new_tokens=self.run.options.max_new_tokens,
            batch_tokens=1,
            paced=True,
        )
        return sum(one.seconds for one in outputs) / sum(len(one.tokens) for one in outputs)

    def time_of(self, dials: tuple[float, float]) -> float:
        return median(self.seconds[dials])

    def speedup(self, dials: tuple[float, float]) -> float:
        return median(self.llm_seconds) / self.time_of(dials)

    def measured(self, dials: tuple[float, float], quality: float | None) -> Calibration:
        """Return what a setting gives on all problems, and on the fresh ones beside the LLM alone."""
        right, of_llm = (
            [one.correct for one in outputs[self.fresh]] for outputs in (self.trials.at(*dials)[1], self.trials.llm)
        )
        known = sum(of_llm) > 0
        return replace(
            self.trials.calibration(*dials),
            quality=quality,
            kept=self.kept(dials, self.fresh) if known else None,
            kept_ci=bootstrap_interval(right, of_llm, seed=self.run.options.seed) if known else None,
            seconds=self.time_of(dials),
            speedup=self.speedup(dials),
            tried=tuple(self.row(one) for one in sorted(self.seconds, key=self.time_of) if one in self.trials.tried),
        )

    def row(self, dials: tuple[float, float]) -> dict[str, str]:
        point, _ = self.trials.at(*dials)
        return {
            "threshold": f"{dials[0]:.5g}",
            "veto": f"{dials[1]:g}",
            "of the LLM's accuracy": f"{self.kept(dials, self.searched):.1%}",
            "on fresh problems": f"{self.kept(dials, self.fresh):.1%}",
            "LLM tokens": f"{point.llm_share:.1%}",
            "LLM passes / token": f"{point.llm_calls:.3f}",
            "MB / token": f"{point.bytes / 1e6:.4g}",
            "ms / token": f"{self.time_of(dials) * 1e3:.3g}",
            "speed": f"{self.speedup(dials):.2f}",
        }
