"""What commands print: text as it is written, coloured by who wrote it, and tables."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import torch
from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

LLM_COLOUR, DIM, PLAIN = "\033[1;33m", "\033[2m", "\033[0m"
OPEN, CLOSE = "[[", "]]"

# Output of a model must not steer the terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def wants_colour(out: TextIO) -> bool:
    """Return True for a terminal that shows colours, unless the user has asked for none (no-color.org)."""
    return out.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def legend(out: TextIO) -> str:
    """Return how the LLM's text can be told from the SLM's on a stream."""
    if wants_colour(out):
        return f"{LLM_COLOUR}Text in this colour{PLAIN} was written by the LLM, the rest by the SLM."
    return f"Text in {OPEN} {CLOSE} was written by the LLM, the rest by the SLM."


class Paint:
    """Writes text piece by piece: the LLM's in colour, or between markers where there are no colours."""

    def __init__(self, out: TextIO):
        self.out, self.colour, self._is_open = out, wants_colour(out), False

    def write(self, text: str, by_llm: bool) -> None:
        text = CONTROL.sub("", text)
        if text:
            # A coloured piece is closed at once, so that whatever interrupts the text leaves the terminal plain.
            self._print(f"{LLM_COLOUR}{text}{PLAIN}" if self.colour and by_llm else text, by_llm)

    def dim(self, text: str) -> None:
        """Write a line about the text, in grey where there are colours."""
        self._print(f"{DIM}{text}{PLAIN}\n" if self.colour else f"{text}\n", False)

    def end(self) -> None:
        self._print("\n", False)

    def _print(self, text: str, is_open: bool) -> None:
        if is_open != self._is_open and not self.colour:
            text = (OPEN if is_open else CLOSE) + text
        self._is_open = is_open
        self.out.write(text)
        self.out.flush()


class WriterStreamer(BaseStreamer):
    """A streamer for `generate` that paints each token by its writer, which it looks up in the cache's `routing`."""

    def __init__(self, tokenizer: Any, cache: Any, paint: Paint):
        self.tokens: list[int] = []
        self._tokenizer, self._cache, self._paint = tokenizer._tokenizer, cache, paint
        # Holds back the bytes of a character until it is complete.
        self._stream = DecodeStream(skip_special_tokens=True)
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, at first, and then each new token."""
        if not self._prompt_is_next:
            for token in value.reshape(-1).tolist():
                self.tokens.append(token)
                if text := self._stream.step(self._tokenizer, token):
                    self._paint.write(text, self._cache.routing.by_llm(len(self.tokens) - 1))
        self._prompt_is_next = False

    def end(self) -> None:
        self._paint.end()


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows, by the names of their columns, as Markdown that is aligned for a terminal."""
    columns: list[list[str]] = []
    for name in rows[0]:
        cells = [name, "", *(row[name] for row in rows)]
        width = max(map(len, cells))
        cells[1] = "-" * (width - 1) + (":" if columns else "-")
        columns.append([cell.rjust(width) if columns else cell.ljust(width) for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True))
