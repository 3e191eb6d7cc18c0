"""Whether answers are right: of roll-outs, and of each model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from citer_hf.data.checkers import Checker, Verdict
from citer_hf.data.tokens import Encoded
from citer_hf.evaluation.decoding import decode
from citer_hf.evaluation.grading import judge

from .rollouts import RollOut, cut_into_batches, roll_out
from .units import Workplace, read_table

__all__ = ["Outcome", "Policy", "judge_answers", "judge_states"]


@dataclass(frozen=True)
class Policy:
    """What continues a roll-out.

    Attributes:
        threshold: Of the pair's router: 0 is the SLM alone, above 1 the LLM alone.
        max_new_tokens: Longest response, in tokens.
        batch_tokens: Tokens in a batch, padding included.
    """

    threshold: float
    max_new_tokens: int
    batch_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return {f"rollout_{name}" if name == "threshold" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Outcome:
    """What came of one roll-out, or of one answer.

    Attributes:
        correct: Whether the answer is right.
        extracted: Whether an answer could be found in the text.
    """

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
    """Make roll-outs and look at their answers.

    Args:
        model: The pair, with the router of the policy.
        tokenizer: Its tokenizer.
        questions: All questions.
        wanted: Roll-outs.
        policy: What continues them.
        checker: Decides which answer is right.
        place: Where units of work are kept.
        name: Of this work, which is also the name of its folder.
    """

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
    """Compare both models' tokens at some states: the SLM's everywhere, the LLM's where the SLM's fails.

    Args:
        model: The pair, with the router of the policy.
        tokenizer: Its tokenizer.
        questions: All questions.
        states: For each, the roll-out that takes the SLM's token and the one that takes the LLM's.
        policy: What continues the roll-outs.
        checker: Decides which answer is right.
        place: Where units of work are kept.
        when: Ends the name of this work, where there is more of it.
    """
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
    """Let each model answer every question alone.

    Args:
        model: The pair.
        tokenizer: Its tokenizer.
        questions: All questions.
        policy: How long an answer may be.
        checker: Decides which answer is right.
        place: Where units of work are kept.

    Returns:
        The outcomes of `slm` and of `llm`, in the order of the questions.
    """

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
    """Let the checker look at responses.

    Args:
        tokenizer: The pair's.
        checker: Decides which answer is right.
        questions: The question of each.
        texts: Token ids of each response.

    Raises:
        ValueError: when the checker raises, which names the example.
        TypeError: when it returns no `Verdict`.
    """
    responses = tokenizer.batch_decode([list(text) for text in texts], skip_special_tokens=True)
    return [judge(checker, response, one.example) for one, response in zip(questions, responses, strict=True)]


def as_columns(verdicts: Sequence[Verdict]) -> dict[str, list[bool]]:
    """Return verdicts as columns of a table.

    Args:
        verdicts: Any number.
    """
    return {
        "correct": [bool(one.correct) for one in verdicts],
        "extracted": [one.extracted is not None for one in verdicts],
    }
