"""Labels on disk and in memory.

A directory of labels is a `datasets` repository: Parquet in `data/` (a row per token of a reference answer) and
`questions/` (a row per question), a card, and `labels.json`, the last file, with what the labels were made with.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from citer_hf import CiterForCausalLM, runs
from citer_hf.data.examples import Example
from citer_hf.data.tokens import Encoded
from citer_hf.runs import LABELS, REMOTE, atomic_write, base_models, import_extra, read_json, sha256_of

pa, pq = (import_extra(name, "train") for name in ("pyarrow", "pyarrow.parquet"))

# Of a row group: bounds the memory for writing, and for looking at some rows.
ROWS = 1 << 16
CARD = Path(__file__).with_name("card.md")
TOP_LOGPROBS = 8
# Examples that were left out, on the card; `labels.json` has all.
SHOWN = 10
SLM_RIGHT, LLM_RIGHT, BOTH_WRONG = 1, 2, 3
INTEGERS = ("position", "case", "reference_token", "slm_token", "llm_token", "label", "rollout", "llm_rollout")
LOGPROBS = ("slm_logprob", "llm_logprob")
VECTORS = ("hidden", "top_logprobs")
# What labels may lack: an objective says whether it needs them.
VERDICTS = ("llm_token", "label", "rollout", "llm_rollout", "llm_logprob")
# An id of the Hub.
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_labels(
    out: Path,
    info: Mapping[str, Any],
    columns: Mapping[str, torch.Tensor],
    questions: Sequence[Encoded],
    answers: Mapping[str, Sequence[bool]],
) -> None:
    """Write tables, card and, last, `labels.json`; columns `[tokens]` or `[tokens, width]` are over all references."""
    ids = np.array([one.example.id for one in questions])
    table = {name: _array(values) for name, values in columns.items()}
    table["question"] = pa.array(ids[columns["question"].numpy()])
    _write(pa.table(table), out / "data" / "train.parquet")
    asked = {
        "question": [one.example.id for one in questions],
        "prompt_ids": [one.prompt_ids for one in questions],
        "reference_ids": [one.response_ids for one in questions],
        **{f"{role}_correct": list(correct) for role, correct in answers.items()},
        "example": [json.dumps(vars(one.example)) for one in questions],
    }
    _write(pa.table(asked), out / "questions" / "train.parquet")
    left_out = [f"- `{one['id']}`: {one['reason']}" for one in info["dropped"]]
    card = CARD.read_text(encoding="utf-8").format(
        **info["counts"],
        router_threshold=info["options"]["router_threshold"],
        left_out="\n".join([*left_out[:SHOWN], "- ..."][: len(left_out)]) or "No example was left out.",
        made_with=json.dumps({key: info[key] for key in info if key not in ("counts", "dropped")}, indent=2),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    runs.write_json(out / LABELS, info)


def _array(values: torch.Tensor) -> Any:
    """Return a column of a table; outcomes are int8, and -1 where they are not known."""
    numbers = values.numpy()
    flat = pa.array(numbers.reshape(-1), mask=numbers < 0 if values.dtype == torch.int8 else None)
    return flat if values.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write(table: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        pq.write_table(table, file, row_group_size=ROWS)


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
    source: dict[str, Any] = field(default_factory=dict)  # name, and commit of the Hub

    @classmethod
    def load(cls, labels: str | Path, revision: str | None = None) -> "Labels":
        """Load labels of `citer label` from their directory, or by their id from the Hub; else `FileNotFoundError`."""
        directory = downloaded(labels, revision)
        if not (directory / LABELS).is_file():
            todo = "If it was interrupted, run the same `citer label` again."
            raise FileNotFoundError(f"labels: {labels} holds no labels of a finished `citer label`. {todo}")
        tokens, asked = (pq.read_table(directory / folder) for folder in ("data", "questions"))
        required = {*INTEGERS, *LOGPROBS, *VECTORS, "question"} - {*VERDICTS}
        if missing := sorted(required - {*tokens.column_names}):
            raise ValueError(f"labels: {labels} has no column {', '.join(missing)}. Make labels with `citer label`.")
        for name in {*VERDICTS} - {*tokens.column_names}:
            tokens = tokens.append_column(name, pa.nulls(len(tokens), pa.float32() if name in LOGPROBS else pa.int8()))
        numbers = {name: index for index, name in enumerate(asked["question"].to_pylist())}
        fields = zip(*(asked[name].to_pylist() for name in ("example", "prompt_ids", "reference_ids")), strict=True)
        questions = [Encoded(Example(**json.loads(example)), *ids) for example, *ids in fields]
        columns = {name: tokens[name].fill_null(-1).to_numpy().astype(np.int64) for name in INTEGERS}
        columns |= {name: tokens[name].to_numpy() for name in LOGPROBS}
        flat = {name: tokens[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in VECTORS}
        columns |= {name: values.reshape(len(tokens), -1) for name, values in flat.items()}
        return cls(
            directory=directory,
            info=read_json(directory / LABELS),
            source={"name": runs.anonymous(labels), "commit": directory.name if directory != Path(labels) else None},
            questions=questions,
            slm_correct=torch.tensor(asked["slm_correct"].to_pylist()),
            llm_correct=torch.tensor(asked["llm_correct"].to_pylist()),
            question=torch.tensor([numbers[name] for name in tokens["question"].to_pylist()]),
            **{name: torch.from_numpy(values.copy()) for name, values in columns.items()},
        )

    def check_pair(self, model: CiterForCausalLM) -> None:
        """Raise a `ValueError` unless the labels were made with this pair; its models may have moved."""
        found = {role: base["sample_sha256"] for role, base in base_models(model).items()}
        found["tokenizer and chat template"] = tokenizer_sha256(model)
        wanted = (self.info["slm"]["sample_sha256"], self.info["llm"]["sample_sha256"], self.info["tokenizer_sha256"])
        different = [
            part
            for part, sha256 in zip(found, wanted, strict=True)
            if found[part] != sha256 and not any(one.startswith(REMOTE) for one in (found[part], sha256))
        ]
        if different:
            raise ValueError(
                f"labels: those in {self.directory} were not made with this pair's {', '.join(different)}. Give the "
                "pair that was labelled, or make new labels with `citer label`."
            )


def downloaded(labels: str | Path, revision: str | None) -> Path:
    """Return the directory of labels, which may be those of a data set on the Hub at a commit."""
    directory = Path(labels)
    if directory.exists() or not REPO_ID.fullmatch(str(labels)):
        if revision is not None:
            raise ValueError(f"labels_revision: expected none for the directory {labels}, got {revision!r}.")
        return directory
    try:
        files = [LABELS, "data/*.parquet", "questions/*.parquet"]
        return Path(snapshot_download(str(labels), repo_type="dataset", revision=revision, allow_patterns=files))
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"labels: {labels} is no directory here, and no data set on the Hub that can be loaded: {error} "
            "Check the name, the revision and your token (`hf auth login`)."
        ) from error


def tokenizer_sha256(model: CiterForCausalLM) -> str:
    """Return the sha256 of a pair's tokenizer with its chat template, or raise a `ValueError`."""
    tokenizer = model.load_tokenizer()
    if tokenizer is None:
        raise ValueError("model: expected a pair with a tokenizer, got one without. Save it beside the SLM.")
    return sha256_of([tokenizer.get_vocab(), tokenizer.chat_template])
