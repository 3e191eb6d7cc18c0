"""Arithmetic word problems with worked solutions, written from phrases and fixed by a seed.

A problem is a chain of equations. Two texts are told from it, each in wording of its own: the prompt (a story and a
question) and the response (the same steps, worked out).
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 99
OPERATION = {"+": "add", "-": "take", "*": "multiply"}

# A `{field}` stands for a fact of the problem (`{name}`, `{n}`, `{equation}`) or for any phrase of that name.
PHRASES: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Step:
    """One equation: `before symbol operand = after`."""

    before: int
    symbol: str
    operand: int
    after: int

    def __str__(self) -> str:
        return f"{self.before} {self.symbol} {self.operand} = {self.after}"


@dataclass(frozen=True)
class Problem:
    """A word problem: `prompt + response` is the text a model learns, `answer` the number it is judged by."""

    prompt: str
    response: str
    answer: str


def problems(split: str, seed: int, count: int) -> Iterator[Problem]:
    return (problem(split, seed, index) for index in range(count))


def problem(split: str, seed: int, index: int) -> Problem:
    """Return problem number `index` of a split, without making those before it."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"no split named {split!r}: choose train, validation or test")
    rng = random.Random(f"{split}/{seed}/{index}")
    steps = _draw_steps(rng)
    while _split_of(steps) != split:
        steps = _draw_steps(rng)
    return _tell(steps, rng)


def drill(rng: random.Random) -> Problem:
    """Return a bare calculation in the form of a problem: `What is 12 + 34?`."""
    step = _draw_step(rng.randint(1, LARGEST), rng)
    return Problem(f"What is {str(step).partition(' =')[0]}?\n", f"{step}.", str(step.after))


def is_correct(response: str, problem: Problem) -> bool:
    """Return True if the last number of a response is the right answer."""
    return re.findall(r"\d+", response.removeprefix(problem.prompt))[-1:] == [problem.answer]


def _draw_steps(rng: random.Random) -> list[Step]:
    value = rng.randint(1, LARGEST)
    steps = []
    for _ in range(rng.randint(2, 4)):
        steps.append(_draw_step(value, rng))
        value = steps[-1].after
    return steps


def _draw_step(value: int, rng: random.Random) -> Step:
    operands = {
        "+": range(1, LARGEST - value + 1),
        "-": range(1, value + 1),
        "*": range(2, min(5, LARGEST // value) + 1) if value else range(0),
    }
    symbol = rng.choice([symbol for symbol, allowed in operands.items() if allowed])
    operand = rng.choice(operands[symbol])
    after = {"+": value + operand, "-": value - operand, "*": value * operand}[symbol]
    return Step(value, symbol, operand, after)


def _split_of(steps: list[Step]) -> str:
    # hashlib, because `hash` of a string differs from one process to the next.
    tenth = int(hashlib.sha256("; ".join(map(str, steps)).encode()).hexdigest(), 16) % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def _tell(steps: list[Step], rng: random.Random) -> Problem:
    """Write a chain of equations as a story and as a worked solution."""
    name, friend = rng.sample(sorted(PHRASES["names"]), 2)
    facts = {"name": name, "he": PHRASES["names"][name], "friend": friend, "items": rng.choice(PHRASES["items"])}

    def write(phrase: str, **numbers: object) -> str:
        return _expand(f"{{{phrase}}}", facts | {key: str(value) for key, value in numbers.items()}, rng)

    start, answer = steps[0].before, steps[-1].after
    story = [write("opening", start=start)]
    story += [write(OPERATION[step.symbol], n=step.operand) for step in steps]
    if rng.random() < 1 / 3:
        distraction = write("distraction", n=rng.randint(1, LARGEST), things=rng.choice(PHRASES["things"]))
        story.insert(rng.randint(1, len(story)), distraction)
    story.append(write("question"))

    solution = [write("solution opening", start=start)]
    for step in steps:
        phrase = f"solution {OPERATION[step.symbol]}"
        solution.append(write(phrase, n=step.operand, before=step.before, equation=step))
    solution.append(write("solution end", answer=answer))
    return Problem(" ".join(story) + "\n", " ".join(solution), str(answer))


def _expand(text: str, facts: dict[str, str], rng: random.Random) -> str:
    """Replace each `{field}` by the fact of that name, or by one of its phrases, expanded in turn."""

    def value(match: re.Match[str]) -> str:
        field = match[1]
        return facts[field] if field in facts else _expand(rng.choice(PHRASES["phrases"][field]), facts, rng)

    return re.sub(r"\{([a-z ]+)\}", value, text)
