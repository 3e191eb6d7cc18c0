"""The batches that the pair is trained on, each made from its number alone."""

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice, pairwise

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from .problems import Problem, drill, problem

__all__ = ["Batches", "Row", "row"]

# A block is what is sorted by length together, so that a batch holds little padding.
SINGLES, CHATS, DRILLS = 15, 4, 1
BLOCK = SINGLES + CHATS + DRILLS
IGNORED = -100

Row = tuple[list[int], list[int]]


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Item `i` is training batch number `i`: single problems, chats of two or three problems, or bare calculations."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, count: int, size: int = 32) -> None:
        self.tokenizer, self.seed, self.count, self.size = tokenizer, seed, count, size
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return collate(self._block(index // BLOCK)[index % BLOCK], self.tokenizer.pad_token_id)

    def _make_block(self, number: int) -> list[list[Row]]:
        rng = random.Random(f"block/{self.seed}/{number}")
        told = (SINGLES + CHATS) * self.size
        fresh = (problem("train", self.seed, number * told + index) for index in range(told))
        singles = [row(self.tokenizer, [single]) for single in islice(fresh, SINGLES * self.size)]
        chats = [row(self.tokenizer, turns) for turns in _groups(fresh, rng)]
        drills = [row(self.tokenizer, [drill(rng) for _ in range(6)]) for _ in range(DRILLS * self.size)]
        batches = _cut(singles, SINGLES) + _cut(chats, CHATS) + _cut(drills, DRILLS)
        rng.shuffle(batches)
        return batches


def row(tokenizer: PreTrainedTokenizerFast, turns: list[Problem]) -> Row:
    """Write problems one after the other as a chat does; labels are the responses and the end of each."""
    tokens: list[int] = []
    labels: list[int] = []
    for turn in turns:
        prompt, response = tokenizer([turn.prompt, turn.response + tokenizer.eos_token]).input_ids
        tokens += prompt + response
        labels += [IGNORED] * len(prompt) + response
    return tokens, labels


def collate(rows: list[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right, where causal attention needs no mask."""
    longest = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([tokens + [pad_token_id] * (longest - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    }


def _groups(fresh: Iterator[Problem], rng: random.Random) -> Iterator[list[Problem]]:
    while group := list(islice(fresh, rng.choice([2, 3]))):
        yield group


def _cut(rows: list[Row], count: int) -> list[list[Row]]:
    """Cut rows into batches of like lengths."""
    rows = sorted(rows, key=lambda pair: len(pair[0]))
    bounds = [len(rows) * cut // count for cut in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(bounds)]
