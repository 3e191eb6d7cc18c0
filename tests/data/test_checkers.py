"""Checkers: what counts as a right answer."""

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from citer_hf.data import checkers
from citer_hf.data.checkers import Verdict, get_checker
from citer_hf.data.examples import Example

CHOICES = (("A", "a dog"), ("B", "The moon."), ("C", "I"), ("D", "water"))
needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def example(answer: str | None, prompt: str = "Question?", choices: Any = None) -> Example:
    return Example(id="1", row=1, prompt=prompt, answer=answer, choices=choices)


def judge(checker: str, response: str, answer: str = "B") -> Verdict:
    return get_checker(checker)(response, example(answer, choices=CHOICES))


math, choice, exact = (partial(judge, checker) for checker in ("math", "choice", "exact"))


@pytest.mark.parametrize(
    ("extracted", "responses"),
    [
        ("7", ["so 3 + 4 = 7.", r"\boxed{7}, not 8", r"\boxed{1} or rather \boxed{7}", r"\boxed{7", "10-7", "10 - 7"]),
        ("7", ["$7$"]),
        ("-7", ["it is -7", "it is \u22127", "(-7)"]),
        ("1,234.50", ["costs $1,234.50."]),
        ("1234", [r"1{,}234", r"1\,234"]),
        ("3", ["1, 2, 3"]),
        (".5", [".5"]),
        ("1/2", ["1/2"]),
        (r"\frac{1}{2}", [r"\frac{1}{2}"]),
        (r"-\dfrac{3}{4}", [r"\boxed{-\dfrac{3}{4}}"]),
        (None, ["x2", "no number", "", r"\boxed{}"]),
    ],
)
def test_math_finds_the_last_box_or_else_the_last_number(extracted: str | None, responses: list[str]) -> None:
    assert [math(response, "123456").extracted for response in responses] == [extracted] * len(responses)


def test_math_compares_numbers_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "same_expression", None)
    right = [("7", "7"), ("7.0", "7"), ("07", "7"), ("1,000", "1000"), ("0.1", "0.10"), ("3/4", "0.75"), ("7", "$7$")]
    right += [(r"\frac{3}{4}", "0.75"), ("7", r"\boxed{7}"), ("so 7", "3 + 4 = 7 #### 7")]
    wrong = [("-7", "7"), ("0.1", "0.1000000000000000001"), ("12345678901234567890", "12345678901234567891")]
    assert [math(*one).correct for one in right + wrong] == [True] * len(right) + [False] * len(wrong)


@needs_math_verify
def test_math_leaves_anything_else_to_math_verify() -> None:
    right = [(r"\boxed{x+1}", "1 + x"), ("thus $x+1$", "1 + x"), (r"\boxed{\frac12}", "0.5")]
    right += [(r"\boxed{12 \text{ cm}}", "12"), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}")]
    wrong = [(r"\boxed{x+1}", "x + 2"), (r"\boxed{1/0}", "1")]
    assert [math(*one).correct for one in right + wrong] == [True] * len(right) + [False] * len(wrong)
    assert math("no idea", "x + 1") == math("", "None") == Verdict(False, None)


