"""Whether answers are right: of roll-outs, and of each model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from citer_hf.data.checkers import Checker, Verdict, judge
from citer_hf.data.tokens import Encoded
from citer_hf.evaluation.decoding import decode

from .rollouts import RollOut, cut_into_batches, roll_out
from .units import Workplace, read_table

__all__ = ["Outcome", "Policy", "judge_answers", "judge_states"]


@dataclass(frozen=True)
class Policy:
    """What continues a roll-out."""

    threshold: float
    max_new_tokens: int
    batch_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return {f"rollout_{name}" if name == "threshold" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Outcome:
    """What came of one roll-out, or of one answer."""

    correct: bool
    extracted: bool


def judge_rollouts(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Encoded],
    wanted: Sequence[RollOut],
    policy: Policy,
    checker: Checker,
    place: Workplace,
    name: str,
) -> dict[RollOut, Outcome]:
    """Make roll-outs and look at their answers."""

    def compute(batch: list[RollOut]) -> pa.Table:
        texts = roll_out(model, questions, batch, policy.threshold, policy.max_new_tokens)
        examples = [questions[one.question] for one in batch]
        verdicts = judge_texts(tokenizer, checker, examples, texts)
        columns = {key: [getattr(one, key) for one in batch] for key in ("question", "position", "token")}
        return pa.table(columns | as_columns(verdicts))

    batches = cut_into_batches(wanted, questions, policy.max_new_tokens, policy.batch_tokens)
    files = place.run(name, batches, compute)
    rows = read_table(files).to_pylist() if files else []
    return {
        RollOut(row["question"], row["position"], row["token"]): Outcome(row["correct"], row["extracted"])
        for row in rows
    }


def judge_states(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Encoded],
    states: Sequence[tuple[RollOut, RollOut]],
    policy: Policy,
    checker: Checker,
    place: Workplace,
    when: str = "",
) -> dict[RollOut, Outcome]:
    """Compare both models' tokens at some states: the SLM's everywhere, the LLM's where the SLM's fails."""
    rest = (policy, checker, place)
    first = [by_slm for by_slm, _ in states]
    outcomes = judge_rollouts(model, tokenizer, questions, first, *rest, f"roll-outs of the SLM{when}")
    failed = [by_llm for by_slm, by_llm in states if not outcomes[by_slm].correct]
    untried = [one for one in failed if one not in outcomes]
    return outcomes | judge_rollouts(model, tokenizer, questions, untried, *rest, f"roll-outs of the LLM{when}")


def judge_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Encoded],
    policy: Policy,
    checker: Checker,
    place: Workplace,
) -> dict[str, list[Outcome]]:
    """Let each model answer every question alone."""

    def answer(alone: Any) -> Any:
        def compute(batch: list[RollOut]) -> pa.Table:
            asked = [questions[one.question] for one in batch]
            prompts = [one.prompt_ids for one in asked]
            texts = decode(model, prompts, max_new_tokens=policy.max_new_tokens, alone=alone).tokens
            return pa.table(as_columns(judge_texts(tokenizer, checker, asked, texts)))

        return compute

    whole = [RollOut(index, 0, -1) for index in range(len(questions))]
    batches = cut_into_batches(whole, questions, policy.max_new_tokens, policy.batch_tokens)
    outcomes = {}
    for alone, name in (("slm", "answers of the SLM"), ("llm", "answers of the LLM")):
        rows = read_table(place.run(name, batches, answer(alone))).to_pylist()
        order = [one.question for batch in batches for one in batch]
        found = dict(zip(order, rows, strict=True))
        outcomes[alone] = [Outcome(**found[index]) for index in range(len(questions))]
    return outcomes


def judge_texts(
    tokenizer: Any, checker: Checker, questions: Sequence[Encoded], texts: Sequence[Sequence[int]]
) -> list[Verdict]:
    """Let the checker look at responses."""
    responses = tokenizer.batch_decode([list(text) for text in texts], skip_special_tokens=True)
    return [judge(checker, response, one.example) for one, response in zip(questions, responses, strict=True)]


def as_columns(verdicts: Sequence[Verdict]) -> dict[str, list[bool]]:
    """Return verdicts as columns of a table."""
    return {
        "correct": [bool(one.correct) for one in verdicts],
        "extracted": [one.extracted is not None for one in verdicts],
    }
