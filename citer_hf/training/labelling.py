"""`label_preferences`: which model should write each token of the reference answers (CITER, section 3.3).

1. Both models read every reference answer in one forward pass: cases 1 and 2.
2. Roll-outs of the SLM's token, where it differs from the reference, with the current policy: case 3. They are made
   for case 2 as well, which `citer-plus` asks for and the paper's method does not look at; and where they fail, for
   the LLM's token.
3. Both are joined into Parquet shards with a card.

Every unit of work is a file until the end, so that nothing is lost or repeated when it is interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from citer_hf.data.checkers import Checker, get_checker
from citer_hf.data.examples import read_examples
from citer_hf.data.tokens import Encoded, encode
from citer_hf.evaluation.decoding import BATCH_TOKENS
from citer_hf.runs import wait_for_all

from .cards import write_card
from .fingerprint import fingerprint_of_questions, made_with
from .labels import INFO, Labels
from .outcomes import Policy, judge_answers, judge_states
from .reading import choose_rollouts, read_units
from .shards import write_shards
from .units import Workplace

__all__ = ["label_preferences"]

WORK = ".work"
Report = Callable[[str, int, int], None]


def label_preferences(
    model: Any,
    dataset: Any,
    checker: str | Checker,
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    router_threshold: float | None = None,
    rollouts: int | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    report: Report = lambda what, done, total: None,
) -> Labels:
    """Label every token of the reference answers with the model that should write it (CITER, section 3.3).

    Run under `accelerate launch`, the processes divide the work and need one directory that all of them see. The
    labels are the same for any number of processes.

    Args:
        model: The pair. Its router at its threshold is the policy that continues the roll-outs.
        dataset: Examples with reference answers: a file, a dataset id, a `datasets.Dataset` or a list of dicts.
        checker: `math`, `choice`, `exact`, `package.module:function`, or a function (response, example) -> `Verdict`.
        out: Directory for the labels. An interrupted run with the same arguments goes on.
        columns: The column of a field, where it has another name.
        split: Which split, where there are several.
        router_threshold: Threshold of the roll-outs' policy: 0 is the SLM alone (the paper's first round), above 1
            the LLM alone. Default: the model's own.
        rollouts: Roll out at this many tokens at most, where the router is least sure. Default: at every token where
            the SLM's differs from the reference.
        max_new_tokens: Longest response in a roll-out. Default: twice the longest reference answer.
        limit: Read this many examples at most.
        batch_tokens: Tokens in a batch, padding included.
        seed: Decides between states of which the router is equally unsure.
        report: Told what is being done: a description, units done, units in all.

    Returns:
        The labels, as `Labels.load(out)` reads them.

    Raises:
        ValueError: for examples that cannot be used, a checker that raises, values that are not finite, or a directory
            that was begun with other arguments.
        FileExistsError: when the directory holds something else, or finished labels.
    """
    out = Path(out)
    check_out(out)
    judge = checker if callable(checker) else get_checker(checker)
    if rollouts is not None and rollouts < 0:
        raise ValueError(f"rollouts: expected how many roll-outs may be made, from 0 up, got {rollouts}.")
    tokenizer = load_tokenizer(model)
    questions = read_questions(model, tokenizer, dataset, columns, split, limit)
    policy = Policy(
        threshold=model.config.router_threshold if router_threshold is None else router_threshold,
        max_new_tokens=max_new_tokens or 2 * max(len(one.response_ids) for one in questions),
        batch_tokens=batch_tokens,
    )
    arguments = {
        "checker": checker if isinstance(checker, str) else getattr(checker, "__qualname__", repr(checker)),
        "data": fingerprint_of_questions(questions),
        "columns": dict(columns or {}),
        "split": split,
        "examples": len(questions),
        "made_with": made_with(model, tokenizer),
        "router": dict(model.config.router),
        "rollouts": rollouts,
        "seed": seed,
        **policy.as_dict(),
    }
    place = Workplace(out / WORK, arguments, report)
    read = read_units(model, questions, place, batch_tokens)
    chosen = choose_rollouts(read, rollouts, model.config.router_threshold, seed)
    states = [(read.rollout(token), read.rollout(token, "llm")) for token in chosen]
    outcomes = judge_states(model, tokenizer, questions, states, policy, judge, place)
    answers = judge_answers(model, tokenizer, questions, policy, judge, place)
    if place.state.is_main_process:
        write_shards(out, read, questions, outcomes, answers)
        write_card(out, arguments, read, outcomes, answers)
        shutil.rmtree(out / WORK)
    wait_for_all()
    return Labels.load(out)


def check_out(out: Path) -> None:
    """Refuse a directory that holds anything but labels that were begun."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file; give a directory that does not exist yet.")
    if not out.is_dir() or (out / WORK).is_dir() or not any(out.iterdir()):
        return
    holds = "finished labels" if (out / INFO).is_file() else "something else than labels"
    raise FileExistsError(f"out: {out} holds {holds} already; choose another directory or remove it first.")


def load_tokenizer(model: Any) -> Any:
    """Return the pair's tokenizer."""
    tokenizer = model.load_tokenizer()
    if tokenizer is None:
        raise ValueError(
            "model: this pair came without a tokenizer, so that text cannot be read. Save the tokenizer beside the "
            "SLM (tokenizer.save_pretrained), and load the pair again."
        )
    return tokenizer


def read_questions(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    columns: Mapping[str, str] | None,
    split: str | None,
    limit: int | None,
) -> list[Encoded]:
    """Read examples as token ids, the shortest first, which is the order of all work."""
    examples = read_examples(dataset, columns or {}, split=split, needs=("response", "answer"), limit=limit)
    longest = model.config.max_position_embeddings
    end = model.generation_config.eos_token_id
    questions = [encode(one, tokenizer, longest, end, vocab_size=model.vocab_size) for one in examples]
    return sorted(questions, key=lambda one: (len(one.prompt_ids) + len(one.response_ids), one.example.row))
