"""`calibrate`: the threshold for a budget, an LLM share or a fraction of the LLM's accuracy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from citer_hf import runs
from citer_hf.data.checkers import Checker
from citer_hf.data.examples import Example
from citer_hf.model.modeling import CiterForCausalLM

from .decode import DecodeOptions, Output, decode, encode_prompts, score_outputs, scores_of, threshold_for_share
from .evaluate import Grader
from .results import bootstrap_interval

# Decodes of all problems, at most, and the difference at which a share is near enough.
MOST_TRIALS = 8
NEAR = 0.003
# Shares that are tried in turn until one is accurate enough; then the gap below it is halved.
STAIRS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.95)
HALVINGS = 4
PACKAGE = Path(__file__).resolve().parents[1]
GENERATION = "generation_config.json"
OWN = "of the pair"
FILES = ("provenance.json", "config.json", GENERATION)


@dataclass(frozen=True)
class CalibrateOptions(DecodeOptions):
    """Options of `citer calibrate`."""

    llm_share: float | None = runs.option(None, "Share of the tokens that the LLM should decide.", "P")
    accuracy: float | None = runs.option(None, "Fraction of the LLM's accuracy to reach as cheaply as possible.", "P")
    write: bool = runs.option(False, "Write the threshold into MODEL, a directory.")
    out: Path | None = runs.option(None, "Copy MODEL, a directory, here and write the threshold into the copy.", "DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.wanted) != 1:
            raise ValueError(f"llm_share, accuracy: expected exactly one, got {sorted(self.wanted) or 'neither'}.")
        for name, value in self.wanted.items():
            if not 0 < value < 1:
                raise ValueError(f"{name}: expected a number above 0 and below 1, such as 0.2 or 0.95, got {value!r}.")

    @property
    def wanted(self) -> dict[str, float]:
        """The budget, by its name."""
        budgets = {"llm_share": self.llm_share, "accuracy": self.accuracy}
        return {name: value for name, value in budgets.items() if value is not None}


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what decoding with it gave on the problems.

    Args:
        threshold: The threshold.
        llm_share: The LLM share, with its 95 % interval in `llm_share_ci`.
        problems: The number of problems.
        accuracy: The accuracy, with its 95 % interval in `accuracy_ci`, when there was a checker.
        llm_accuracy: The accuracy of the LLM alone, when an accuracy was wanted.
        wanted: The budget, by its name.
        data_sha256: The sha256 of the problems and their prompts.
    """

    threshold: float
    llm_share: float
    llm_share_ci: tuple[float, float]
    problems: int
    accuracy: float | None = None
    accuracy_ci: tuple[float, float] | None = None
    llm_accuracy: float | None = None
    wanted: Mapping[str, float] | None = None
    data_sha256: str | None = None

    def summary(self) -> str:
        """Return the threshold, LLM share and accuracy as text."""
        low, high = self.llm_share_ci
        text = (
            f"router_threshold {self.threshold:.6g}: the LLM share is {self.llm_share:.1%} ({low:.1%} to {high:.1%})"
        )
        if self.accuracy is not None and self.accuracy_ci is not None:
            low, high = self.accuracy_ci
            text += f"\naccuracy {self.accuracy:.1%} ({low:.1%} to {high:.1%}) of {self.problems} problems"
        return text

    def write(self, directory: str | Path) -> None:
        """Write the threshold into a router repository, and the calibration into its `provenance.json`.

        Args:
            directory: The router repository, which is not the one in the installed package.

        Raises:
            FileNotFoundError: when the directory holds no `config.json`.
            ValueError: when the directory is part of the installed package or of the Hub's cache, or when one of its
                files is broken. All files are as they were then.
        """
        directory = Path(directory)
        _check_directory(directory)
        record = asdict(self) | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        threshold: dict[str, Any] = {"router_threshold": self.threshold}
        changes = {"provenance.json": {"calibration": record}, "config.json": threshold}
        found = {name: runs.read_json(directory / name) for name in FILES if (directory / name).exists()}
        # A threshold in the generation settings would win over the one in the configuration.
        if "router_threshold" in found.get(GENERATION, {}):
            changes[GENERATION] = threshold
        for name, change in changes.items():
            runs.write_json(directory / name, found.get(name, {}) | change)


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: expected a router repository on this machine, with a config.json.")
    parents = (directory.resolve(), *directory.resolve().parents)
    if PACKAGE in parents or any(parent.name.startswith("models--") for parent in parents):
        owner = "the installed package" if PACKAGE in parents else "the Hub's cache"
        raise ValueError(
            f"write: {directory} is part of {owner}. Pass out=DIR (--out DIR) to write the threshold into a copy."
        )


