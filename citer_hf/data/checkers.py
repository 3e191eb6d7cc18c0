r"""Checkers: they decide whether a response gives the right answer.

A checker sees the response alone: a prompt that comes before it is cut off, so nothing in it counts. A response in
which no answer can be found is wrong, whatever the right answer is.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Number

from .boxes import last_boxed
from .custom_checkers import load_function
from .examples import Choices, Example
from .math_process import compare_in_process

__all__ = ["Checker", "Verdict", "get_checker"]


@dataclass(frozen=True)
class Verdict:
    """What a checker found."""

    correct: bool
    extracted: str | None


Checker = Callable[[str, Example], Verdict]

NOTHING = Verdict(correct=False, extracted=None)

# 1,234  12  3.5  .5  1/2  \frac{1}{2}; a minus belongs to the number unless something to subtract from is before it.
NUMBER = re.compile(
    r"(?<![\w.)}\]])-?(?:"
    r"\\[dt]?frac\{(?P<over>-?\d+)\}\{(?P<under>\d+)\}"
    r"|(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?(?<=\d)(?:\s?/\s?(?P<divisor>\d+)(?![\d.]))?"
    r")"
)
CALLED = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*(?=(?P<said>[^\n]*))", re.IGNORECASE)


def get_checker(name: str) -> Checker:
    r"""Return a checker by its name.

    - `math`: what the last `\boxed{}` holds, or else the last number, has the value of the answer (of what follows the
      last `####` in it, if there is one). Numbers are compared exactly, anything else by `math-verify`.
    - `choice`: the label in the last `answer is ...` or `\boxed{}`, or the choice whose text is the response, or the
      last label that stands alone, is the answer.
    - `exact`: response and answer are the same text, but for the form of characters (Unicode NFKC), upper and lower
      case, how much white space there is, and any of `.,;:!?` at the end.
    - `package.module:function`: your own, called as `function(response, answer)`, or `function(response, example)`
      when its second parameter has that name. It returns whether the response is right, or None if it gives no answer.

    Args:
        name: The name.

    Raises:
        ValueError: when there is no such checker.
        ImportError: when `math-verify` is needed and not installed.
    """
    if name in CHECKERS:
        if name == "math" and importlib.util.find_spec("math_verify") is None:
            raise ImportError("math-verify is not installed: pip install 'citer-hf[train]'")
        return CHECKERS[name]
    if ":" in name:
        return _custom(name)
    raise ValueError(
        f"checker: there is no {name!r}. Choose {', '.join(CHECKERS)}, or name a function of your own as "
        "package.module:function."
    )


def check_math(response: str, example: Example) -> Verdict:
    """Compare mathematical answers."""
    answer = _answer_of("math", example)
    answer = last_boxed(answer) or answer.rpartition("####")[2].strip()
    right = _as_number(answer)
    text = _without_prompt(response, example)
    given = last_boxed(text)
    if given is None and right is not None:
        numbers = list(NUMBER.finditer(_plain_signs(text)))
        given = numbers[-1][0] if numbers else ""
    if given == "":
        return NOTHING
    if given is None:
        return Verdict(*compare_in_process(answer, text))
    number = _as_number(given)
    if number is not None and right is not None:
        return Verdict(number == right, given)
    return Verdict(given == answer or compare_in_process(answer, f"${given}$")[0], given)


def check_choice(response: str, example: Example) -> Verdict:
    """Compare the chosen label."""
    answer = _answer_of("choice", example)
    if example.choices is None:
        raise ValueError(f"checker choice: row {example.row} has no choices. Use exact, or data with choices.")
    chosen = chosen_label(_without_prompt(response, example), example.choices)
    return Verdict(chosen == answer, chosen)


def check_exact(response: str, example: Example) -> Verdict:
    """Compare texts."""
    answer = normalized(_answer_of("exact", example))
    given = normalized(_without_prompt(response, example))
    return Verdict(given == answer, given) if given else NOTHING


CHECKERS: dict[str, Checker] = {"math": check_math, "choice": check_choice, "exact": check_exact}


def chosen_label(text: str, choices: Choices) -> str | None:
    """Find which choice a text names."""
    by_text = {normalized(choice): label for label, choice in choices}
    boxed, called = last_boxed(text), [match["said"] for match in CALLED.finditer(text)]
    for said in ([boxed] if boxed else []) + called[::-1]:
        bare = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", said).lstrip(" *_$([{\"'")
        named = _label_at_start(bare, choices) or by_text.get(normalized(bare))
        if named is not None:
            return named
    if normalized(text) in by_text:
        return by_text[normalized(text)]
    # "A" before a word is an article, and "I" is whoever speaks.
    labels = "|".join(re.escape(label) for label, _ in choices)
    alone = re.findall(rf"(?<![\w'’])(?![AI] [a-z])({labels})(?!\w|['’]\w)", text)
    return alone[-1] if alone else None


def _label_at_start(text: str, choices: Choices) -> str | None:
    """Return the label that a text begins with; in the other case, no word may follow, as one follows an article."""
    for label, _ in choices:
        written = (
            rf"(?:[Oo]ption |[Cc]hoice )?\(?(?:{re.escape(label)}|{re.escape(label.swapcase())}(?! \w))(?!\w|['’]\w)"
        )
        if re.match(written, text):
            return label
    return None


def normalized(text: str) -> str:
    """Return a text in the form in which `exact` compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .,;:!?")


def _custom(name: str) -> Checker:
    """Make a checker of a user's function."""
    function, wants_example = load_function(name)

    def check(response: str, example: Example) -> Verdict:
        text = _without_prompt(response, example)
        second = example if wants_example else _answer_of(name, example)
        try:
            found = function(text, second)
        except Exception as error:
            raise ValueError(f"checker {name}: row {example.row}: {type(error).__name__}: {error}") from error
        if found is None:
            return NOTHING
        if not isinstance(found, (bool, Number)) or found not in (True, False):
            raise ValueError(f"checker {name}: row {example.row}: expected True, False or None, got {found!r}.")
        return Verdict(bool(found), text.strip())

    return check


def _answer_of(checker: str, example: Example) -> str:
    if not example.answer:
        raise ValueError(
            f"checker {checker}: row {example.row} has no answer to compare with. Name its column: "
            "columns={'answer': 'COLUMN'} (--map answer=COLUMN)."
        )
    return example.answer


def _without_prompt(response: str, example: Example) -> str:
    """Return what was generated, should the prompt have been left before it."""
    return response.removeprefix(example.prompt or "")


def _plain_signs(text: str) -> str:
    r"""Return a text with the minus of typesetters, and without LaTeX's space in `1{,}000` and `1\,000`."""
    return re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!)(?=\d{3})", "", text.replace("\u2212", "-")).replace("\\!", "")


def _as_number(text: str) -> Fraction | None:
    """Return the value of a text that is one plain number and nothing else, exactly; or None."""
    found = NUMBER.fullmatch(_plain_signs(text).replace("\\$", "").replace("$", "").strip().rstrip(".").strip())
    if found is None:
        return None
    try:
        if found["over"]:
            value = Fraction(int(found["over"]), int(found["under"]))
        else:
            value = Fraction((found["digits"] or "0").replace(",", "") + (found["decimals"] or ""))
            value /= int(found["divisor"] or 1)
    except (ZeroDivisionError, ValueError):
        # Divided by zero, or with more digits than Python reads.
        return None
    return -value if found[0].startswith("-") else value
