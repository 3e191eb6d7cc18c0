"""Labels on disk and in memory.

A directory of labels is a `datasets` repository: Parquet shards in `data/` (a row per token of a reference answer) and
`questions/` (a row per question), a card, and `labels.json`, the last file, with what the labels were made with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from citer_hf import CiterForCausalLM
from citer_hf.data.examples import Example
from citer_hf.data.tokens import Encoded
from citer_hf.runs import atomic_write, base_models, import_extra, read_json, sha256_of, write_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa, pq = (import_extra(name, "train") for name in ("pyarrow", "pyarrow.parquet"))

INFO = "labels.json"
# Rows of a file.
SHARD = 1 << 16
CARD = Path(__file__).with_name("card.md")
TOP_LOGPROBS = 8
SLM_RIGHT, LLM_RIGHT, BOTH_WRONG = 1, 2, 3
INTEGERS = ("position", "case", "reference_token", "slm_token", "llm_token", "label", "rollout", "llm_rollout")
LOGPROBS = ("slm_logprob", "llm_logprob")
VECTORS = ("hidden", "top_logprobs")


def write_labels(
    out: Path,
    info: Mapping[str, Any],
    columns: Mapping[str, torch.Tensor],
    questions: Sequence[Encoded],
    answers: Mapping[str, Sequence[bool]],
) -> None:
    """Write shards, card and, last, `labels.json`; columns `[tokens]` or `[tokens, width]` are over all references."""
    ids = np.array([one.example.id for one in questions])
    table = {name: _array(values) for name, values in columns.items()}
    table["question"] = pa.array(ids[columns["question"].numpy()])
    tokens, starts = pa.table(table), range(0, len(table["question"]), SHARD)
    for number, start in enumerate(starts):
        _write(tokens[start : start + SHARD], out / "data" / f"train-{number:05d}-of-{len(starts):05d}.parquet")
    asked = {
        "question": [one.example.id for one in questions],
        "prompt_ids": [one.prompt_ids for one in questions],
        "reference_ids": [one.response_ids for one in questions],
        **{f"{role}_correct": list(correct) for role, correct in answers.items()},
        "example": [json.dumps(vars(one.example)) for one in questions],
    }
    _write(pa.table(asked), out / "questions" / "train-00000-of-00001.parquet")
    card = CARD.read_text(encoding="utf-8").format(
        **info["counts"],
        router_threshold=info["options"]["router_threshold"],
        info=INFO,
        made_with=json.dumps({key: value for key, value in info.items() if key != "counts"}, indent=2),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    write_json(out / INFO, info)


def _array(values: torch.Tensor) -> pa.Array:
    """Return a column of a table; outcomes are int8, and -1 where they are not known."""
    numbers = values.numpy()
    flat = pa.array(numbers.reshape(-1), mask=numbers < 0 if values.dtype == torch.int8 else None)
    return flat if values.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        pq.write_table(table, file)


@dataclass(frozen=True)
class Labels:
    """Labels in memory: `[tokens]` unless it says otherwise, questions one after the other; -1 for not known."""

    directory: Path
    info: dict[str, Any]  # what the labels were made with, and counts
    questions: list[Encoded]
    slm_correct: torch.Tensor  # bool [questions]: the SLM alone answers the question rightly
    llm_correct: torch.Tensor
    question: torch.Tensor  # index of the token's question
    position: torch.Tensor  # index of the token in its reference answer
    hidden: torch.Tensor  # fp16 [tokens, H]: last hidden state of the SLM before the token
    top_logprobs: torch.Tensor  # fp16 [tokens, 8]: largest log-probabilities of the SLM there
    case: torch.Tensor  # 1: the SLM's token is the reference; 2: only the LLM's is; 3: neither is
    reference_token: torch.Tensor
    slm_token: torch.Tensor  # likeliest token of each model
    llm_token: torch.Tensor
    slm_logprob: torch.Tensor  # fp32: log-probability of the reference token
    llm_logprob: torch.Tensor
    label: torch.Tensor  # 1: the SLM's token is good enough; 0: the LLM must write (cases 1, 2, and 3 by roll-outs)
    rollout: torch.Tensor  # 1: the answer is right when the SLM's token is taken and the policy goes on
    llm_rollout: torch.Tensor  # the same for the LLM's token, where the SLM's has failed

    @classmethod
    def load(cls, directory: str | Path) -> "Labels":
        """Load a directory of labels.

        Args:
            directory: Made by `citer label` or `label_preferences`.

        Raises:
            FileNotFoundError: when there are no finished labels.
        """
        directory = Path(directory)
        if not (directory / INFO).is_file():
            raise FileNotFoundError(
                f"labels: {directory} holds no labels: expected a directory that `citer label` has finished. If it "
                "was interrupted, run the same `citer label` again."
            )
        tokens, asked = (pq.read_table(directory / folder) for folder in ("data", "questions"))
        numbers = {name: index for index, name in enumerate(asked["question"].to_pylist())}
        fields = zip(*(asked[name].to_pylist() for name in ("example", "prompt_ids", "reference_ids")), strict=True)
        questions = [Encoded(Example(**json.loads(example)), *ids) for example, *ids in fields]
        columns = {name: tokens[name].fill_null(-1).to_numpy().astype(np.int64) for name in INTEGERS}
        columns |= {name: tokens[name].to_numpy() for name in LOGPROBS}
        flat = {name: tokens[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in VECTORS}
        columns |= {name: values.reshape(len(tokens), -1) for name, values in flat.items()}
        return cls(
            directory=directory,
            info=read_json(directory / INFO),
            questions=questions,
            slm_correct=torch.tensor(asked["slm_correct"].to_pylist()),
            llm_correct=torch.tensor(asked["llm_correct"].to_pylist()),
            question=torch.tensor([numbers[name] for name in tokens["question"].to_pylist()]),
            **{name: torch.from_numpy(values.copy()) for name, values in columns.items()},
        )

    def check_pair(self, model: CiterForCausalLM) -> None:
        """Raise a `ValueError` unless the labels were made with this pair; its models may have moved."""
        different = [
            f"{role.upper()} {here['name']}"
            for role, here in base_models(model).items()
            if here["sample_sha256"] != self.info[role]["sample_sha256"]
        ]
        if self.info["tokenizer_sha256"] != tokenizer_sha256(model):
            different.append("tokenizer and chat template")
        if different:
            raise ValueError(
                f"labels: those in {self.directory} were not made with this pair's {', '.join(different)}. Give the "
                "pair that was labelled, or make new labels with `citer label`."
            )

    def summary(self) -> str:
        """Return what was labelled, as text."""
        counts = self.info["counts"]
        cases = ", ".join(f"{count / counts['tokens']:.1%}" for count in counts["cases"].values())
        return (
            f"{counts['tokens']} tokens of {counts['questions']} answers labelled in {self.directory}: cases 1, 2, 3 "
            f"are {cases}; {counts['positive_rollouts']:.1%} of the roll-outs are right."
        )


def tokenizer_sha256(model: CiterForCausalLM) -> str:
    """Return the sha256 of a pair's tokenizer with its chat template, or raise a `ValueError`."""
    tokenizer = model.load_tokenizer()
    if tokenizer is None:
        raise ValueError("model: expected a pair with a tokenizer, got one without. Save it beside the SLM.")
    return sha256_of([tokenizer.get_vocab(), tokenizer.chat_template])
