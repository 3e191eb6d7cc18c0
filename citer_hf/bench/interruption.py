"""Signals that end a measurement, but not what it has found out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interruption", "interruptible"]

# A terminal that closes and a batch system that ends a job mean what Ctrl-C means. Not every system has all three.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruption:
    """Whether a signal has come; it raises `KeyboardInterrupt` where it does."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._waits = False

    @property
    def has_come(self) -> bool:
        """Whether there was a signal."""
        return self._number is not None

    @property
    def status(self) -> int:
        """The exit status that shells give to a program which a signal has ended."""
        return 128 + (self._number or signal.SIGINT)

    def handle(self, number: int, frame: Any) -> None:
        """Raise `KeyboardInterrupt`, as a handler of signals; what must not be lost is told first, unless asked
        twice."""
        again, self._number = self.has_come, number
        if again or not self._waits:
            raise KeyboardInterrupt

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Let a first signal wait until what runs inside is done."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let the signals that end a program interrupt as Ctrl-C does."""
    interruption = Interruption()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, interruption.handle)
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
