"""`label_preferences`: which model should write each token of the reference answers (CITER, section 3.3).

1. Both models read every reference answer in one forward pass: cases 1 and 2 need nothing else.
2. Where the SLM's token differs from the reference, it is rolled out with the current policy: case 3. Case 2 is rolled
   out as well, which `citer-plus` asks for and the paper's method does not look at. Where a roll-out fails, the LLM's
   token is rolled out too.
3. Both are joined into Parquet shards with a card.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.data.checkers import Checker, get_checker
from citer_hf.data.examples import DataOptions, read_examples
from citer_hf.data.tokens import Encoded, encode, real_tokens
from citer_hf.evaluation import decode
from citer_hf.evaluation.evaluate import judge, name_of
from citer_hf.model.compat import CACHE
from citer_hf.model.kv_layers import all_grow, growing_cache
from citer_hf.model.routers import LLM_ALONE, SLM_ALONE, top_logprobs
from citer_hf.runs import Work, option, provenance, sha256_of, work_in

from .labels import BOTH_WRONG, LLM_RIGHT, SLM_RIGHT, TOP_LOGPROBS, Labels, token_table, tokenizer_sha256, write_labels

# Positions whose log-probabilities over the whole vocabulary are in memory at once.
SLICE = 2048
# After so many tokens, finished sequences leave the batch.
STRETCH = 32


@dataclass(frozen=True)
class LabelOptions(DataOptions):
    router_threshold: float | None = option(
        None, "Of the roll-outs: 0 is the SLM alone, 2 the LLM alone. [default: the pair's]", metavar="X"
    )
    rollouts: int | None = option(None, "Roll-outs at most, where the router is unsure.", metavar="N", min=0)
    max_new_tokens: int | None = option(None, "Longest response. [default: 2 references]", metavar="N", min=1)
    batch_tokens: int = option(decode.BATCH_TOKENS, "Tokens in a batch, padding included.", metavar="N", min=1)
    seed: int = option(0, "Decides between states of which the router is equally unsure.")


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
    import pyarrow as pa

    settings, out = LabelOptions(**options), Path(out)
    check, tokenizer = checker if callable(checker) else get_checker(checker), tokenizer_sha256(model)
    needs, mapping = ("response", "answer"), settings.columns or {}
    examples = read_examples(dataset, mapping, split=settings.split, needs=needs, limit=settings.limit)
    longest, end = model.config.max_position_embeddings, model.generation_config.eos_token_id
    made = [encode(one, model.load_tokenizer(), longest, end, vocab_size=model.vocab_size) for one in examples]
    # The longest first, which is the order of all work.
    questions = sorted(made, key=lambda one: (-length(one), one.example.row))
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
        "tokenizer_sha256": tokenizer,
    }
    shaping = {key: info[key] for key in ("checker", "data_sha256", "tokenizer_sha256", "router_sha256")}
    shaping |= {role: info[role]["sample_sha256"] for role in ("slm", "llm")}
    with work_in(out, {**vars(settings), **shaping, "router": dict(model.config.router)}) as work:
        policy = Policy(model, questions, check, threshold, max_new_tokens, settings.batch_tokens, work)
        # 1. Both models along the references: a table per batch, a row per token.
        most = min(settings.batch_tokens, decode.MOST_LOGITS // model.vocab_size)
        groups = [places for places, _ in decode.batches([length(one) for one in questions], 0, None, most)]
        table = pa.concat_tables(work.run("reading", groups, policy.read))
        names = ("question", "position", "case", "slm_token", "llm_token", "score")
        columns = {name: torch.tensor(table[name].to_numpy()) for name in names}
        # 2. Roll-outs at some tokens, and the answers of each model alone.
        tokens = (columns["case"] != SLM_RIGHT).nonzero()[:, 0]
        unsure = torch.logit(columns["score"], 1e-7) - torch.logit(torch.tensor(own), 1e-7)
        tokens = least_sure(tokens, unsure.abs()[tokens], settings.rollouts, settings.seed)
        rollout, llm_rollout, extracted = policy.compare(columns, tokens)
        answers = {role: policy.answers(role) for role in ("slm", "llm")}
        # 3. Labels, -1 where nothing is known.
        case = columns["case"]
        label = torch.where(case == BOTH_WRONG, rollout, (case == SLM_RIGHT).long())
        outcomes = {"label": label, "rollout": rollout, "llm_rollout": llm_rollout}
        counts = count(case, rollout, answers)
        info["counts"] = {**counts, "unextracted": 1 - sum(extracted) / max(len(extracted), 1)}
        if work.process == 0:
            write_labels(out, info, table, outcomes, questions, answers)
        del table
    return Labels.load(out)


def length(question: Encoded) -> int:
    return len(question.prompt_ids) + len(question.response_ids)


def least_sure(tokens: torch.Tensor, unsure: torch.Tensor, budget: int | None, seed: int = 0) -> torch.Tensor:
    """Return at most `budget` of some tokens, where a distance is smallest; chance decides between equal ones."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order][unsure[order].argsort(stable=True)[:budget]].sort().values


