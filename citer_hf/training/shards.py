"""The Parquet shards of a directory of labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from citer_hf.data.tokens import Encoded

from .labels import question_schema, token_schema
from .outcomes import Outcome
from .reading import ReadTokens
from .rollouts import RollOut
from .teacher import BOTH_WRONG, SLM_RIGHT
from .units import read_table, write_table

__all__ = ["write_shards"]


def write_shards(
    out: Path,
    read: ReadTokens,
    questions: Sequence[Encoded],
    outcomes: Mapping[RollOut, Outcome],
    answers: Mapping[str, Sequence[Outcome]],
) -> None:
    """Write the tokens with their labels, and the questions, as Parquet shards."""
    for folder in ("data", "questions"):
        (out / folder).mkdir(exist_ok=True)
    schema = token_schema(read.hidden_size)
    for number, file in enumerate(read.files):
        table = labelled(read_table([file]), questions, outcomes)
        write_table(table.select(schema.names).cast(schema), out / "data" / shard_name(number, len(read.files)))
    rows = [
        {
            "question": one.example.id,
            "prompt_ids": one.prompt_ids,
            "reference_ids": one.response_ids,
            "slm_correct": answers["slm"][index].correct,
            "llm_correct": answers["llm"][index].correct,
            "example": json.dumps(asdict(one.example)),
        }
        for index, one in enumerate(questions)
    ]
    write_table(pa.Table.from_pylist(rows, question_schema()), out / "questions" / shard_name(0, 1))


def shard_name(number: int, count: int) -> str:
    """Return the name that `datasets` gives to a shard."""
    return f"train-{number:05d}-of-{count:05d}.parquet"


def labelled(table: pa.Table, questions: Sequence[Encoded], outcomes: Mapping[RollOut, Outcome]) -> pa.Table:
    """Add the outcome of roll-outs, and the preference of the shortcut: cases 1, 2, and 3 by its roll-out."""
    index, position, case = (table[name].to_pylist() for name in ("question", "position", "case"))

    def found(by: str, looked_at: list[bool]) -> list[int | None]:
        states = zip(index, position, table[f"{by}_token"].to_pylist(), strict=True)
        made = [
            outcomes.get(RollOut(*state)) if wanted else None for state, wanted in zip(states, looked_at, strict=True)
        ]
        return [None if one is None else int(one.correct) for one in made]

    rollout = found("slm", [one != SLM_RIGHT for one in case])
    label = [
        int(of_case == SLM_RIGHT) if of_case != BOTH_WRONG else of_rollout
        for of_case, of_rollout in zip(case, rollout, strict=True)
    ]
    names = pa.array([questions[one].example.id for one in index], pa.string())
    columns = {"label": label, "rollout": rollout, "llm_rollout": found("llm", [one == 0 for one in rollout])}
    table = table.set_column(table.schema.get_field_index("question"), "question", names)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.int8()))
    return table
