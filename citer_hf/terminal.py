"""Text in a terminal, as it is written, coloured by who wrote it."""

from __future__ import annotations

import os
import re
from typing import Any, Protocol, TextIO

import torch
from transformers.generation.streamers import BaseStreamer

__all__ = ["Paint", "WriterStreamer", "legend", "wants_colour"]

LLM_COLOUR, DIM, PLAIN = "\033[1;33m", "\033[2m", "\033[0m"
OPEN, CLOSE = "[[", "]]"

# What a model writes must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# The decoder's sign for bytes that are no character, or not yet.
_INCOMPLETE = "\ufffd"
_LONGEST_CHARACTER = 4


def wants_colour(out: TextIO) -> bool:
    """Say whether a stream is a terminal that shows colours, and the user has not asked for none (no-color.org)."""
    return out.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def legend(out: TextIO) -> str:
    """Say how the LLM's text can be told from the SLM's on a stream."""
    if wants_colour(out):
        return f"{LLM_COLOUR}Text in this colour{PLAIN} was written by the LLM, the rest by the SLM."
    return f"Text in {OPEN} {CLOSE} was written by the LLM, the rest by the SLM."


class Paint:
    """Writes text piece by piece: the LLM's in colour, or between markers where there are no colours."""

    def __init__(self, out: TextIO):
        self.out = out
        self.colour = wants_colour(out)
        self._open = False

    def write(self, text: str, by_llm: bool) -> None:
        """Write a piece."""
        text = _CONTROL.sub("", text)
        if not text:
            return
        if self.colour:
            # Every piece is closed at once, so that whatever interrupts the text leaves the terminal plain.
            self.out.write(f"{LLM_COLOUR}{text}{PLAIN}" if by_llm else text)
        else:
            self._mark(by_llm)
            self.out.write(text)
        self.out.flush()

    def dim(self, text: str) -> None:
        """Write a line about the text, in grey where there are colours."""
        self.out.write(f"{DIM}{text}{PLAIN}\n" if self.colour else f"{text}\n")
        self.out.flush()

    def end(self) -> None:
        """End the text, and its line."""
        self._mark(False)
        self.out.write("\n")
        self.out.flush()

    def _mark(self, by_llm: bool) -> None:
        if by_llm != self._open and not self.colour:
            self.out.write(OPEN if by_llm else CLOSE)
            self._open = by_llm


class HasRouting(Protocol):
    """A cache that records who writes: `CiterCache`."""

    routing: Any


class WriterStreamer(BaseStreamer):
    """A streamer for `generate` that paints each token by its writer, which it looks up in the cache's record."""

    def __init__(self, tokenizer: Any, cache: HasRouting, paint: Paint):
        self.tokens: list[int] = []
        self._tokenizer, self._cache, self._paint = tokenizer, cache, paint
        self._prompt_is_next = True
        # Tokens before `_shown` have been painted; those from `_context` on are decoded again, because how a token
        # reads can depend on the one before it.
        self._context = self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, at first, and then each new token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.reshape(-1).tolist():
            self.tokens.append(token)
            self._paint_new(hold_back=True)

    def end(self) -> None:
        """Paint what was held back, and end the text."""
        if self._shown < len(self.tokens):
            self._paint_new(hold_back=False)
        self._paint.end()

    def _paint_new(self, hold_back: bool) -> None:
        """Paint what the newest token adds, unless it ends in the middle of a character."""
        before = self._decode(self._context, self._shown)
        text = self._decode(self._context, len(self.tokens))
        waiting = len(self.tokens) - self._shown
        if hold_back and text.endswith(_INCOMPLETE) and waiting < _LONGEST_CHARACTER:
            return
        by_llm = self._cache.routing.by_llm(len(self.tokens) - 1)
        self._paint.write(text[len(before) :], by_llm)
        self._context, self._shown = self._shown, len(self.tokens)

    def _decode(self, first: int, last: int) -> str:
        return str(self._tokenizer.decode(self.tokens[first:last], skip_special_tokens=True))