def count(case: torch.Tensor, rollout: torch.Tensor, answers: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    cases, made, right = (SLM_RIGHT, LLM_RIGHT, BOTH_WRONG), rollout >= 0, rollout == 1
    return {
        "questions": len(answers["slm"]),
        "tokens": len(case),
        "cases": {one: int((case == one).sum()) for one in cases},
        "rollouts": {one: int(made[case == one].sum()) for one in cases},
        "right": {one: int(right[case == one].sum()) for one in cases},
        "positive_rollouts": int(right.sum()) / max(int(made.sum()), 1),
        **{f"{role}_accuracy": sum(correct) / len(correct) for role, correct in answers.items()},
    }


def follow(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest token at each position and the log-probability of the reference token."""
    parts = zip(torch.split(logits, SLICE), torch.split(reference[:, None], SLICE), strict=True)
    logprobs = [part.float().log_softmax(-1).gather(1, wanted)[:, 0] for part, wanted in parts]
    return logits.argmax(-1), torch.cat(logprobs)


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

    @torch.inference_mode()
    def read(self, batch: Sequence[int]) -> Any:
        """Return what both models predict before each token of the references of some questions."""
        model, questions = self.model, [self.questions[index] for index in batch]
        # 1. Prompts and references, padded on the right: ids [batch, width]; starts and ends of references [batch, 1].
        width = max(map(length, questions))
        texts = [one.prompt_ids + one.response_ids + [0] * (width - length(one)) for one in questions]
        ids = torch.tensor(texts, device=model.slm.device)
        places = torch.arange(width, device=ids.device)[None]
        starts, ends = torch.tensor([(len(one.prompt_ids), length(one)) for one in questions]).T[..., None].to(ids)
        # 2. The state before a token decides about it. Logits are kept from the shortest prompt's last token on.
        kept = width - int(starts.min()) + 1
        sequence, place = ((places >= starts - 1) & (places < ends - 1)).nonzero().T
        reference, at = ids[sequence, place + 1], (sequence, place - width + kept)
        # 3. One pass of each model.
        inputs = {"attention_mask": (places < ends).long(), "position_ids": places}
        slm = model.run_slm(ids, None, kept, **inputs)
        hidden, slm_logits = slm.hidden[at].to(torch.float16), slm.logits[at]
        slm_token, slm_logprob = follow(slm_logits, reference)
        largest = top_logprobs(slm_logits, TOP_LOGPROBS).to(torch.float16)
        score = model.router(slm.hidden[at], slm_logits).float()
        del slm, slm_logits
        llm_token, llm_logprob = follow(model.run_llm(ids, None, kept, **inputs)[at], reference)
        finite = hidden.isfinite().all(dim=1) & (slm_logprob + llm_logprob).isfinite()
        if not finite.all():
            example = questions[int(sequence[~finite][0])].example
            raise ValueError(
                "model: NaN or infinite hidden states (kept in fp16, up to 65504) or log-probabilities at the example "
                f"{example.id!r} (row {example.row}). Load the pair in a precision that it was trained for, such as "
                "dtype='bfloat16', and check its weights."
            )
        case = torch.where(llm_token == reference, LLM_RIGHT, BOTH_WRONG)
        columns = {
            "question": torch.tensor(batch, device=ids.device)[sequence],
            "position": (place + 1 - starts[sequence, 0]).int(),
            "hidden": hidden,
            "top_logprobs": largest,
            "case": torch.where(slm_token == reference, SLM_RIGHT, case).to(torch.int8),
            "reference_token": reference.int(),
            "slm_token": slm_token.int(),
            "llm_token": llm_token.int(),
            "slm_logprob": slm_logprob,
            "llm_logprob": llm_logprob,
            "score": score,
        }
        return token_table(columns)

    def compare(
        self, columns: Mapping[str, torch.Tensor], tokens: torch.Tensor, when: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Return outcomes of the SLM's token and, where it fails, the LLM's, -1 elsewhere, and which had an answer."""
        names = ("question", "position", "slm_token", "llm_token")
        states = torch.stack([columns[name][tokens] for name in names], dim=1).tolist()
        by_slm, by_llm = ([RollOut(one[0], one[1], one[action]) for one in states] for action in (2, 3))
        made = self.outcomes(f"roll-outs of the SLM{when}", by_slm)
        failed = [other for one, other in zip(by_slm, by_llm, strict=True) if not made[one][0]]
        made |= self.outcomes(f"roll-outs of the LLM{when}", [one for one in failed if one not in made])
        rollout, llm_rollout = (torch.full((len(columns["case"]),), -1) for _ in range(2))
        rollout[tokens] = torch.tensor([int(made[one][0]) for one in by_slm])
        llm_rollout[tokens[rollout[tokens] == 0]] = torch.tensor([int(made[one][0]) for one in failed])
        return rollout, llm_rollout, [extracted for _, extracted in made.values()]

    def answers(self, role: str) -> list[bool]:
        whole = [RollOut(index, 0, -1) for index in range(len(self.questions))]
        alone = replace(self, threshold=SLM_ALONE if role == "slm" else LLM_ALONE)
        outcomes = alone.outcomes(f"answers of the {role.upper()}", whole)
        return [outcomes[one][0] for one in whole]

    def outcomes(self, name: str, wanted: Sequence["RollOut"]) -> dict["RollOut", tuple[bool, bool]]:
        """Make roll-outs, and return for each whether its answer is right, and whether it has one."""
        asked = [self.questions[one.question] for one in wanted]
        lengths = [length(one) + min(len(one.response_ids), self.max_new_tokens) for one in asked]
        groups = [places for places, _ in decode.batches(lengths, 0, None, self.batch_tokens)]
        judged = self.work.run(name, [[wanted[place] for place in places] for places in groups], self.judge)
        return {
            wanted[place]: (correct, extracted)
            for places, outcomes in zip(groups, judged, strict=True)
            for place, (correct, extracted) in zip(places, outcomes, strict=True)
        }

    def judge(self, batch: Sequence["RollOut"]) -> list[tuple[bool, bool]]:
        assert self.checker is not None
        written = roll_out(self.model, self.questions, batch, self.threshold, self.max_new_tokens)
        responses = self.model.load_tokenizer().batch_decode(written, skip_special_tokens=True)
        examples = [self.questions[one.question].example for one in batch]
        verdicts = [judge(self.checker, *one) for one in zip(responses, examples, strict=True)]
        return [(bool(one.correct), one.extracted is not None) for one in verdicts]


# --- Roll-outs ------------------------------------------------------------------------------------------------------
#
# All states of a question lie along its reference answer. The policy reads prompt and reference once. Every roll-out
# starts from a copy of its cache in which the tokens after the state are hidden; only the token of the action is new.


class RollOut(NamedTuple):
    """An action at a state: a token at a position of the reference; -1 leaves the action to the policy."""

    question: int
    position: int
    token: int


# A policy that has read prompts and references, one sequence per roll-out: model, cache, ids, mask, options.
Prefixes = tuple[Any, Any, torch.Tensor, torch.Tensor, dict[str, Any]]


def roll_out(
    model: CiterForCausalLM,
    questions: Sequence[Encoded],
    batch: Sequence[RollOut],
    router_threshold: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """Take actions and let the policy, the pair at a threshold, write to the end; return whole responses."""
    end_tokens, _ = decode.special_tokens(model)
    # Responses up to the state, and the action.
    responses = [[*questions[one.question].response_ids[: one.position], one.token] for one in batch]
    responses = [response if one.token >= 0 else response[:-1] for one, response in zip(batch, responses, strict=True)]
    short = [index for index, response in enumerate(responses) if len(response) < max_new_tokens]
    going = [index for index in short if batch[index].token not in end_tokens]
    if not going:
        return responses
    new_tokens = max_new_tokens - min(len(responses[index]) for index in going)
    asked = [batch[index].question for index in going]
    states = [(one, questions[one].prompt_ids + responses[index]) for one, index in zip(asked, going, strict=True)]
    prefixes = shared_prefixes(model, questions, states, router_threshold)
    if prefixes is None:
        texts = [text for _, text in states]
        # One batch, whatever its size: it was cut before.
        limits: dict[str, Any] = {"max_new_tokens": new_tokens, "batch_tokens": 1 << 40}
        written = [one.tokens for one in decode.decode(model, texts, router_threshold=router_threshold, **limits)]
    else:
        limit = model.config.max_position_embeddings
        if limit is not None:
            new_tokens = min(new_tokens, limit - int(prefixes[3].sum(dim=1).max()))
        written = write_on(prefixes, end_tokens, new_tokens)
    for index, tokens in zip(going, written, strict=True):
        responses[index] = (responses[index] + tokens)[:max_new_tokens]
    return responses


@torch.inference_mode()
def shared_prefixes(
    model: CiterForCausalLM, questions: Sequence[Encoded], states: Sequence[tuple[int, list[int]]], threshold: float
) -> Prefixes | None:
    """Run the policy over the question of every state once; `None` where its cache cannot hide tokens."""
    alone: Any = "slm" if threshold == SLM_ALONE else "llm" if threshold > 1 else None
    policy = decode.greedy_view(model, alone)
    cache = CiterCache(model.config) if alone is None else growing_cache(policy.config)
    # 1. Prompts and references, padded on the left: ids [questions, width].
    asked = sorted({question for question, _ in states})
    texts = [questions[index].prompt_ids + questions[index].response_ids for index in asked]
    width = max(map(len, texts))
    device, padding = policy.device, decode.special_tokens(model)[1]
    ids = torch.tensor([[padding] * (width - len(text)) + text for text in texts], device=device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=device)
    inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
    if alone is None:
        # Both models read: above 1, the LLM is always called.
        model(ids, cache=cache, logits_to_keep=1, router_threshold=LLM_ALONE, **inputs)
    else:
        (model.run_slm if alone == "slm" else model.run_llm)(ids, cache, 1, **inputs)
    if not all(map(all_grow, (cache.slm, cache.llm) if isinstance(cache, CiterCache) else (cache,))):
        return None
    # 2. One copy per roll-out, with what follows the state hidden, and the last token of the state to be read.
    sequences = torch.tensor([asked.index(question) for question, _ in states], device=device)
    cache.batch_select_indices(sequences)
    first = (mask == 0).sum(dim=1)[sequences, None]
    end = first + torch.tensor([[len(text) - 1] for _, text in states], device=device)
    places = torch.arange(width, device=device)
    last = torch.tensor([text[-1:] for _, text in states], device=device)
    visible = torch.cat([(places >= first) & (places < end), torch.ones_like(last, dtype=torch.bool)], dim=1)
    options = {"router_threshold": threshold, "waiting_rows": decode.steady_policy} if alone is None else {}
    return policy, cache, torch.cat([ids[sequences], last], dim=1), visible.long(), options


def write_on(prefixes: Prefixes, end_tokens: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Let the policy write from every state to the end."""
    policy, cache, ids, mask, options = prefixes
    written: list[list[int]] = [[] for _ in ids]
    going = list(range(len(ids)))
    while going and max_new_tokens > 0:
        # States near the end of their answer are done soon, and need not be carried to the end of the others'.
        stretch = min(STRETCH, max_new_tokens)
        max_new_tokens -= stretch
        output = policy.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=stretch, **{CACHE: cache}, **options
        )
        new = output[:, ids.shape[1] :]
        lengths = real_tokens(new, end_tokens).sum(dim=1).tolist()
        for index, tokens in zip(going, decode.cut(new, lengths), strict=True):
            written[index] += tokens
        kept = [place for place, index in enumerate(going) if written[index][-1] not in end_tokens]
        if not kept or not max_new_tokens:
            break
        going = [going[place] for place in kept]
        chosen = torch.tensor(kept, device=ids.device)
        ids, mask = output[chosen], torch.cat([mask, torch.ones_like(new)], dim=1)[chosen]
        cache.batch_select_indices(chosen)
    return written
