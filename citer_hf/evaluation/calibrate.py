"""`calibrate`: the threshold for a budget, an LLM share or a fraction of the LLM's accuracy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from citer_hf import runs
from citer_hf.data.checkers import Checker, named
from citer_hf.data.examples import Example
from citer_hf.model.modeling import CiterForCausalLM

from .decode import DecodeOptions, encode_prompts, score_outputs, threshold_for_share
from .evaluate import Evaluation
from .results import bootstrap_interval

# The most thresholds that are tried for a share, and the difference at which it is near enough.
MOST_TRIALS, NEAR = 8, 0.003
# Shares that are tried in turn until one is accurate enough; then the gap below it is halved so often.
STAIRS, HALVINGS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.95), 4
PACKAGE = Path(__file__).resolve().parents[1]
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class CalibrateOptions(DecodeOptions):
    llm_share: float | None = runs.option(None, "Share of the tokens that the LLM should decide.", "P")
    accuracy: float | None = runs.option(None, "Fraction of the LLM's accuracy to reach as cheaply as possible.", "P")
    write: bool = runs.option(False, "Write the threshold into MODEL, a directory.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [one for one in (self.llm_share, self.accuracy) if one is not None]
        if len(given) != 1 or not 0 < given[0] < 1:
            raise ValueError(f"llm_share, accuracy: expected exactly one, above 0 and below 1, got {given}.")


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what decoding with it gave on the problems, with 95 % intervals."""

    threshold: float
    llm_share: float
    llm_share_ci: tuple[float, float]
    problems: int
    accuracy: float | None = None  # with a checker
    accuracy_ci: tuple[float, float] | None = None

    def summary(self) -> str:
        """Return the threshold, LLM share and accuracy as text."""
        low, high = self.llm_share_ci
        text = f"router_threshold {self.threshold:.6g}: LLM share {self.llm_share:.1%} ({low:.1%} to {high:.1%})"
        if self.accuracy is not None and self.accuracy_ci is not None:
            low, high = self.accuracy_ci
            text += f", accuracy {self.accuracy:.1%} ({low:.1%} to {high:.1%})"
        return f"{text}; {self.problems} problems"

    def write(self, directory: str | Path) -> None:
        """Write the threshold into a router repository, and the calibration into its `provenance.json`."""
        directory = Path(directory)
        _check_directory(directory)
        record = asdict(self) | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        threshold: dict[str, Any] = {"router_threshold": self.threshold}
        changes = {"provenance.json": {"calibration": record}, "config.json": threshold, GENERATION: threshold}
        found = {name: runs.read_json(directory / name) if (directory / name).exists() else {} for name in changes}
        # A threshold in the generation settings would win over the one in the configuration.
        if "router_threshold" not in found[GENERATION]:
            del changes[GENERATION]
        for name, change in changes.items():
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
    model: CiterForCausalLM, examples: Sequence[Example], checker: Checker | str | None = None, **options: Any
) -> Calibration:
    """Find the threshold for a budget, by decoding with it: the decision about a token changes all that follow.

    Args:
        model: The pair with its router.
        examples: Problems like those that the pair will meet.
        checker: The checker that judges the outputs, or its name; needed for `accuracy`.
        options: The fields of `CalibrateOptions`: exactly one of `llm_share` and `accuracy`; `write` needs a pair
            that was loaded from a directory.

    Returns:
        The threshold and what decoding with it gave.

    Raises:
        ValueError: for options out of range, an `accuracy` that no threshold reaches, or unusable problems.
        FileNotFoundError, ValueError: when the pair was not loaded from a directory that may be written into.
    """
    settings = CalibrateOptions(**options)
    if settings.accuracy is not None and checker is None:
        raise ValueError("accuracy: it needs a checker, which judges whether an output answers a problem.")
    if settings.write:
        # Before hours of work.
        _check_directory(model.name_or_path)
    prompts, check = encode_prompts(model, examples), None if checker is None else named(checker)[1]
    trials = _Trials(Evaluation(model, examples, prompts, check, settings, runs.Work(None, {})))
    if settings.llm_share is not None:
        found = trials.for_share(settings.llm_share)
    else:
        found = trials.for_accuracy(settings.accuracy or 0)
    if settings.write:
        found.write(model.name_or_path)
    return found


class _Trials:
    """Decodes all problems with one threshold after the other."""

    def __init__(self, run: Evaluation):
        self.run = run
        self.tried: dict[float, Calibration] = {}
        (self.llm,) = run.decode("LLM alone", [(run.model, 0.0, 0.0, "llm")])
        tokens = [one.tokens for one in self.llm]
        self.scores = np.concatenate(score_outputs(run.model, {"": run.model.router}, run.prompts, tokens)[""])

    def at(self, share: float) -> Calibration:
        """Decode with the threshold under which a share of the scores along the LLM's outputs lies."""
        threshold = threshold_for_share(self.scores, share) if share > 0 else 0.0
        if threshold not in self.tried:
            dials = (threshold, self.run.model.default_veto, None)
            (outputs,) = self.run.decode(f"threshold {threshold:.9g}", [(self.run.model, *dials)])
            point = self.run.point(*dials[:2], outputs)
            by_llm, lengths = [sum(one.to_llm) for one in outputs], [len(one.to_llm) for one in outputs]
            judged = self.run.checker is not None
            self.tried[threshold] = Calibration(
                threshold=threshold,
                llm_share=point.llm_share,
                llm_share_ci=bootstrap_interval(by_llm, lengths, seed=self.run.options.seed),
                problems=len(outputs),
                accuracy=point.accuracy if judged else None,
                accuracy_ci=point.accuracy_ci if judged else None,
            )
        return self.tried[threshold]

    def for_share(self, wanted: float) -> Calibration:
        """Close in on a share by false position."""
        # Shares of the scores along the LLM's outputs, with the LLM shares of decoding.
        guess, low, high = wanted, (0.0, 0.0), (1.0, 1.0)
        for _ in range(MOST_TRIALS):
            share = self.at(guess).llm_share
            if abs(share - wanted) <= NEAR:
                break
            low, high = ((guess, share), high) if share < wanted else (low, (guess, share))
            guess = float(np.interp(wanted, (low[1], high[1]), (low[0], high[0])))
        return min(self.tried.values(), key=lambda one: abs(one.llm_share - wanted))

    def for_accuracy(self, fraction: float) -> Calibration:
        """Climb shares until one is accurate enough, then look for a cheaper one below."""
        of_llm = fmean(one.correct for one in self.llm)

        def is_enough(share: float) -> bool:
            return (self.at(share).accuracy or 0) >= fraction * of_llm

        share = next(filter(is_enough, STAIRS), None)
        if share is None:
            best = max(self.tried.values(), key=lambda one: (one.accuracy or 0, -one.threshold))
            raise ValueError(
                f"accuracy: no threshold reaches {fraction:.1%} of the LLM's accuracy ({of_llm:.1%}). The best is "
                f"{best.summary()}. Ask for less, or train the router."
            )
        failed = max((one for one in STAIRS if one < share), default=share)
        for _ in range(HALVINGS):
            middle = (failed + share) / 2
            failed, share = (failed, middle) if is_enough(middle) else (middle, share)
        return self.at(share)
