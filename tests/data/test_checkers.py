"""Checkers: what counts as a right answer."""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from citer_hf.data import checkers
from citer_hf.data.checkers import Verdict, get_checker
from citer_hf.data.examples import Example

CHOICES = (("A", "a dog"), ("B", "The moon."), ("C", "I"), ("D", "water"))
needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def example(
    answer: str | None, prompt: str = "Question?", choices: tuple[tuple[str, str], ...] | None = None
) -> Example:
    return Example(id="1", row=1, prompt=prompt, answer=answer, choices=choices)


def math(response: str, answer: str) -> Verdict:
    return get_checker("math")(response, example(answer))


def choice(response: str, answer: str = "B") -> Verdict:
    return get_checker("choice")(response, example(answer, choices=CHOICES))


def exact(response: str, answer: str) -> Verdict:
    return get_checker("exact")(response, example(answer))


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("so 3 + 4 = 7.", "7"),
        (r"\boxed{7}, not 8", "7"),
        (r"\boxed{1} or rather \boxed{7}", "7"),
        (r"\boxed{7", "7"),
        ("it is -7", "-7"),
        ("it is \u22127", "-7"),
        ("10-7", "7"),
        ("10 - 7", "7"),
        ("(-7)", "-7"),
        ("$7$", "7"),
        ("costs $1,234.50.", "1,234.50"),
        (r"1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("1, 2, 3", "3"),
        (".5", ".5"),
        ("1/2", "1/2"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{-\dfrac{3}{4}}", r"-\dfrac{3}{4}"),
        ("x2", None),
        ("no number", None),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_math_finds_the_last_box_or_else_the_last_number(response: str, extracted: str | None) -> None:
    assert math(response, "123456").extracted == extracted


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7", "7", True),
        ("7.0", "7", True),
        ("07", "7", True),
        ("1,000", "1000", True),
        ("-7", "7", False),
        ("0.1", "0.10", True),
        ("0.1", "0.1000000000000000001", False),
        ("3/4", "0.75", True),
        (r"\frac{3}{4}", "0.75", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("7", r"\boxed{7}", True),
        ("7", "$7$", True),
        ("so 7", "3 + 4 = 7 #### 7", True),
    ],
)
def test_math_compares_numbers_exactly(
    response: str, answer: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkers, "same_expression", None)
    assert math(response, answer).correct is right


def test_math_reads_numbers_as_a_naive_reader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "same_expression", None)
    draw = random.Random(0)
    for _ in range(500):
        given, right = (f"{draw.choice(['', '-'])}{draw.randrange(30)}{draw.choice(['', '.0', '.5'])}" for _ in "ab")
        assert math(f"It is {given}.", right).correct is (Fraction(given) == Fraction(right))


@needs_math_verify
@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{x+1}", "1 + x", True),
        (r"\boxed{x+1}", "x + 2", False),
        ("thus $x+1$", "1 + x", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"\boxed{12 \text{ cm}}", "12", True),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{1/0}", "1", False),
    ],
)
def test_math_leaves_anything_else_to_math_verify(response: str, answer: str, right: bool) -> None:
    assert math(response, answer).correct is right


@needs_math_verify
def test_an_answer_that_cannot_be_extracted_is_wrong() -> None:
    assert math("no idea", "x + 1") == Verdict(False, None)
    assert math("", "None") == Verdict(False, None)


@needs_math_verify
def test_what_sympy_never_finishes_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "SECONDS", 1)
    assert math(r"\boxed{10^{10^{10}}}", "5") == Verdict(False, "10^{10^{10}}")
    assert math(r"\boxed{x+1}", "1+x").correct


@needs_math_verify
def test_math_works_in_threads() -> None:
    check, found = get_checker("math"), []

    def work(number: int) -> None:
        found.append(check(rf"\boxed{{{number} + x}}", example(f"x + {number % 2}")).correct is (number < 2))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_math_without_its_library_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^math-verify is not installed: pip install 'citer-hf\[train\]'$"):
        get_checker("math")


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("The answer is (B).", "B"),
        ("The answer is B because it shines.", "B"),
        ("the answer is: **B**", "B"),
        ("Answer: b", "B"),
        ("The answer is A. No, the answer is B", "B"),
        ("The answer is the moon, or not", None),
        ("The answer is the moon.", "B"),
        (r"\boxed{B}, not A", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{water}", "D"),
        (" B", "B"),
        ("THE MOON", "B"),
        ("a dog", "A"),
        ("A dog", "A"),
        ("A dog is not B", "B"),
        ("A plant is what I mean, so B", "B"),
        ("I think it is C.", "C"),
        ("A or B? B's better", "B"),
        ("Bees", None),
        ("a cat", None),
        ("E", None),
        ("", None),
    ],
)
def test_choice_finds_the_chosen_label(response: str, extracted: str | None) -> None:
    assert choice(response) == Verdict(extracted == "B", extracted)