def calibrate(
    model: CiterForCausalLM,
    examples: Sequence[Example],
    checker: Checker | str | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Calibration:
    """Find the threshold for a budget, by decoding with it: the decision about a token changes all that follow.

    Args:
        model: The pair with its router.
        examples: Problems like those that the pair will meet.
        checker: The checker that judges the outputs, or its name; needed for `accuracy`.
        tokenizer: Default: the pair's.
        options: The fields of `CalibrateOptions`: exactly one of `llm_share` (the share of tokens that the LLM should
            decide) and `accuracy` (the cheapest threshold that reaches this fraction of the LLM's accuracy); `write`
            (write the threshold into the directory that the pair was loaded from), `out` (write it into a copy of that
            directory), `max_new_tokens` (512), `batch_tokens` and `seed` (of the bootstrap).

    Returns:
        The threshold and what decoding with it gave.

    Raises:
        ValueError: for options out of range, an `accuracy` without a checker or that no threshold reaches, unusable
            problems, or a pair whose directory must not or cannot be written into.
        FileExistsError: when `out` exists.
    """
    settings = CalibrateOptions(**options)
    if settings.accuracy is not None and checker is None:
        raise ValueError("accuracy: it needs a checker, which judges whether an output answers a problem.")
    if not examples:
        raise ValueError("examples: expected at least one, got none. Is the file empty?")
    directory = _directory_of(model, settings)
    tokenizer = tokenizer if tokenizer is not None else model.load_tokenizer()
    grader = None if checker is None else Grader(checker, examples, tokenizer)
    prompts = encode_prompts(model, examples, tokenizer)
    with runs.progress_bar() as progress:
        trials = _Trials(model, prompts, grader, settings, progress)
        found = trials.for_share(settings.llm_share) if settings.llm_share is not None else trials.for_accuracy()
    data = [[asdict(example), prompt] for example, prompt in zip(examples, prompts, strict=True)]
    found = replace(found, wanted=settings.wanted, data_sha256=runs.sha256_of(data))
    if directory is not None and settings.write:
        found.write(directory)
    if directory is not None and settings.out is not None:
        _write_copy(found, directory, Path(settings.out))
    return found


def _directory_of(model: CiterForCausalLM, settings: CalibrateOptions) -> Path | None:
    """Return the directory whose threshold is to be written or copied, or raise why not before hours of work."""
    if not settings.write and settings.out is None:
        return None
    directory, out = Path(model.name_or_path), settings.out
    if not model.name_or_path or not directory.is_dir():
        raise ValueError(
            f"write, out: expected a pair that was loaded from a directory, got {model.name_or_path!r}, which is no "
            "directory. Save the pair with model.save_pretrained(DIR) and load it from there."
        )
    if settings.write:
        _check_directory(directory)
    if out is not None and Path(out).exists():
        raise FileExistsError(f"out: {out} exists already. Choose another directory, or remove it.")
    if out is not None and PACKAGE in Path(out).resolve().parents:
        raise ValueError(f"out: {out} is part of the installed package. Choose another directory.")
    return directory


def _write_copy(found: Calibration, directory: Path, out: Path) -> None:
    """Copy a router repository and write a threshold into the copy, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        copy = shutil.copytree(directory, Path(beside) / out.name)
        found.write(copy)
        copy.rename(out)


@dataclass
class _Trials:
    """Decodes all problems with one threshold after the other."""

    model: CiterForCausalLM
    prompts: list[list[int]]
    grader: Grader | None
    settings: CalibrateOptions
    progress: runs.Progress

    def __post_init__(self) -> None:
        self.tried: dict[float, list[Output]] = {}
        self.llm = self._decode("LLM alone", alone="llm")
        routers, tokens = {OWN: self.model.router}, [one.tokens for one in self.llm]
        self.scores = np.sort(
            score_outputs(self.model, routers, self.prompts, tokens, self.settings.batch_tokens)[OWN]
        )

    def _decode(self, name: str, **options: Any) -> list[Output]:
        self.progress.begin(name, len(self.prompts))
        options |= {"max_new_tokens": self.settings.max_new_tokens, "batch_tokens": self.settings.batch_tokens}
        return decode(self.model, self.prompts, progress=self.progress.advance, **options)

    def at(self, threshold: float) -> list[Output]:
        """Decode with a threshold, once."""
        if threshold not in self.tried:
            outputs = self.tried[threshold] = self._decode(f"threshold {threshold:.5g}", router_threshold=threshold)
            scores_of(OWN, outputs)  # raises an error for NaN
        return self.tried[threshold]

    def for_share(self, wanted: float) -> Calibration:
        """Close in on a share; the scores of the last outputs say best which threshold comes next."""
        low, high = 0.0, float(np.nextafter(np.float32(self.scores[-1]), np.float32(2)))
        threshold = threshold_for_share(self.scores, wanted)
        while len(self.tried) < MOST_TRIALS and threshold not in self.tried:
            outputs = self.at(threshold)
            share = _share(outputs)
            if abs(share - wanted) <= NEAR:
                break
            low, high = (threshold, high) if share < wanted else (low, threshold)
            threshold = threshold_for_share(np.sort(scores_of(OWN, outputs)), wanted)
            if not low < threshold < high:
                threshold = float(np.float32((low + high) / 2))
        return self._calibration(min(self.tried, key=lambda one: abs(_share(self.tried[one]) - wanted)))

    def for_accuracy(self) -> Calibration:
        """Climb shares until one is accurate enough, then look for a cheaper one below."""
        of_llm = fmean(self._correct(self.llm))
        wanted = float(self.settings.accuracy or 0) * of_llm
        failed = 0.0
        for reached in STAIRS:
            if self._accuracy(reached) >= wanted:
                break
            failed = reached
        else:
            best = max(self.tried, key=lambda one: (fmean(self._correct(self.tried[one])), -one))
            raise ValueError(
                f"accuracy: no threshold reaches {self.settings.accuracy:.1%} of the LLM's accuracy ({of_llm:.1%}). "
                f"The best is {best:.6g}, with an accuracy of {fmean(self._correct(self.tried[best])):.1%} and "
                f"{_share(self.tried[best]):.1%} LLM tokens. Ask for less, use the LLM alone, or train the router."
            )
        for _ in range(HALVINGS if reached > 0 else 0):
            middle = (failed + reached) / 2
            failed, reached = (failed, middle) if self._accuracy(middle) >= wanted else (middle, reached)
        return replace(self._calibration(self._threshold(reached)), llm_accuracy=of_llm)

    def _threshold(self, share: float) -> float:
        return threshold_for_share(self.scores, share) if share > 0 else 0.0

    def _accuracy(self, share: float) -> float:
        return fmean(self._correct(self.at(self._threshold(share))))

    def _correct(self, outputs: Sequence[Output]) -> list[float]:
        assert self.grader is not None
        return [float(verdict.correct) for verdict in self.grader.grade([one.tokens for one in outputs])]

    def _calibration(self, threshold: float) -> Calibration:
        outputs, seed = self.tried[threshold], self.settings.seed
        by_llm, lengths = [sum(one.to_llm) for one in outputs], [len(one.to_llm) for one in outputs]
        correct = None if self.grader is None else self._correct(outputs)
        return Calibration(
            threshold=threshold,
            llm_share=_share(outputs),
            llm_share_ci=bootstrap_interval(by_llm, lengths, seed=seed),
            problems=len(self.prompts),
            accuracy=None if correct is None else fmean(correct),
            accuracy_ci=None if correct is None else bootstrap_interval(correct, seed=seed),
        )


def _share(outputs: Sequence[Output]) -> float:
    return sum(sum(one.to_llm) for one in outputs) / sum(len(one.to_llm) for one in outputs)
