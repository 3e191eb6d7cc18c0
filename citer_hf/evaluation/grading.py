"""Which texts answer their problems rightly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.checkers import Checker, Verdict, get_checker
from ..data.examples import Example

__all__ = ["Grader", "judge", "name_of"]


class Grader:
    """Lets a checker judge new texts; it does not see the prompts as part of them. No text is judged twice."""

    def __init__(self, checker: Checker | str, examples: Sequence[Example], tokenizer: Any):
        _require_answers(examples)
        self.name = checker if isinstance(checker, str) else name_of(checker)
        self.checker = get_checker(checker) if isinstance(checker, str) else checker
        self.examples, self.tokenizer = examples, tokenizer
        self._known: dict[tuple[int, tuple[int, ...]], Verdict] = {}

    def grade(self, texts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> list[Verdict]:
        """Judge a text for every problem, or for some."""
        problems = range(len(texts)) if rows is None else rows
        keys = [(row, tuple(text)) for row, text in zip(problems, texts, strict=True)]
        new = [key for key in keys if key not in self._known]
        for row, text in new:
            response = self.tokenizer.decode(list(text), skip_special_tokens=True)
            self._known[row, text] = judge(self.checker, response, self.examples[row], self.name)
        return [self._known[key] for key in keys]


def judge(checker: Checker, text: str, example: Example, name: str | None = None) -> Verdict:
    """Let a checker, which may be a user's own, judge one text."""
    name = name_of(checker) if name is None else name
    where = f"at row {example.row} of the data ({example.id!r})"
    try:
        verdict = checker(text, example)
    except Exception as error:
        raise ValueError(
            f"checker {name}: it raised {type(error).__name__} ({error}) {where}, with a text of {len(text)} "
            "characters. A checker must judge any text, also one without an answer. Mend it and run the same again: "
            "what was finished in the output directory is kept."
        ) from error
    if not isinstance(verdict, Verdict):
        raise TypeError(f"checker {name}: expected it to return a Verdict, got {type(verdict).__name__} {where}.")
    return verdict


def name_of(checker: Checker) -> str:
    """Return the name by which a checker can be found: its module and its function or class."""
    named: Any = checker if hasattr(checker, "__qualname__") else type(checker)
    return f"{named.__module__}:{named.__qualname__}"


def _require_answers(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("examples: expected at least one, got none. Is the file empty?")
    for example in examples:
        if not example.answer:
            raise ValueError(
                f"row {example.row}: it has no answer for the checker to compare with. Add the field, or name the "
                "column that holds it (columns={'answer': 'COLUMN'}, --map answer=COLUMN)."
            )
