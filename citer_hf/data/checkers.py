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
from functools import partial
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

# Letters of scripts without spaces between words, which stand right beside a number or a label.
DENSE = "\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff"
# One form for what is written in many, in this order; NFKC comes after the first four.
BEFORE_NFKC = {
    "[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+": r"^{\g<0>}",  # superscripts
    "(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])": " ",  # 2½ is 2 1/2
    "(?<=\\d)(?:\\{,\\}|\\\\,|\\\\!|['\u00a0\u2009\u202f])(?=\\d{3}(?!\\d))": "",  # 1{,}000  1\,000  1'000
    r"\\!": "",
}
AFTER_NFKC = {
    r"\+/-": r"\\pm ",
    r"-\\?\$(?=\d)": "-",
    r"\u221a\s*(\d+|\w|\([^()]*\))": r"\\sqrt{\1}",
    r"(?<!\\)\\[()\[\]]": "$",
    r"(?<=\d) ?[x\u00b7\u22c5] ?(?=10(?:\^|\*\*))": r"\\times ",
    r"(?<=\d)(?: m| ?(?:[kcdm]m|ft|in))\^\{?[23]\}?": " ",  # areas and volumes
    r"(?i)(?<=:\d\d) ?(?:\\text\{)? ?([ap])\.?m\b\.?\}?": r"\\text{\1m}",
    r"(\\[cdt]?frac)\s*(?:(\w|\\pi)|\{([^{}]*)\})\s*(?:(\w|\\pi)|\{([^{}]*)\})": r"\1{\2\3}{\4\5}",
    rf"(?<=[{DENSE}])(?=[-\w\\$])(?![{DENSE}])|(?<=[A-Za-z\d%])(?=[{DENSE}])": " ",
}
TEX = ["times", "pm", "pi", "infty", "le", "ge", "approx", "div"]
SIGNS = {
    ord(sign): rf"\{name} " for sign, name in zip("\u00d7\u00b1\u03c0\u221e\u2264\u2265\u2248\u00f7", TEX, strict=True)
}
SIGNS |= {
    ord(sign): form
    for sign, form in zip("\u2212\u2044\u3002\u3001\u53c8~", ["-", "/", ". ", ", ", " ", " "], strict=True)
}

# 1,234  1 234  3.5  3,5  .5; 1/2  2 1/2  \frac{1}{2}; 2^{10}  5 \times 10^3  5e3; 5%. A minus belongs to the number
# unless something to subtract from is before it.
POWER = r" ?(?:\^|\*\*) ?(?:\{ ?-?\d{1,4} ?\}|-?\d{1,4}(?!\d))"
NUMBER = re.compile(
    rf"(?<![\w.)}}\]^])(?<![\^_]\{{)-?(?:(?:\d+ ?)?\\[cdt]?frac\{{-?\d+\}}\{{\d+(?:{POWER})?\}}|\d+ \d+/\d+(?!\d)"
    r"|(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d/])|\d+,\d+(?![\d,])|\d+)?(?:\.\d+)?(?<=\d)"
    rf"(?: ?/ ?\d+(?![\d.]))?)(?:{POWER})?(?: ?(?:\\times|\\cdot|\*) ?10(?:{POWER})|[eE][-+]?\d{{1,4}}(?!\d))?"
    r"(?: ?(?:\\?%|per ?cent\b))?"
)
# The same without LaTeX: sign, whole part of a mixed number, fraction, powers, percent.
VALUE = re.compile(
    r"(-?) *(?:(\d+) +(?=\d+ */))?(-?[\d.]+)(?: */ *(\d+))?(?: *\^ *(-?\d+))?(?: *\* *10 *\^ *([-+]?\d+))? *(%?)"
)
UNIT = rf"(?<=[\d}}])(?: (?!pi\b)(?:[mgshL](?:/[sh])?|[A-Za-z]{{2}}[A-Za-z ./]*)| ?[{DENSE}]+)$"
CLOCK = re.compile(r"0*(\d{1,2}(?::\d\d){1,2})(?:\\text\{([ap])m\})?", re.IGNORECASE)
ATOM = (
    r"\\(?:text|mathrm)\{[^{}]*\}|\\(?!text|mathrm|f?box)(?:[A-Za-z]+|[^A-Za-z\n])|[-+*/^_=<>(){}\[\]|%,;'\d\u00b0]"
    r"|[.:!](?=\S)|(?<![^\W\d_])[A-Za-z](?![^\W\d_]| +\w|'\w)"
)
# A formula, in dollars or bare, and the signs that make it more than some numbers.
FORMULA = re.compile(rf"\$\$?(?P<inside>(?:(?:{ATOM})\s*)+)\$\$?|(?![\^_,;}}\])])(?:(?:{ATOM}) *)+")
WHOLE = re.compile(r"[=^]|\\[^$%]|\d:\d|\di\b")
EQUALS = re.compile(r"(?<![<>!])=|\\approx|\\(?:implies|Rightarrow)(?![a-z])")
# Seconds that math-verify may take to parse or to compare: SymPy would work on `10^{10^{10}}` for ever.
SECONDS = 10

