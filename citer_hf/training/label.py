"""`label_preferences`: which model should write each token of the reference answers (CITER, section 3.3).

1. Both models read every reference answer in one forward pass: cases 1 and 2 need nothing else.
2. Where the SLM's token differs from the reference, it is rolled out with the current policy: case 3. Case 2 is rolled
   out as well, which `citer-plus` asks for and the paper's method does not look at. Where a roll-out fails, the LLM's
   token is rolled out too.
3. Both are joined into Parquet shards with a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from citer_hf import CiterForCausalLM
from citer_hf.data.checkers import Checker, get_checker
from citer_hf.data.examples import DataOptions, read_examples
from citer_hf.data.tokens import Encoded, encode
from citer_hf.evaluation.decode import BATCH_TOKENS
from citer_hf.evaluation.evaluate import judge, name_of
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, as_threshold, top_logprobs
from citer_hf.runs import Progress, Work, option, progress_bar, provenance, sha256_of

from .labels import (
    BOTH_WRONG,
    CASES,
    LLM_RIGHT,
    SLM_RIGHT,
    TOP_LOGPROBS,
    Labels,
    token_table,
    tokenizer_of,
    tokenizer_sha256,
    write_labels,
)
from .rollouts import RollOut, cut_into_batches, in_batches, roll_out

# Logits of a batch of whole sequences, over all tokens and the vocabulary: 1 GB in half precision.
MOST_LOGITS = 1 << 29
# Positions whose log-probabilities over the whole vocabulary are in memory at once.
SLICE = 2048


@dataclass(frozen=True)
class LabelOptions(DataOptions):
    """Options of `label_preferences` and `citer label`."""

    router_threshold: float | None = option(
        None, "Of the roll-outs: 0 is the SLM alone, 2 the LLM alone. [default: the pair's]", metavar="X"
    )
    rollouts: int | None = option(None, "Roll-outs at most, where the router is unsure.", metavar="N", min=0)
    max_new_tokens: int | None = option(None, "Longest response. [default: 2 references]", metavar="N", min=1)
    batch_tokens: int = option(BATCH_TOKENS, "Tokens in a batch, padding included.", metavar="N", min=1)
    seed: int = option(0, "Decides between states of which the router is equally unsure.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_threshold is not None:
            as_threshold(self.router_threshold)
        for name, least in (("rollouts", 0), ("max_new_tokens", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected a number from {least} up, got {value}.")


def label_preferences(
    model: CiterForCausalLM, dataset: Any, checker: str | Checker, out: str | Path, **options: Any
) -> Labels:
    """Label every token of the reference answers with the model that should write it (CITER, section 3.3).

    Under `accelerate launch`, processes divide the work and need one directory that all of them see. The labels are
    the same for any number of processes. The same call resumes an interrupted run.

    Args:
        model: The pair. Its router at a threshold is the policy that continues the roll-outs.
        dataset: Examples with reference answers: a file, a dataset id, a `datasets.Dataset` or a list of dicts.
        checker: `math`, `choice`, `exact`, `package.module:function`, or a function (response, example) -> `Verdict`.
        out: Directory for the labels, which does not exist yet or was interrupted.
        options: The fields of `LabelOptions`, such as `router_threshold`.

    Returns:
        The labels, as `Labels.load(out)` returns them.

    Raises:
        ValueError: for examples or options that cannot be used, a checker that raises, values that are not finite, or
            a directory that was begun with other arguments.
        FileExistsError: when the directory holds something else, or finished labels.
    """
    settings, out = LabelOptions(**options), Path(out)
    check = checker if callable(checker) else get_checker(checker)
    questions = read_questions(model, dataset, settings)
    own = model.config.router_threshold
    threshold = own if settings.router_threshold is None else settings.router_threshold
    max_new_tokens = settings.max_new_tokens or 2 * max(len(one.response_ids) for one in questions)
    settings = replace(settings, router_threshold=threshold, max_new_tokens=max_new_tokens)
    # Date and machine are left out: the labels are the same whenever and wherever they are made.
    info = {key: value for key, value in provenance(model, settings).items() if key not in ("date", "machine")}
    info |= {
        "checker": checker if isinstance(checker, str) else name_of(checker).partition(":")[2],
        "examples": len(questions),
        "data_sha256": sha256_of([[vars(one.example), one.prompt_ids, one.response_ids] for one in questions]),
        "tokenizer_sha256": tokenizer_sha256(model),
    }
    shaping = {key: info[key] for key in ("checker", "data_sha256", "tokenizer_sha256", "router_sha256")}
    shaping |= {role: info[role]["sample_sha256"] for role in ("slm", "llm")}
    work = Work(out, {**vars(settings), **shaping, "router": dict(model.config.router)})
    with progress_bar(work.process == 0) as progress:
        limits = (threshold, max_new_tokens, settings.batch_tokens)
        policy = Policy(model, questions, check, *limits, work=work, progress=progress)
        # 1. Both models along the references: a table per batch, a row per token.
        most = min(settings.batch_tokens, MOST_LOGITS // model.vocab_size)
        batches = in_batches(range(len(questions)), lambda index: length(questions[index]), most)
        tables = policy.run("reading", batches, policy.read)
        names = ("question", "position", "case", "slm_token", "llm_token", "score")
        parts = {name: [table[name].to_numpy() for table in tables] for name in names}
        columns = {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}
        # 2. Roll-outs at some tokens, and the answers of each model alone.
        tokens = (columns["case"] != SLM_RIGHT).nonzero()[:, 0]
        unsure = torch.logit(columns["score"], 1e-7) - torch.logit(torch.tensor(own), 1e-7)
        tokens = least_sure(tokens, unsure.abs()[tokens], settings.rollouts, settings.seed)
        rollout, llm_rollout, extracted = policy.compare(columns, tokens)
        answers = {role: policy.answers(role) for role in ("slm", "llm")}
    # 3. Labels, -1 where nothing is known.
    case = columns["case"]
    label = torch.where(case == BOTH_WRONG, rollout, (case == SLM_RIGHT).long())
    made = {"label": label, "rollout": rollout, "llm_rollout": llm_rollout}
    info["counts"] = {**count(case, rollout, answers), "unextracted": 1 - sum(extracted) / max(len(extracted), 1)}
    if work.process == 0:
        write_labels(out, info, tables, made, questions, answers)
    del tables, parts
    work.finish()
    return Labels.load(out)


def read_questions(model: CiterForCausalLM, dataset: Any, settings: LabelOptions) -> list[Encoded]:
    """Read examples as token ids, the shortest first, which is the order of all work."""
    tokenizer, needs = tokenizer_of(model), ("response", "answer")
    examples = read_examples(dataset, settings.columns or {}, split=settings.split, needs=needs, limit=settings.limit)
    longest, end = model.config.max_position_embeddings, model.generation_config.eos_token_id
    questions = [encode(one, tokenizer, longest, end, vocab_size=model.vocab_size) for one in examples]
    return sorted(questions, key=lambda one: (length(one), one.example.row))


def length(question: Encoded) -> int:
    """Return the number of tokens of prompt and reference."""
    return len(question.prompt_ids) + len(question.response_ids)


def least_sure(tokens: torch.Tensor, unsure: torch.Tensor, budget: int | None, seed: int = 0) -> torch.Tensor:
    """Return at most `budget` of some tokens, where a distance is smallest; chance decides between equal ones."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order][unsure[order].argsort(stable=True)[:budget]].sort().values