# Answer, responses that give it, responses that do not.
JUDGED: list[tuple[str, list[str], list[str]]] = [
    ("18", ["#### 18\n\nQuestion: Tom has 3. #### 3", "#### 18 dollars per day, 7 days a week"], ["#### 8, 18"]),
    ("18", ["18<|im_end|>\n<|im_start|>user\n5?", "\\boxed{18}\n\n**Problem 2:** \\boxed{3}"], ["5"]),
    (
        "18",
        [
            "The answer is 18 euros, 7 days a week.",
            "#### 1. First\n3\n#### 2. So 18",
            "<think>The answer is 5?</think>18",
        ],
        [],
    ),
    (
        "3",
        ["#### 9/3 = 3, 7 days"],
        ["#### 18\n\nQ: 1 + 2? #### 3", "The answer is 18.\n\n问题：3。", "x = 1, 3", "2:3"],
    ),
    ("x\n#### 1,800", ["#### 1800", "so 1 800", "1\u202f800", "It is 1800."], ["800", "18"]),
    ("3/4", [r"\frac34", r"$\dfrac34$", r"\(\frac{3}{4}\)", r"\[\tfrac 3 4\]", "0.75", "75%"], ["34", "4/3", "3"]),
    (r"\dfrac{9}{7}", [r"$\dfrac{9}{7}$", "9/7", "1 2/7", r"1\frac27"], [r"$\dfrac{7}{9}$", "97", "2/7"]),
    ("5/2", ["2 1/2", "2½ cups", r"$2\frac{1}{2}$", "2又1/2", r"\boxed{2 \tfrac12}"], ["1/2", "-2 1/2", "2 1/3", "2"]),
    ("10^5", ["100000", "10⁵", r"10^{5}", "1e5", "100,000", r"\boxed{10^5}"], ["10", "5", "10^6", r"10^{-5}"]),
    ("5000", [r"5 \times 10^3", "5 × 10³", "5 · 10^3", "5*10^3 m/s", "5 km² or 5e3"], ["5", "3", "10^3", "5e4"]),
    ("18", ["答案是18。", "答えは18です。", "정답은18입니다", "คำตอบคือ18ครับ", "18 m^2"], ["18i"]),
    (
        "18",
        ["3个和15个，答案是18。", "3個と15個で、１８個です。", "答案是18元，每天7元", "الجواب ١٨"],
        ["有18个，答案是3"],
    ),
    ("18", ["3개와 15개, 18개입니다.", "มี 3 ลูก รวม18ลูก"], ["18个里，答えは15です。"]),
    ("-5", ["答案是-5。", "答えは－５度", "\u22125°C", "-$5"], ["答案是5。", "10-5", r"\pm 5", r"x = \pm 5"]),
    (r"\boxed{n=1,2,3}", ["n=1,2,3", "So n = 1, 2, 3.", "$n=3,2,1$", "1, 2 and 3"], ["n=2,3,4", "n=3", "1,2"]),
    ("(3,4)", ["so (3, 4).", r"\boxed{(3,4)}"], ["(4,3)", "[3,4]", "4", "(3,5)"]),
    ("1:00", ["1:00", "at 01:00 pm.", "$1:00$", "下午1：00"], ["12:00", "11:00", r"\boxed{12:00}", "1", "0:60"]),
    ("2021", ["2021", "in 2021."], [r"\pm 2021", "±2021", r"\boxed{\pm 2021}", "+/- 2021", "-2021"]),
    (r"\pm 2021", ["±2021", r"$\pm 2021$", "2021 and -2021"], ["2021", "-2021", r"\pm 2022"]),
    (r"1+\frac1e", [r"1+\frac1e", r"so $1+e^{-1}$", "1 + 1/e"], [r"1-\frac1e", "1", "1 - 1/e"]),
    ("5", ["x = 5", "a 5", "It is 5 m.", r"$\sqrt{25}$"], [r"$\sqrt{5}$", "5π", r"5\sqrt2", "5 ± 5", "e^5", "x^5"]),
    (r"\frac{1}{2^{98}}", [r"\frac{1}{2^{98}}", r"2^{-98}", r"\boxed{0.5^{98}}"], [r"\frac{1}{2^{99}}", "0"]),
    ("10^{-21}", ["10^{-21}", "1e-21", r"$\sqrt{10^{-42}}$"], ["10^{-20}", "0", r"\boxed{10^{-22}}"]),
    ("x=2^{-98}", ["x=2^{-98}"], ["x=2^{-99}", "y=2^{-98}"]),
    ("e^{-51}", ["e^{-51}", r"$\frac{1}{e^{51}}$"], [r"\boxed{e^{-50}}", "0"]),
    ("50%", ["50%", "50", "0.5", "1/2", "50 percent", r"$50\%$", "50％です"], ["0.5%", "5%", "5000"]),
    ("18 dollars", ["18", r"\boxed{18\text{ dollars}}", r"\boxed{18元}", "18 dollars"], ["17 dollars"]),
    ("Monday", ["Monday", "The answer is Monday.", r"\boxed{\text{Monday}}"], ["Tuesday", "not Monday"]),
]


@needs_math_verify
@pytest.mark.parametrize(("answer", "right", "wrong"), JUDGED)
def test_math_knows_an_answer_in_any_form_and_no_near_miss(answer: str, right: list[str], wrong: list[str]) -> None:
    judged = {response: math(response, answer).correct for response in right + wrong}
    assert judged == dict.fromkeys(right, True) | dict.fromkeys(wrong, False)


@needs_math_verify
def test_what_sympy_never_finishes_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "SECONDS", 1)
    assert math(r"\boxed{10^{10^{10}}}", "5") == Verdict(False, "10^{10^{10}}")
    assert math(r"\boxed{x+1}", "1+x").correct

    # In threads nothing is stopped.
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda number: math(rf"\boxed{{{number} + x}}", "x + 1").correct, range(4))
        assert list(found) == [False, True, False, False]


def test_a_checker_that_is_not_there_is_explained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"there is no 'maths'. Choose math, choice, exact, or .*module:function"):
        get_checker("maths")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"^math_verify is not installed: pip install 'citer-hf\[train\]'$"):
        get_checker("math")


