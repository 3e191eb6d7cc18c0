"""Labels on disk: what they hold, and reading them back.

A directory of labels is a `datasets` repository: Parquet shards in `data/` (one row per token of a reference answer)
and `questions/` (one row per question), a card, and `labels.json` with what they were made with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from citer_hf.data.examples import Example
from citer_hf.data.tokens import Encoded

from .teacher import TOP_LOGPROBS
from .units import read_table

__all__ = ["INFO", "Labels", "question_schema", "token_schema"]

INFO = "labels.json"


def token_schema(hidden_size: int) -> pa.Schema:
    """Return the columns of `data/`."""
    return pa.schema(
        [
            ("question", pa.string()),
            ("position", pa.int32()),
            ("hidden", pa.list_(pa.float16(), hidden_size)),
            ("top_logprobs", pa.list_(pa.float16(), TOP_LOGPROBS)),
            # 1: the SLM's token is good enough; 0: the LLM must write; null: not known, no roll-out was made.
            ("label", pa.int8()),
            ("case", pa.int8()),
            ("reference_token", pa.int32()),
            ("slm_token", pa.int32()),
            ("llm_token", pa.int32()),
            ("slm_logprob", pa.float32()),
            ("llm_logprob", pa.float32()),
            # Whether the answer is right when the SLM's token is taken and the policy goes on; null: no roll-out.
            ("rollout", pa.int8()),
            # The same for the LLM's token, where the SLM's has failed.
            ("llm_rollout", pa.int8()),
        ]
    )


def question_schema() -> pa.Schema:
    """Return the columns of `questions/`."""
    return pa.schema(
        [
            ("question", pa.string()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("reference_ids", pa.list_(pa.int32())),
            # Whether the SLM, and the LLM, alone answer the question rightly.
            ("slm_correct", pa.bool_()),
            ("llm_correct", pa.bool_()),
            ("example", pa.string()),
        ]
    )


@dataclass(frozen=True)
class Labels:
    """Labels in memory, one entry per token, questions one after the other."""

    directory: Path
    info: dict[str, Any]
    questions: list[Encoded]
    slm_correct: torch.Tensor
    llm_correct: torch.Tensor
    question: torch.Tensor
    position: torch.Tensor
    hidden: torch.Tensor
    top_logprobs: torch.Tensor
    case: torch.Tensor
    reference_token: torch.Tensor
    slm_token: torch.Tensor
    llm_token: torch.Tensor
    slm_logprob: torch.Tensor
    llm_logprob: torch.Tensor
    label: torch.Tensor
    rollout: torch.Tensor
    llm_rollout: torch.Tensor

    @classmethod
    def load(cls, directory: str | Path) -> Labels:
        """Read a directory of labels."""
        directory = Path(directory)
        if not (directory / INFO).is_file():
            state = "holds no labels" if directory.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"labels: {directory} {state}: expected a directory that `citer label` has finished ({INFO} is its "
                "last file). If it was interrupted, run the same `citer label` again."
            )
        tokens = read_table(sorted((directory / "data").glob("*.parquet")))
        asked = read_table(sorted((directory / "questions").glob("*.parquet")))
        names = {name: index for index, name in enumerate(asked["question"].to_pylist())}
        question = torch.tensor([names[name] for name in tokens["question"].to_pylist()])
        columns = {name: integers(tokens[name]) for name in INTEGERS}
        columns |= {name: torch.tensor(tokens[name].to_numpy()) for name in ("slm_logprob", "llm_logprob")}
        columns |= {name: vectors(tokens[name]) for name in ("hidden", "top_logprobs")}
        labels = cls(
            directory=directory,
            info=json.loads((directory / INFO).read_text()),
            questions=[question_of(row) for row in asked.to_pylist()],
            slm_correct=torch.tensor(asked["slm_correct"].to_pylist()),
            llm_correct=torch.tensor(asked["llm_correct"].to_pylist()),
            question=question,
            **columns,
        )
        for name in ("hidden", "top_logprobs", "slm_logprob", "llm_logprob"):
            if not bool(getattr(labels, name).isfinite().all()):
                raise ValueError(f"labels: {directory} has NaN or infinite values in {name}; make the labels again.")
        return labels


INTEGERS = ("position", "case", "reference_token", "slm_token", "llm_token", "label", "rollout", "llm_rollout")


def integers(column: pa.ChunkedArray) -> torch.Tensor:
    """Return a column of integers, -1 for null."""
    return torch.tensor(column.fill_null(-1).to_numpy().astype(np.int64))


def vectors(column: pa.ChunkedArray) -> torch.Tensor:
    """Return a column of vectors, `[rows, width]`."""
    values = column.combine_chunks()
    width = values.type.list_size
    return torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).copy())


def question_of(row: dict[str, Any]) -> Encoded:
    """Return a question as it was labelled."""
    fields = json.loads(row["example"])
    for name in ("messages", "choices"):
        if fields[name] is not None:
            fields[name] = tuple(tuple(one) if isinstance(one, list) else one for one in fields[name])
    return Encoded(Example(**fields), row["prompt_ids"], row["reference_ids"])