def count(case: torch.Tensor, rollout: torch.Tensor, answers: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Count tokens, cases and roll-outs."""
    made, right = rollout >= 0, rollout == 1
    return {
        "questions": len(answers["slm"]),
        "tokens": len(case),
        "cases": {one: int((case == one).sum()) for one in CASES},
        "rollouts": {one: int(made[case == one].sum()) for one in CASES},
        "right": {one: int(right[case == one].sum()) for one in CASES},
        "positive_rollouts": int(right.sum()) / max(int(made.sum()), 1),
        **{f"{role}_accuracy": sum(correct) / len(correct) for role, correct in answers.items()},
    }


# --- Reading -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def read_references(model: CiterForCausalLM, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Return what both models say before each token of the reference answers, `[tokens]` of one after the other."""
    # 1. Prompts and references, padded on the right: ids [batch, width].
    texts = [one.prompt_ids + one.response_ids for one in batch]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.slm.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=ids.device)
    positions = torch.arange(width, device=ids.device)[None]
    # 2. The state before a token decides about it. Logits are kept from the shortest prompt's last token on.
    kept = width - min(len(one.prompt_ids) for one in batch) + 1
    states = [
        (index, len(one.prompt_ids) - 1 + place)
        for index, one in enumerate(batch)
        for place in range(len(one.response_ids))
    ]
    sequence, place = torch.tensor(states, device=ids.device).T
    reference, at = ids[sequence, place + 1], (sequence, place - width + kept)
    # 3. One pass of each model.
    inputs = {"attention_mask": mask, "position_ids": positions}
    slm = model.run_slm(ids, None, kept, **inputs)
    hidden, slm_logits = slm.hidden[at], slm.logits[at]
    slm_token, slm_logprob = follow(slm_logits, reference)
    largest = top_logprobs(slm_logits, TOP_LOGPROBS)
    score = model.router(hidden, slm_logits).float()
    del slm, slm_logits
    llm_token, llm_logprob = follow(model.run_llm(ids, None, kept, **inputs)[at], reference)
    case = torch.where(llm_token == reference, LLM_RIGHT, BOTH_WRONG)
    return {
        "hidden": hidden.to(torch.float16),
        "top_logprobs": largest.to(torch.float16),
        "case": torch.where(slm_token == reference, SLM_RIGHT, case),
        "reference_token": reference,
        "slm_token": slm_token,
        "llm_token": llm_token,
        "slm_logprob": slm_logprob,
        "llm_logprob": llm_logprob,
        "score": score,
    }