def test_choice_knows_the_examples_labels() -> None:
    numbered = example("10", choices=(("1", "x"), ("10", "y")))
    assert get_checker("choice")("The answer is 10.", numbered) == Verdict(True, "10")
    assert get_checker("choice")("so 1", numbered) == Verdict(False, "1")


def test_choice_needs_choices() -> None:
    with pytest.raises(ValueError, match="checker choice: row 1 has no choices"):
        get_checker("choice")("B", example("B"))


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (" New\n york. ", "new York", True),
        ("\uff11\uff12", "12", True),
        ("New York!", "New York?", True),
        ("New-York", "New York", False),
        ("in New York", "New York", False),
        ("4.0", "4", False),
    ],
)
def test_exact_compares_texts_but_for_case_and_white_space(response: str, answer: str, right: bool) -> None:
    assert exact(response, answer).correct is right


@pytest.mark.parametrize("response", ["", " ", "."])
def test_nothing_is_never_the_exact_answer(response: str) -> None:
    assert exact(response, "?") == Verdict(False, None)


@pytest.mark.parametrize(
    ("name", "prompt"), [("math", r"Write \boxed{5}."), ("choice", "Answer: B\n"), ("exact", "5")]
)
def test_a_prompt_satisfies_no_checker(name: str, prompt: str) -> None:
    asked = example("5" if name != "choice" else "B", prompt, CHOICES)
    assert get_checker(name)(prompt, asked) == Verdict(False, None)
    assert get_checker(name)(prompt + " water", asked).correct is False


def test_what_follows_the_prompt_counts() -> None:
    prompt = r"Is it \boxed{5}?"
    assert get_checker("math")(prompt + " No, 6.", example("6", prompt)) == Verdict(True, "6")


@pytest.mark.parametrize("name", ["math", "choice", "exact"])
@pytest.mark.parametrize("answer", [None, ""])
def test_an_example_without_an_answer_is_refused(name: str, answer: str | None) -> None:
    with pytest.raises(ValueError, match=rf"row 1: it has no answer for the checker {name} .*--map answer=COLUMN"):
        get_checker(name)("None", example(answer, choices=CHOICES))


def test_an_unknown_checker_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"there is no 'maths'. Choose math, choice, exact, or .*module:function"):
        get_checker("maths")


class TestCustom:
    """Checkers of the user's own."""

    @pytest.fixture(autouse=True)
    def own_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "own_checks.py").write_text(
            "def same(response, answer): return response.strip() == answer\n"
            "def row(response, example): return example.row == 1\n"
            "def silent(response, answer): return None\n"
            "def vague(response, answer): return 'yes'\n"
            "def lonely(response): return True\n"
            "text = 'no function'\n"
        )
        (tmp_path / "half.py").write_text("1 +\n")
        monkeypatch.chdir(tmp_path)
        path = list(sys.path)
        yield
        assert sys.path == path
        sys.modules.pop("own_checks", None)

    def test_it_is_found_in_the_current_directory_and_sees_the_response_alone(self) -> None:
        check = get_checker("own_checks:same")
        assert check("Question? 5", example("5")) == Verdict(True, "5")
        assert check("6", example("5")) == Verdict(False, "6")

    def test_it_may_look_at_the_whole_example(self) -> None:
        assert get_checker("own_checks:row")("x", example(None)).correct

    def test_none_is_no_answer(self) -> None:
        assert get_checker("own_checks:silent")("x", example("5")) == Verdict(False, None)

    def test_it_needs_an_answer_to_compare_with(self) -> None:
        with pytest.raises(ValueError, match="row 1: it has no answer for the checker own_checks:same"):
            get_checker("own_checks:same")("x", example(None))

    def test_it_must_say_yes_or_no(self) -> None:
        with pytest.raises(ValueError, match="row 1: expected True, False or None, got 'yes'"):
            get_checker("own_checks:vague")("x", example("5"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
            ("half:f", "SyntaxError"),
            ("own_checks:nothing", "AttributeError: .*'nothing'"),
            ("own_checks:text", "TypeError: 'no function' is not a callable"),
            ("own_checks:lonely", "TypeError: too many positional arguments"),
            (":f", "ValueError: Empty module name"),
        ],
    )
    def test_a_name_that_cannot_be_called_is_explained(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"checker {name}: expected module:function, .* got {message}"):
            get_checker(name)
