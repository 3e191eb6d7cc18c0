"""The tokens of the reference answers as tables, as both models read them, and which of them to roll out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from citer_hf.data.tokens import Encoded

from .rollouts import RollOut
from .teacher import SLM_RIGHT, ForcedText, read_references
from .units import Workplace

__all__ = ["ReadTokens", "choose_rollouts", "read_units"]

# Logits of a batch of whole sequences, over all tokens and the vocabulary: 1 GB in half precision.
MOST_LOGITS = 1 << 29


class ReadTokens:
    """What both models said along the reference answers, in files of a few questions each."""

    def __init__(self, files: Sequence[Path], hidden_size: int):
        self.files, self.hidden_size = files, hidden_size
        columns = ["question", "position", "case", "slm_token", "llm_token", "score"]
        table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
        self.question, self.position, self.case, self.slm_token, self.llm_token, self.score = (
            table[name].to_numpy() for name in columns
        )

    def mismatches(self) -> list[int]:
        """Return the tokens at which the SLM's differs from the reference."""
        return np.flatnonzero(self.case != SLM_RIGHT).tolist()

    def rollout(self, token: int, by: str = "slm") -> RollOut:
        """Return the roll-out of a model's token."""
        action = self.slm_token if by == "slm" else self.llm_token
        return RollOut(int(self.question[token]), int(self.position[token]), int(action[token]))


def read_units(model: Any, questions: Sequence[Encoded], place: Workplace, batch_tokens: int) -> ReadTokens:
    """Let both models read all reference answers, a batch of whole sequences at a time."""
    batch_tokens = max(min(batch_tokens, MOST_LOGITS // model.vocab_size), 1)
    lengths = [len(one.prompt_ids) + len(one.response_ids) for one in questions]
    units: list[list[int]] = []
    for index, length in enumerate(lengths):
        if not units or (len(units[-1]) + 1) * length > batch_tokens:
            units.append([])
        units[-1].append(index)

    def compute(unit: list[int]) -> pa.Table:
        forced = read_references(model, [questions[index] for index in unit])
        return pa.concat_tables([as_table(index, text) for index, text in zip(unit, forced, strict=True)])

    return ReadTokens(place.run("reading", units, compute), model.slm.get_output_embeddings().weight.shape[1])


def as_table(question: int, text: ForcedText) -> pa.Table:
    """Return what was read of one question as a table."""
    count = len(text.reference)
    columns: dict[str, Any] = {
        "question": pa.array([question] * count, pa.int32()),
        "position": pa.array(range(count), pa.int32()),
        "hidden": as_vectors(text.hidden),
        "top_logprobs": as_vectors(text.top_logprobs),
        "case": pa.array(text.case.numpy(), pa.int8()),
        "score": pa.array(text.score.numpy(), pa.float32()),
    }
    for name, values in (
        ("reference_token", text.reference),
        ("slm_token", text.slm_token),
        ("llm_token", text.llm_token),
    ):
        columns[name] = pa.array(values.numpy(), pa.int32())
    for name in ("slm_logprob", "llm_logprob"):
        columns[name] = pa.array(getattr(text, name).numpy(), pa.float32())
    return pa.table(columns)


def as_vectors(values: torch.Tensor) -> pa.Array:
    """Return vectors as a column of lists of a fixed size."""
    flat = pa.array(values.contiguous().numpy().reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def choose_rollouts(read: ReadTokens, budget: int | None, router_threshold: float, seed: int) -> list[int]:
    """Choose the tokens at which the SLM's is rolled out."""
    tokens = read.mismatches()
    if budget is not None and budget < len(tokens):
        rng = random.Random(seed)
        middle = log_odds(router_threshold)
        unsure = {token: (abs(log_odds(float(read.score[token])) - middle), rng.random()) for token in tokens}
        tokens = sorted(sorted(tokens, key=unsure.__getitem__)[:budget])
    return tokens


def log_odds(probability: float) -> float:
    """Return log-odds, of 0 and 1 those of the smallest and largest number that differs from them."""
    probability = min(max(probability, 1e-7), 1 - 1e-7)
    return math.log(probability / (1 - probability))