def follow(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest token at each position and the log-probability of the reference token."""
    tokens, logprobs = [], []
    for part, wanted in zip(torch.split(logits, SLICE), torch.split(reference[:, None], SLICE), strict=True):
        tokens.append(part.argmax(-1))
        logprobs.append(part.float().log_softmax(-1).gather(1, wanted)[:, 0])
    return torch.cat(tokens), torch.cat(logprobs)


# --- Units of work -------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Whether the answer of a roll-out is right, and whether there is one."""

    correct: bool
    extracted: bool


@dataclass(frozen=True)
class Policy:
    """The pair at a threshold, which continues roll-outs, and the checker that judges them, in units of work."""

    model: CiterForCausalLM
    questions: Sequence[Encoded]
    checker: Checker | None
    threshold: float
    max_new_tokens: int
    batch_tokens: int
    work: Work
    progress: Progress

    def run(self, name: str, units: Sequence[Any], compute: Callable[[Any], Any]) -> list[Any]:
        """Compute units of work, and show how far this process is with its own."""
        self.progress.begin(name, math.ceil(len(units) / self.work.processes))
        return self.work.run(name, units, compute, self.progress)

    def read(self, batch: Sequence[int]) -> Any:
        """Return a table of what both models say along the references of some questions."""
        columns = read_references(self.model, [self.questions[index] for index in batch])
        places = [(index, place) for index in batch for place in range(len(self.questions[index].response_ids))]
        question, position = torch.tensor(places).T
        logprobs = columns["slm_logprob"] + columns["llm_logprob"]
        for name, values in (("hidden states", columns["hidden"]), ("log-probabilities", logprobs[:, None])):
            broken = question[~values.isfinite().all(dim=1).cpu()].tolist()
            if broken:
                example = self.questions[broken[0]].example
                raise ValueError(
                    f"model: NaN or infinite {name} at the example {example.id!r} (row {example.row}). Hidden states "
                    "are kept in fp16, up to 65504. Load the pair in a precision that it was trained for, such as "
                    "dtype='bfloat16', and check its weights."
                )
        return token_table({"question": question, "position": position, **columns})

    def compare(
        self, columns: Mapping[str, torch.Tensor], tokens: torch.Tensor, when: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Roll out the SLM's token at some tokens, and the LLM's where that fails.

        Returns the outcomes of both over all tokens, -1 where there is none, and which roll-outs had an answer.
        """
        names = ("question", "position", "slm_token", "llm_token")
        states = torch.stack([columns[name][tokens].long() for name in names], dim=1).tolist()
        by_slm, by_llm = ([RollOut(one[0], one[1], one[action]) for one in states] for action in (2, 3))
        made = self.outcomes(f"roll-outs of the SLM{when}", by_slm)
        failed = [other for one, other in zip(by_slm, by_llm, strict=True) if not made[one].correct]
        made |= self.outcomes(f"roll-outs of the LLM{when}", [one for one in failed if one not in made])
        rollout, llm_rollout = (torch.full((len(columns["case"]),), -1) for _ in range(2))
        rollout[tokens] = torch.tensor([int(made[one].correct) for one in by_slm])
        llm_rollout[tokens[rollout[tokens] == 0]] = torch.tensor([int(made[one].correct) for one in failed])
        return rollout, llm_rollout, [one.extracted for one in made.values()]

    def answers(self, role: str) -> list[bool]:
        """Return whether a model alone answers each question rightly."""
        whole = [RollOut(index, 0, -1) for index in range(len(self.questions))]
        alone = replace(self, threshold=SLM_ALONE if role == "slm" else LLM_ALONE)
        outcomes = alone.outcomes(f"answers of the {role.upper()}", whole)
        return [outcomes[one].correct for one in whole]

    def outcomes(self, name: str, wanted: Sequence[RollOut]) -> dict[RollOut, Outcome]:
        """Make roll-outs and judge their answers."""
        batches = cut_into_batches(wanted, self.questions, self.max_new_tokens, self.batch_tokens)
        judged = self.run(name, batches, self.judge)
        return {
            one: Outcome(*outcome)
            for batch, of_batch in zip(batches, judged, strict=True)
            for one, outcome in zip(batch, of_batch, strict=True)
        }

    def judge(self, batch: Sequence[RollOut]) -> list[Outcome]:
        """Make a batch of roll-outs and judge their answers."""
        assert self.checker is not None
        written = roll_out(self.model, self.questions, batch, self.threshold, self.max_new_tokens)
        responses = tokenizer_of(self.model).batch_decode(written, skip_special_tokens=True)
        examples = [self.questions[one.question].example for one in batch]
        verdicts = [judge(self.checker, *one) for one in zip(responses, examples, strict=True)]
        return [Outcome(bool(one.correct), one.extracted is not None) for one in verdicts]
