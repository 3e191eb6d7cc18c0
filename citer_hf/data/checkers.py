"""Checkers: they decide whether a response gives the right answer.

A checker sees the response alone: a prompt that comes before it is cut off, so nothing in it counts. A response in
which no answer can be found is wrong, whatever the right answer is.
"""

import inspect
import os
import pkgutil
import re
import sys
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..runs import import_extra
from .examples import Choices, Example, last_boxed


@dataclass(frozen=True)
class Verdict:
    """The decision of a checker."""

    correct: bool
    extracted: str | None  # the answer that was found in the response


Checker = Callable[[str, Example], Verdict]

NOTHING = Verdict(correct=False, extracted=None)

# 1,234  12  3.5  .5  1/2  \frac{1}{2}; a minus belongs to the number unless something to subtract from is before it.
NUMBER = re.compile(
    r"(?<![\w.)}\]])-?(?:\\[dt]?frac\{-?\d+\}\{\d+\}"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?<=\d)(?:\s?/\s?\d+(?![\d.]))?)"
)
# Seconds that math-verify may take to parse or to compare: SymPy would work on `10^{10^{10}}` for ever.
SECONDS = 10
CALLED = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*(?=(?P<said>[^\n]*))", re.IGNORECASE)


def get_checker(name: str) -> Checker:
    """Return a checker by its name.

    Args:
        name: `math`, `choice` or `exact` (their rules: `docs/data.md`), or `package.module:function` for your own,
            called as `function(response, answer)`, or as `function(response, example)` when its second parameter has
            that name. It returns True when the response is right, or None when it gives no answer.
    """
    if ":" in name:
        return _custom(name)
    if name == "math":
        import_extra("math_verify", "train")
    if name not in CHECKERS:
        raise ValueError(f"checker: there is no {name!r}. Choose {', '.join(CHECKERS)}, or package.module:function.")
    return CHECKERS[name]


def named(checker: Checker | str) -> tuple[str, Checker]:
    """Return the name of a checker and the checker, given either; a function's name has its module."""
    if isinstance(checker, str):
        return checker, get_checker(checker)
    of: Any = checker if hasattr(checker, "__qualname__") else type(checker)
    return f"{of.__module__}:{of.__qualname__}", checker


def check_math(response: str, example: Example) -> Verdict:
    answer = answer_of("math", example)
    answer = last_boxed(answer) or answer.rpartition("####")[2].strip()
    right = _as_number(answer)
    text = response.removeprefix(example.prompt or "")
    given = last_boxed(text)
    if given is None and right is not None:
        numbers = list(NUMBER.finditer(_plain_signs(text)))
        given = numbers[-1][0] if numbers else ""
    if given == "":
        return NOTHING
    if given is None:
        return Verdict(*same_expression(answer, text))
    number = _as_number(given)
    if number is not None and right is not None:
        return Verdict(number == right, given)
    return Verdict(given == answer or same_expression(answer, f"${given}$")[0], given)


def check_choice(response: str, example: Example) -> Verdict:
    answer = answer_of("choice", example)
    if example.choices is None:
        raise ValueError(f"checker choice: row {example.row} has no choices. Use exact, or data with choices.")
    chosen = chosen_label(response.removeprefix(example.prompt or ""), example.choices)
    return Verdict(chosen == answer, chosen)


def check_exact(response: str, example: Example) -> Verdict:
    answer = normalized(answer_of("exact", example))
    given = normalized(response.removeprefix(example.prompt or ""))
    return Verdict(given == answer, given) if given else NOTHING


CHECKERS: dict[str, Checker] = {"math": check_math, "choice": check_choice, "exact": check_exact}


def chosen_label(text: str, choices: Choices) -> str | None:
    by_text = {normalized(choice): label for label, choice in choices}
    boxed, called = last_boxed(text), [match["said"] for match in CALLED.finditer(text)]
    for said in ([boxed] if boxed else []) + called[::-1]:
        bare = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", said).lstrip(" *_$([{\"'")
        for label, _ in choices:
            # In the other case no word may follow, as one follows an article.
            either = rf"{re.escape(label)}|{re.escape(label.swapcase())}(?! \w)"
            if re.match(rf"(?:[Oo]ption |[Cc]hoice )?\(?(?:{either})(?!\w|['’]\w)", bare):
                return label
        if normalized(bare) in by_text:
            return by_text[normalized(bare)]
    if normalized(text) in by_text:
        return by_text[normalized(text)]
    # "A" before a word is an article, and "I" is whoever speaks.
    labels = "|".join(re.escape(label) for label, _ in choices)
    alone = re.findall(rf"(?<![\w'’])(?![AI] [a-z])({labels})(?!\w|['’]\w)", text)
    return alone[-1] if alone else None


def normalized(text: str) -> str:
    """Return a text in the form in which `exact` compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?")


def _custom(name: str) -> Checker:
    """Make a checker of a user's function; modules in the current directory are found too."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = pkgutil.resolve_name(name)
        _, second, *_ = inspect.signature(function).parameters
    except (AttributeError, ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"checker {name}: expected module:function, a function of (response, answer) or (response, example) in "
            f"{here} or what is installed, got {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)

    def check(response: str, example: Example) -> Verdict:
        text = response.removeprefix(example.prompt or "")
        found = function(text, example if second == "example" else answer_of(name, example))
        if found not in (True, False, None):
            raise ValueError(f"checker {name}: row {example.row}: expected True, False or None, got {found!r}.")
        return Verdict(bool(found), None if found is None else text.strip())

    return check


def same_expression(answer: str, response: str) -> tuple[bool, str | None]:
    """Compare what a response says with an answer by math-verify, and return what was found in the response."""
    math_verify = import_extra("math_verify", "train")
    # math-verify keeps time with signals, which the main thread alone receives.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    given = math_verify.parse(response, parsing_timeout=seconds)
    right = math_verify.parse(f"${answer}$", parsing_timeout=seconds)
    return math_verify.verify(right, given, timeout_seconds=seconds), str(given[-1]) if given else None


def answer_of(checker: str, example: Example) -> str:
    if not example.answer:
        raise ValueError(f"row {example.row}: no answer for the checker {checker}. Name its column: --map answer=X.")
    return example.answer


def _plain_signs(text: str) -> str:
    r"""Return a text with the minus of typesetters, and without LaTeX's space in `1{,}000` and `1\,000`."""
    return re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!)(?=\d{3})", "", text.replace("\u2212", "-")).replace("\\!", "")


def _as_number(text: str) -> Fraction | None:
    """Return the value of a text that is one plain number and nothing else, exactly; or None."""
    found = NUMBER.fullmatch(_plain_signs(text).replace("\\$", "").replace("$", "").strip().rstrip(".").strip())
    plain = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", found[0] if found else "")
    try:
        return Fraction("".join(plain.replace(",", "").split()))
    except (ZeroDivisionError, ValueError):
        # No number, divided by zero, or with more digits than Python reads.
        return None
