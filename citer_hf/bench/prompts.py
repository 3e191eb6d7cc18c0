"""The prompts that every contender continues."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Batch", "file_batches", "make_batches", "read_prompts", "synthetic_batch"]


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    padded: bool = False

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Length of the longest prompt, in tokens."""
        return self.input_ids.shape[1]


def make_batches(
    prompts: Path | None, tokenizer: Any, vocab_size: int, prompt_length: int, rows: int, seed: int
) -> list[Batch]:
    """Return the prompts of a file, or one batch of synthetic ones."""
    if prompts is None:
        return [synthetic_batch(vocab_size, prompt_length, rows, seed)]
    if tokenizer is None:
        raise ValueError(
            "--prompts: this pair comes without a tokenizer, so that text cannot be read. Leave the option out for "
            "synthetic prompts of --prompt-length tokens."
        )
    return file_batches(read_prompts(prompts), tokenizer, rows, prompts)


def synthetic_batch(vocab_size: int, length: int, rows: int, seed: int) -> Batch:
    """Return random tokens, which take as long to read as any others."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
    return Batch(input_ids, torch.ones_like(input_ids))


def read_prompts(path: Path) -> list[str]:
    """Read prompts: one a line, or JSON lines with a `prompt`, or one JSON list of either. Empty lines are left
    out."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: there is no file {path}. Give a text file with one prompt a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--prompts: {path} is no UTF-8 text. Give a text file with one prompt a line.") from None
    entries = json_list(text)
    if entries is not None:
        return [prompt_of(entry, f"entry {number} of {path}") for number, entry in enumerate(entries, 1)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {path} is empty. Give a file with one prompt a line.")
    # A text that begins with a brace is a prompt like any other, unless the whole file looks like JSON lines.
    if path.suffix == ".jsonl" or all(line.lstrip().startswith("{") for _, line in lines):
        return [json_prompt(line, f"line {number} of {path}") for number, line in lines]
    return [line for _, line in lines]


def json_list(text: str) -> list[Any] | None:
    """Return the entries of a JSON list of texts and objects; `None` where the text is none, but may be a prompt."""
    try:
        entries = json.loads(text)
    except ValueError:
        return None
    is_list = isinstance(entries, list) and bool(entries) and all(isinstance(one, (str, dict)) for one in entries)
    return entries if is_list else None


def json_prompt(line: str, where: str) -> str:
    """Return the prompt of one line of JSON."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    return prompt_of(entry if isinstance(entry, dict) else {}, where, line)


def prompt_of(entry: Any, where: str, shown: str | None = None) -> str:
    """Return the prompt of an entry."""
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f'--prompts: {where} is no JSON object with a "prompt": expected {{"prompt": "text"}}, got '
            f"{(shown or json.dumps(entry))[:60]!r}."
        )
    return prompt


def file_batches(prompts: list[str], tokenizer: Any, rows: int, path: Path) -> list[Batch]:
    """Return prompts as full batches; the last one is filled up with prompts from the beginning."""
    token_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for number, ids in enumerate(token_ids, 1):
        if not ids:
            raise ValueError(f"--prompts: prompt {number} of {path} has no tokens: {prompts[number - 1][:60]!r}.")
    missing = -len(token_ids) % rows
    token_ids += itertools.islice(itertools.cycle(token_ids[:]), missing)
    return [pad(token_ids[start : start + rows]) for start in range(0, len(token_ids), rows)]


def pad(token_ids: list[list[int]]) -> Batch:
    """Pad prompts on the left."""
    width = max(map(len, token_ids))
    # Whatever stands in the padding, it is masked.
    rows = [[ids[0]] * (width - len(ids)) + ids for ids in token_ids]
    masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in token_ids]
    return Batch(torch.tensor(rows), torch.tensor(masks), padded=any(len(ids) < width for ids in token_ids))