@pytest.mark.parametrize(
    ("extracted", "responses"),
    [
        ("B", ["The answer is (B).", "The answer is B because it shines.", "the answer is: **B**", "Answer: b", " B"]),
        ("B", ["The answer is A. No, the answer is B", "The answer is the moon.", "THE MOON", r"\boxed{B}, not A"]),
        ("B", [r"\boxed{\text{(B)}}", "A dog is not B", "A plant is what I mean, so B", "A or B? B's better"]),
        ("D", [r"\boxed{water}"]),
        ("A", ["a dog", "A dog"]),
        ("C", ["I think it is C."]),
        ("B", ["b", "b)", "(b)", "b.", "b: the moon", "**b**", "b is right", "So it is (b).", "Answer: b)"]),
        (
            "B",
            [
                "答案是B",
                "答案选Ｂ。",
                "故选B",
                "答えはBです",
                "정답은B입니다",
                "คำตอบคือBครับ",
                "Die Antwort ist b)",
                "B选项",
            ],
        ),
        (
            "B",
            [
                "B</s>",
                "B\n\nQuestion: next?\nAnswer: A",
                "b) the moon, unlike A",
                "答案是The moon，因为",
                "B\n\nA is wrong",
            ],
        ),
        ("D", ["答案是water", "答案是“water”，因为", "The answer is water because", "答えはwaterです"]),
        (None, ["The answer is waterfall", "答案是watery", "a cat sat", "I ate", "答案是E"]),
        (None, ["The answer is the moon, or not", "Bees", "a cat", "E", ""]),
    ],
)
def test_choice_finds_the_chosen_label(extracted: str | None, responses: list[str]) -> None:
    expected = Verdict(extracted == "B", extracted)
    assert [choice(response) for response in responses] == [expected] * len(responses)


def test_choice_knows_the_examples_labels() -> None:
    numbered = example("10", choices=(("1", "x"), ("10", "y")))
    assert get_checker("choice")("The answer is 10.", numbered) == Verdict(True, "10")
    assert get_checker("choice")("so 1", numbered) == Verdict(False, "1")
    with pytest.raises(ValueError, match="checker choice: row 1 has no choices"):
        get_checker("choice")("B", example("B"))


def test_exact_compares_texts_but_for_case_and_white_space() -> None:
    right = [(" New\n york. ", "new York"), ("\uff11\uff12", "12"), ("New York!", "New York?")]
    wrong = [("New-York", "New York"), ("in New York", "New York"), ("4.0", "4")]
    assert [exact(*one).correct for one in right + wrong] == [True] * 3 + [False] * 3
    assert [exact(nothing, "?") for nothing in ("", " ", ".")] == [Verdict(False, None)] * 3


@pytest.mark.parametrize(("name", "prompt"), [("math", r"Now \boxed{5}."), ("choice", "Answer: B\n"), ("exact", "5")])
def test_a_prompt_satisfies_no_checker(name: str, prompt: str) -> None:
    asked = example("5" if name != "choice" else "B", prompt, CHOICES)
    assert get_checker(name)(prompt, asked) == Verdict(False, None)
    assert get_checker(name)(prompt + " water", asked).correct is False
    assert get_checker("math")(prompt + " No, 6.", example("6", prompt)) == Verdict(True, "6")


@pytest.mark.parametrize("name", ["math", "choice", "exact"])
def test_an_example_without_an_answer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"row 1: no answer for the checker {name}. Name its column: --map"):
        get_checker(name)("None", example("", choices=CHOICES))


@pytest.fixture
def own_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module with checkers in the current directory."""
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


@pytest.mark.usefixtures("own_checks")
def test_an_own_checker_is_found_in_the_current_directory_and_sees_the_response_alone() -> None:
    check = get_checker("own_checks:same")
    assert check("Question? 5", example("5")) == Verdict(True, "5")
    assert check("6", example("5")) == Verdict(False, "6")
    assert get_checker("own_checks:row")("x", example(None)).correct
    assert get_checker("own_checks:silent")("x", example("5")) == Verdict(False, None)
    with pytest.raises(ValueError, match="row 1: no answer for the checker own_checks:same"):
        check("x", example(None))
    with pytest.raises(ValueError, match="row 1: expected True, False or None, got 'yes'"):
        get_checker("own_checks:vague")("x", example("5"))


@pytest.mark.usefixtures("own_checks")
def test_an_own_checker_that_cannot_be_called_is_explained() -> None:
    for name, message in (
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("half:f", "SyntaxError"),
        ("own_checks:nothing", "AttributeError: .*'nothing'"),
        ("own_checks:text", "TypeError: 'no function' is not a callable"),
        ("own_checks:lonely", "ValueError: not enough values"),
        (":f", "ValueError: invalid format"),
    ):
        with pytest.raises(ValueError, match=f"checker {name}: expected module:function, .* got {message}"):
            get_checker(name)