CALLED = re.compile(
    r"(?:(?:answer|(?:correct|right|best) (?:option|choice)|respuesta|resposta|risposta|réponse|antwort|ответ"
    r"|đáp án)[\s*_]*(?:is|=|es|est|é|è|ist|lautet|là|:)(?!\w)|(?:答案|答え|正解|정답|ค.{1,2}ตอบ)\s*"
    r"(?:应该|應該|就)?[是为為选選は은]?(?:คือ)?|(?<!不)[选選]择?)\s*:?\s*(?=(?P<said>[^\n]{0,400}))",
    re.IGNORECASE,
)
HASHES = re.compile(r"####(?![ *]*\d+[.:] +\S)[ *]*(?=(?P<said>[-$€£¥(\\.\d][^\n]*))")
# Where a model runs on after its answer: a token that ends a turn, or the next question.
NEXT = re.compile(
    r"<(?:\|(?:im_start|im_end|eot_id|end[^|>\s]*)\||/s|eos|pad|end_of_turn)>|^[^\w\n]{0,9}(?:question|q|problem|exercise"
    r"|instruction|input|user|human|frage|pregunta|pergunta|domanda|вопрос|问题|题目|問題|質問|문제|질문|โจทย์|ค.{1,2}ถาม)"
    r"[ *_]*\d*[ *_]*:",
    re.IGNORECASE | re.MULTILINE,
)
# What may follow the text of a choice, so that it is the choice.
AFTER = (
    rf"[\"'\u201d\u2019\u300d\u300f\u300b*_]*\s*(?:$|[.!;]|,? (?:because|since|not)\b|, *[{DENSE}]"
    r"|です|だ|입니다|이다|예요|ครับ|ค่ะ)"
)


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
    answer = _plain(last_boxed(answer) or answer.rpartition("####")[2]).strip()
    right = _as_number(answer)
    for part in _parts(response, example):
        if right is None and normalized(_bare(answer)) in [normalized(said) for said in (part, *_called(part))]:
            return Verdict(correct=True, extracted=answer)
        given = _given(part, number=bool(right or CLOCK.fullmatch(answer)))
        if given:
            return Verdict(_same(answer, given), given)
    return NOTHING


def check_choice(response: str, example: Example) -> Verdict:
    answer = answer_of("choice", example)
    if example.choices is None:
        raise ValueError(f"checker choice: row {example.row} has no choices. Use exact, or data with choices.")
    found = (chosen_label(part, example.choices) for part in _parts(response, example))
    chosen = next(filter(None, found), None)
    return Verdict(chosen == answer, chosen)


def check_exact(response: str, example: Example) -> Verdict:
    answer = normalized(answer_of("exact", example))
    given = normalized(response.removeprefix(example.prompt or ""))
    return Verdict(given == answer, given) if given else NOTHING


