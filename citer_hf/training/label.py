"""`label_preferences`: which model should write each token of the reference answers (CITER, section 3.3).

1. Both models read every reference answer in one forward pass: cases 1 and 2 need nothing else.
2. Where the SLM's token differs from the reference, it is rolled out with the current policy: case 3. Case 2 is rolled
   out as well, which `citer-plus` asks for and the paper's method does not look at. Where a roll-out fails, the LLM's
   token is rolled out too.
3. Both are joined into Parquet with a card.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from citer_hf import CiterForCausalLM
from citer_hf.data.checkers import Checker, named
from citer_hf.data.examples import DataOptions, Example, read_examples
from citer_hf.data.tokens import Encoded, encode, show_prompt
from citer_hf.evaluation import decode
from citer_hf.evaluation.results import bootstrap_interval
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, top_logprobs
from citer_hf.runs import Work, arguments_of, option, provenance, sha256_of, work_in
from citer_hf.scale.ray_work import Load, pool_of

from .labels import BOTH_WRONG, LLM_RIGHT, SLM_RIGHT, TOP_LOGPROBS, Labels, tokenizer_sha256, write_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelOptions(DataOptions):
    router_threshold: float | None = option(
        None, "Of the roll-outs: 0 is the SLM alone, 2 the LLM alone. [default: the pair's]", metavar="X"
    )
    rollouts: int | None = option(None, "Roll-outs at most, where the router is unsure.", metavar="N", min=0)
    max_new_tokens: int | None = option(None, "Longest response. [default: 2 references]", metavar="N", min=1)
    batch_tokens: int = option(
        decode.BATCH_TOKENS, "Tokens, prompts included, that are decoded at once.", metavar="N", min=1
    )
    seed: int = option(0, "Decides between states of which the router is equally unsure.")


def label_preferences(
    model: CiterForCausalLM,
    dataset: Any,
    checker: str | Checker,
    out: str | Path,
    *,
    ray: bool | Load = False,
    **options: Any,
) -> Labels:
    """Label every token of the reference answers with the model that should write it (CITER, section 3.3).

    Under `accelerate launch`, processes divide the work and need one directory that all of them see. The labels are
    the same for any number of processes. The same call resumes an interrupted run.

    Args:
        model: The pair. Its router at a threshold is the policy that continues the roll-outs.
        dataset: Examples with reference answers: a file, a dataset id, a `datasets.Dataset` or a list of dicts.
        checker: `math`, `choice`, `exact`, `package.module:function`, or a function (response, example) -> `Verdict`.
        out: Directory for the labels, which does not exist yet or was interrupted.
        ray: Divide the work among the machines of a Ray cluster: a function that loads the pair there, or `True` for a
            pair that was loaded from a repository.
        options: The fields of `LabelOptions`, such as `router_threshold`.

    Returns:
        The labels, as `Labels.load(out)` returns them.

    Raises:
        ValueError: for unusable examples or options, values that are not finite, or an `out` of other arguments.
        FileExistsError: when the directory holds something else, or finished labels.
    """
    settings, out = LabelOptions(**options), Path(out)
    (name, check), tokenizer = named(checker), tokenizer_sha256(model)
    reading = {field.name: getattr(settings, field.name) for field in fields(DataOptions)}
    examples = read_examples(dataset, **reading, needs=("response", "answer"))
    decode.check_answers(check, examples)
    longest, end = model.config.max_position_embeddings, decode.end_tokens(model)
    about = (model.load_tokenizer(), longest, end, model.vocab_size)
    encoded, dropped = usable(examples, lambda one: encode(one, *about))
    show_prompt(about[0], encoded[0].prompt_ids)
    # The longest first, which is the order of all work: memory that is too small shows at once.
    questions = sorted(encoded, key=lambda one: (-len(one.prompt_ids + one.response_ids), one.example.row))
    own = model.config.router_threshold
    threshold = own if settings.router_threshold is None else settings.router_threshold
    max_new_tokens = settings.max_new_tokens or 2 * max(len(one.response_ids) for one in questions)
    settings = replace(settings, router_threshold=threshold, max_new_tokens=max_new_tokens)
    # Date and machine are left out: the labels are the same whenever and wherever they are made.
    info = {key: value for key, value in provenance(model, settings).items() if key not in ("date", "machine")}
    info |= {
        "checker": name if isinstance(checker, str) else name.partition(":")[2],
        "examples": len(questions),
        "data_sha256": sha256_of([[vars(one.example), one.prompt_ids, one.response_ids] for one in questions]),
        "tokenizer_sha256": tokenizer,
        "dropped": dropped,
    }
    with work_in(out, arguments_of(info) | {"router": dict(model.config.router)}, pool_of(model, ray)) as work:
        policy = Policy(model, questions, check, threshold, max_new_tokens, settings.batch_tokens, work)
        # 1. Both models along the references, in columns over all their tokens.
        columns = joined(work.run("reading", policy.units(range(len(questions))), policy.read))
        case = columns["case"]
        # 2. The answers of each model alone, and roll-outs at some tokens.
        answers = {role: policy.answers(role) for role in ("slm", "llm")}
        decode.warn_of_llm(answers["llm"])
        unsure = (torch.logit(columns.pop("score"), 1e-7) - torch.logit(torch.tensor(own), 1e-7)).abs()
        tokens = (case != SLM_RIGHT).nonzero()[:, 0]
        # The budget is spent where the router is least sure; chance decides between equal states.
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(settings.seed))]
        tokens = tokens[unsure[tokens].argsort(stable=True)[: settings.rollouts]].sort().values
        rollout, llm_rollout = policy.compare(columns, tokens)
        # 3. Labels, -1 where nothing is known.
        label = torch.where(case == BOTH_WRONG, rollout, (case == SLM_RIGHT).to(torch.int8))
        columns |= {"label": label, "rollout": rollout, "llm_rollout": llm_rollout}
        made = rollout[rollout >= 0]
        info["counts"] = {
            "questions": len(questions),
            "dropped_examples": len(dropped),
            "tokens": len(case),
            "cases": {one: int((case == one).sum()) for one in (SLM_RIGHT, LLM_RIGHT, BOTH_WRONG)},
            # Beyond --rollouts.
            "tokens_without_rollout": int(((case != SLM_RIGHT) & (rollout < 0)).sum()),
            "rollouts": len(made),
            "positive_rollouts": int(made.sum()) / max(len(made), 1),
            **{f"{role}_accuracy": fmean(correct) for role, correct in answers.items()},
            **{f"{role}_accuracy_ci": bootstrap_interval(answers[role], seed=0) for role in answers},
        }
        if work.process == 0:
            write_labels(out, info, columns, questions, answers)
    return Labels.load(out)


def usable(examples: Sequence[Example], encoding: Callable[[Example], Encoded]) -> tuple[list[Encoded], list[Any]]:
    """Return the examples that the pair can take, and why others are left out; raise an error when that is all."""
    encoded: list[Encoded] = []
    dropped: list[dict[str, Any]] = []
    for number, one in enumerate(examples, start=1):
        try:
            encoded.append(encoding(one))
        except ValueError as error:
            if number == len(examples) and not encoded:
                raise
            dropped.append({"id": one.id, "row": one.row, "reason": str(error)})
            logger.warning("Left out: %s", error)
    return encoded, dropped


def joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def logprobs_of(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities `[tokens]` of tokens, from logits `[tokens, vocabulary]`."""
    return -cross_entropy(logits.float(), tokens, reduction="none")


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

    def units(self, whole: Sequence[Any]) -> list[Sequence[Any]]:
        longest = max(len(one.prompt_ids) for one in self.questions) + self.max_new_tokens
        return decode.units(whole, longest, self.batch_tokens)

    @torch.inference_mode()
    def read(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        llm: Any = self.model.llm
        by_llm: Sequence[Any] = [None] * len(batch)
        if getattr(llm, "is_remote", False):
            questions = [self.questions[index] for index in batch]
            by_llm = llm.read([(one.prompt_ids + one.response_ids, len(one.response_ids)) for one in questions])
        return joined([self.read_one(index, own) for index, own in zip(batch, by_llm, strict=True)])

    def read_one(self, index: int, by_llm: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Return what both models predict before each token of the reference; a remote LLM has told it already."""
        model, question = self.model, self.questions[index]
        ids = torch.tensor([question.prompt_ids + question.response_ids], device=model.slm.device)
        count = len(question.response_ids)
        reference, before = ids[0, -count:], ids[:, :-1]
        # The state before a token decides about it: [tokens, width] and [tokens, vocabulary].
        slm = model.run_slm(before, logits_to_keep=count)
        hidden, slm_logits = slm.hidden[0], slm.logits[0]
        if by_llm is None:
            llm_logits = model.run_llm(before, logits_to_keep=count)[0]
            by_llm = llm_logits.argmax(-1), logprobs_of(reference, llm_logits)
        llm_token, llm_logprobs = (one.to(reference.device) for one in by_llm)
        slm_token, logprobs = slm_logits.argmax(-1), [logprobs_of(reference, slm_logits), llm_logprobs]
        if not (hidden.half().isfinite().all() and torch.cat(logprobs).isfinite().all()):
            raise ValueError(
                "model: NaN, or hidden states that fp16 cannot hold (up to 65504), at the example "
                f"{question.example.id!r}. Load the pair in another precision, such as dtype='bfloat16'."
            )
        case = torch.where(llm_token == reference, LLM_RIGHT, BOTH_WRONG)
        columns = {
            "question": torch.full((count,), index),
            "position": torch.arange(count, dtype=torch.int32),
            "hidden": hidden.half(),
            "top_logprobs": top_logprobs(slm_logits, TOP_LOGPROBS).half(),
            "case": torch.where(slm_token == reference, SLM_RIGHT, case).to(torch.int8),
            "reference_token": reference.int(),
            "slm_token": slm_token.int(),
            "llm_token": llm_token.int(),
            "slm_logprob": logprobs[0],
            "llm_logprob": logprobs[1],
            "score": model.router(hidden, slm_logits).float(),
        }
        return {name: values.cpu() for name, values in columns.items()}

    def compare(
        self, columns: Mapping[str, torch.Tensor], tokens: torch.Tensor, when: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outcomes of the SLM's token and, where it fails, the LLM's; -1 elsewhere."""
        names = ("question", "position", "slm_token", "llm_token")
        states = torch.stack([columns[name][tokens] for name in names], dim=1).tolist()
        by_slm, by_llm = ([RollOut(one[0], one[1], one[action]) for one in states] for action in (2, 3))
        made = self.outcomes(f"roll-outs of the SLM{when}", by_slm)
        failed = [other for one, other in zip(by_slm, by_llm, strict=True) if not made[one]]
        made |= self.outcomes(f"roll-outs of the LLM{when}", [one for one in failed if one not in made])
        rollout, llm_rollout = (torch.full((len(columns["case"]),), -1, dtype=torch.int8) for _ in range(2))
        rollout[tokens] = torch.tensor([made[one] for one in by_slm], dtype=torch.int8)
        llm_rollout[tokens[rollout[tokens] == 0]] = torch.tensor([made[one] for one in failed], dtype=torch.int8)
        return rollout, llm_rollout

    def answers(self, role: str) -> list[bool]:
        whole = [RollOut(index, 0, -1) for index in range(len(self.questions))]
        alone = replace(self, threshold=SLM_ALONE if role == "slm" else LLM_ALONE)
        outcomes = alone.outcomes(f"answers of the {role.upper()}", whole)
        return [outcomes[one] for one in whole]

    def outcomes(self, name: str, wanted: Sequence["RollOut"]) -> dict["RollOut", bool]:
        """Make roll-outs, and return for each whether its answer is right."""
        # Roll-outs of a question follow each other, those from its longest states first: the engine copies the tokens
        # that a state has in common with one that it holds.
        wanted = sorted(wanted, key=lambda one: (one.question, -one.position))
        judged = self.work.run(name, self.units(wanted), self.judge)
        return dict(zip(wanted, chain(*judged), strict=True))

    def judge(self, batch: Sequence["RollOut"]) -> list[bool]:
        assert self.checker is not None
        responses = self.model.load_tokenizer().batch_decode(self.roll_out(batch), skip_special_tokens=True)
        examples = [self.questions[one.question].example for one in batch]
        return [bool(self.checker(*one).correct) for one in zip(responses, examples, strict=True)]

    def roll_out(self, batch: Sequence["RollOut"]) -> list[list[int]]:
        """Take actions and let the policy write to the end; return whole responses."""
        ends, limit = decode.end_tokens(self.model), self.model.config.max_position_embeddings or math.inf
        # Responses up to the state, and the action.
        responses = [
            self.questions[one.question].response_ids[: one.position] + [one.token] * (one.token >= 0) for one in batch
        ]
        texts = [
            self.questions[one.question].prompt_ids + response for one, response in zip(batch, responses, strict=True)
        ]
        going = [
            index
            for index, one in enumerate(batch)
            if one.token not in ends and len(responses[index]) < self.max_new_tokens and len(texts[index]) < limit
        ]
        written = decode.decode(
            self.model,
            [texts[index] for index in going],
            router_threshold=self.threshold,
            max_new_tokens=[self.max_new_tokens - len(responses[index]) for index in going],
            alone="slm" if self.threshold == SLM_ALONE else "llm" if self.threshold > 1 else None,
            batch_tokens=self.batch_tokens,
        )
        for index, output in zip(going, written, strict=True):
            responses[index] = responses[index] + output.tokens
        return [response[: self.max_new_tokens] for response in responses]


class RollOut(NamedTuple):
    """An action at a state: a token at a position of the reference; -1 leaves the action to the policy."""

    question: int
    position: int
    token: int
