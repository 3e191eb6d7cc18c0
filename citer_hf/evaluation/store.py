"""Work that can be interrupted: what is done is kept in the output directory until everything is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from citer_hf.runs import atomic_write

__all__ = ["Store"]

UNFINISHED = "unfinished"
FINGERPRINT = "fingerprint.json"
RESULTS = "results.json"


class Store:
    """Remembers what was computed, in `unfinished/` of an output directory."""

    def __init__(self, directory: Path | None, fingerprint: str):
        self.finished: Path | None = None
        self._values: dict[str, Any] = {}
        self._fingerprint = fingerprint
        self._folder = None if directory is None else directory / UNFINISHED
        if directory is None or self._folder is None:
            return
        if directory.exists():
            self._look_at(directory, fingerprint)
        if self.finished is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self._folder / FINGERPRINT, {"fingerprint": fingerprint})

    def _look_at(self, directory: Path, fingerprint: str) -> None:
        if not directory.is_dir():
            raise FileExistsError(f"{directory} is a file; expected the name of a directory for the results.")
        provenance = (_read(directory / RESULTS) or {}).get("provenance")
        if isinstance(provenance, dict) and provenance.get("fingerprint") == fingerprint:
            self.finished = directory / RESULTS
            return
        unfinished = _read(directory / UNFINISHED / FINGERPRINT)
        if unfinished is not None:
            if unfinished.get("fingerprint") == fingerprint:
                return
            raise FileExistsError(
                f"{directory} holds unfinished results of other arguments, models, routers or data. Repeat the "
                "arguments to go on, choose another directory, or remove this one."
            )
        # Killed before the fingerprint was there, a run leaves no more than an empty folder.
        content = [path for path in directory.iterdir() if path.name != UNFINISHED or any(path.glob("[!.]*"))]
        if content:
            names = ", ".join(sorted(path.name for path in content)[:3])
            raise FileExistsError(
                f"{directory} exists and holds something else ({names}). Choose another directory, or remove it."
            )

    def check_agreement(self) -> None:
        """Refuse to go on with processes that work on something else, once all of them have opened the directory."""
        if self._folder is None or self.finished is not None:
            return
        found = _read(self._folder / FINGERPRINT) or {}
        if found.get("fingerprint") != self._fingerprint:
            raise ValueError(
                f"{self._folder.parent}: the processes have other arguments, models, routers or data than each other. "
                "Give all of them the same; a router with fresh weights needs the same seed everywhere."
            )

    def holds(self, key: str) -> bool:
        """Say whether something is remembered."""
        return key in self._values if self._folder is None else _read(self._path(key)) is not None

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what is remembered under a key, or compute it and remember it."""
        if not self.holds(key):
            value = compute()
            if self._folder is None:
                self._values[key] = value
            else:
                _write(self._path(key), {"value": value})
        return self.recall(key)

    def recall(self, key: str) -> Any:
        """Return what is remembered under a key."""
        if self._folder is None:
            return self._values[key]
        found = _read(self._path(key))
        if found is None:
            raise KeyError(f"{key}: {self._path(key)} is not there. Has another program removed it?")
        return found["value"]

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key.replace('/', '_')}.json"

    def forget(self) -> None:
        """Remove what was remembered, once the results are written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value).encode())