CHECKERS: dict[str, Checker] = {"math": check_math, "choice": check_choice, "exact": check_exact}


def chosen_label(text: str, choices: Choices) -> str | None:
    """Return the label of the choice that a text in `_plain` form names."""
    by_text = {normalized(_plain(choice)): label for label, choice in choices if normalized(choice)}
    # "A" before a word is an article, and "I" is whoever speaks; so they are in the other case.
    speech = {"A": r"(?! \w)", "I": r"(?! \w)"}
    cases = {
        label: rf"{re.escape(label)}|{re.escape(label.swapcase())}{speech.get(label, '')}" for label, _ in choices
    }
    forms = {label: rf"(?:{either})(?!\w|['’]\w)" for label, either in cases.items()}
    boxed = last_boxed(text)
    for said in ([boxed] if boxed else []) + _called(text)[::-1]:
        bare = _bare(said).lstrip(" *_$([{\"'`\u201c\u2018\u300c\u300e\u300a")
        for label, form in forms.items():
            if re.match(rf"(?i:option |choice )?\(?{form}", bare):
                return label
        for choice in sorted(by_text, key=len, reverse=True):
            if re.match(rf"{re.escape(choice)}{AFTER}", normalized(bare)):
                return by_text[choice]
    if normalized(text) in by_text:
        return by_text[normalized(text)]
    for label, form in forms.items():
        if re.match(rf"[\W_]*(?i:option |choice )?{form}[^\w\n]*(?:\n|$)", text):
            return label
    of = r"(?<!\w){}[\W_]+(?i:{})"
    listed = [
        label for choice, label in by_text.items() if re.search(of.format(forms[label], re.escape(choice)), text)
    ]
    if len(listed) == 1:
        return listed[0]
    labels, others = ("|".join(re.escape(one) for one in some) for some in (forms, map(str.swapcase, forms)))
    alone = re.findall(rf"(?<![\w'’])(?:(?![AI] [a-z])({labels})(?!\w|['’]\w)|({labels}|{others})\))", text)
    alone = alone or re.findall(rf"(?<![\w'’])(?![ai]\b)({others})()(?!\w|['’]\w)", text)
    return next((label for label in forms if alone and label.casefold() == "".join(alone[-1]).casefold()), None)


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


def same_expression(answer: str, given: str) -> bool:
    """Return True if math-verify finds a formula, or the last formulas of a text, equal to an answer."""
    math_verify = import_extra("math_verify", "train")
    # math-verify keeps time with signals, which the main thread alone receives.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    read = partial(math_verify.parse, parsing_timeout=seconds, fallback_mode="no_fallback")
    right, found = read(f"${answer}$"), read(given if "$" in given else f"${given}$")
    # math-verify rounds: numbers below its precision are 0 for it, and floats have some decimals.
    digits = max([6, *map(len, re.findall(r"\.(\d+)", answer))])
    if not math_verify.verify(right, found, digits, 1000, timeout_seconds=seconds):
        return False
    values = [one for one in (*right, *found) if getattr(one, "is_number", False) and one.is_comparable]
    return len(values) < 2 or bool(abs(values[0] - values[1]) <= abs(values[0]) * 1e-5)


def answer_of(checker: str, example: Example) -> str:
    if not example.answer:
        raise ValueError(f"row {example.row}: no answer for the checker {checker}. Name its column: --map answer=X.")
    return example.answer


def _parts(response: str, example: Example) -> list[str]:
    """Return a response without its prompt, cut where it runs on to something else."""
    return NEXT.split(_plain(response.removeprefix(example.prompt or "").rpartition("</think>")[2]))


def _called(text: str) -> list[str]:
    """Return what is said to be the answer, each time to the end of its line."""
    return [match["said"] for match in CALLED.finditer(text)][-20:]


def _bare(text: str) -> str:
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)


