"""Problems for tiny random pairs: a tokenizer of letters, examples, and a checker that random texts pass at times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from citer_hf.data.checkers import Verdict
from citer_hf.data.examples import Example
from tests.conftest import random_prompts
from tests.families import BOS, EOS, PAD

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012345"
LENGTHS = (5, 9, 12, 7, 3, 9)


class LetterTokenizer:
    """One token per letter."""

    eos_token_id, bos_token_id, pad_token_id, unk_token_id = EOS, BOS, PAD, None
    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) + 3 for letter in text]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(LETTERS[index - 3] for index in ids if index >= 3)


def examples(lengths: Sequence[int] = LENGTHS, answer: str | None = "y") -> list[Example]:
    """Random prompts, which start at row 11."""
    decode = LetterTokenizer().decode
    return [
        Example(id=str(row), row=row, prompt=decode(prompt), answer=answer)
        for row, prompt in enumerate(random_prompts(tuple(lengths)), 11)
    ]


def has_letter(text: str, example: Example) -> Verdict:
    """Right when the answer is among the letters; a text without an `a` gives no answer."""
    return Verdict(str(example.answer) in text, "a" if "a" in text else None)
