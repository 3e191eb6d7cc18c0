"""How far a long run is, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Steps", "progress_bar"]


class Steps:
    """A bar that counts texts."""

    def __init__(self, bar: Progress):
        self._bar = bar
        self._task = bar.task_ids[0]
        self._skipped = 0

    def name(self, description: str) -> None:
        """Say what is done now."""
        self._bar.update(self._task, description=description)

    def advance(self, texts: int) -> None:
        """Note that texts are done."""
        self._bar.advance(self._task, texts)

    @property
    def visible(self) -> bool:
        """Whether anybody sees the bar."""
        return not self._bar.disable

    def begin(self, description: str, total: int) -> None:
        """Begin another kind of work, with an estimate of its own."""
        self._bar.reset(self._task, description=description, total=total)

    def reach(self, done: int) -> None:
        """Note how far the work is."""
        self._bar.update(self._task, completed=done)

    def expect(self, total: int) -> None:
        """Say how many texts there are."""
        self._bar.update(self._task, total=total - self._skipped)

    def skip(self, texts: int) -> None:
        """Note that texts were written in an earlier run; how fast says nothing about the rest."""
        self._skipped += texts
        total = self._bar.tasks[0].total
        self._bar.update(self._task, total=None if total is None else total - texts)


@contextmanager
def progress_bar(total: int | None, units: str = "texts", shown: bool = True) -> Iterator[Steps]:
    """Show a bar with an estimate of the time left on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{units},"),
        TimeElapsedColumn(),
        TextColumn("passed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        bar.add_task("", total=total)
        yield Steps(bar)