def _given(text: str, number: bool) -> str | None:
    """Return the answer that a text gives: marked as one, or else its last formula, or its last number."""
    marked = HASHES.search(text)
    boxed = None if marked else last_boxed(text)
    if not number:
        text = re.sub(r"(?<=[\d)}\]])(\$?),? (?:and|or) \1(?=[-\d(\\a-z{])(?![a-z]{2})", ", ", text)
    if boxed is not None:
        return boxed
    for said in [marked["said"]] if marked else _called(text)[::-1]:
        found = FORMULA.match(said.lstrip(" *_:\"'(")) or FORMULA.match(said.lstrip(" *_:\"'($€£¥₩₹฿"))
        # A sentence that goes on to compute says its result at its end.
        if found and (marked or not re.search(r"=|\b(?:more|less|fewer|times)\b", found.string[found.end() :])):
            given = _in_formula(found, number, 0)
            if given:
                return given
    for found in reversed(list(FORMULA.finditer(text))):
        given = _in_formula(found, number, -1)
        if given:
            return given
    return None


def _in_formula(found: re.Match[str], number: bool, place: int) -> str | None:
    """Return a formula, or its number at a place where it is only numbers and the answer is one."""
    formula = (found["inside"] or found[0]).strip(" .,;:*_'")
    if number and not (found["inside"] or WHOLE.search(formula)):
        numbers = [match[0] for match in NUMBER.finditer(found.string, *found.span())]
        return re.sub(r"(?<=\d),(?=\d+$)(?!\d{3}$)", ".", numbers[place]) if numbers else None
    if number:
        formula = EQUALS.split(formula)[-1]
        formula = formula.split(", ")[0] if place == 0 else formula
    given = formula.strip(" .,;:*")
    return given if re.search(r"\w", given) else None


def _same(answer: str, given: str) -> bool:
    """Compare exactly what is a plain number or a time, and leave anything else to math-verify."""
    right, value = _as_number(answer), _as_number(given)
    if right and value:
        return right[0] == value[0] or right[1] == value[1]
    times = CLOCK.fullmatch(answer.strip()), CLOCK.fullmatch(given.strip())
    if times[0] and times[1]:
        halves = {time[2].lower() for time in times if time and time[2]}
        return times[0][1] == times[1][1] and len(halves) < 2
    # No answer is longer, and math-verify needs its time.
    return given == answer or (len(given) <= 500 and same_expression(answer, given))


def _plain(text: str) -> str:
    """Return a text in which numbers and formulas have one form."""
    for pattern, form in BEFORE_NFKC.items():
        text = re.sub(pattern, form, text)
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    for pattern, form in AFTER_NFKC.items():
        text = re.sub(pattern, form, text)
    return text


def _as_number(text: str) -> tuple[Fraction, Fraction] | None:
    """Return the exact value of a plain number, percent as written and as a share; None for anything else."""
    text = re.sub(UNIT, "", _bare(text).replace("\\$", "").replace("$", "").strip().rstrip(" ."))
    found = NUMBER.fullmatch(text.strip())
    plain = re.sub(r"\\[cdt]?frac\{(-?\d+)\}\{(.+?)\}(?=[^}]|$)", r" \1/\2", found[0] if found else "")
    plain = re.sub(r"(?<=\d)[ ,](?=\d{3}(?![\d/]))(?<!\b0,)", "", plain)
    plain = re.sub(r"\\times|\\cdot", "*", plain.replace("**", "^"))
    plain = re.sub(r" ?per ?cent", "%", plain).replace("e", "*10^").replace("E", "*10^")
    parts = VALUE.fullmatch(re.sub(r"[{}\\]", "", plain).strip())
    if parts is None:
        return None
    sign, whole, top, bottom, power, tens, percent = parts.groups()
    try:
        value = Fraction(bottom or top) ** int(power or 1)
        value = (int(whole or 0) + (Fraction(top) / value if bottom else value)) * Fraction(10) ** int(tens or 0)
    except (ZeroDivisionError, ValueError):
        # Divided by zero, or with more digits than Python reads.
        return None
    value = -value if sign else value
    return value, value / 100 if percent else value
