"""Answers in LaTeX boxes."""

from __future__ import annotations

import re

__all__ = ["last_boxed"]


def last_boxed(text: str) -> str | None:
    """Return what the last complete `\boxed{}` or `\fbox{}` of a text holds, or None; braces in it are balanced."""
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        # A brace after a backslash is a character, and so is a backslash after one.
        for brace in re.finditer(r"\\.|[{}]", text[opening.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : opening.end() + brace.start()].strip()
    return None
