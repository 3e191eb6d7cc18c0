"""Long work in small units: each unit's result is a file, so that work can stop anywhere, go on, and be divided."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from citer_hf.runs import atomic_write, process_state, wait_for_all

__all__ = ["Workplace", "read_table", "write_table"]

ARGUMENTS = "arguments.json"


class Workplace:
    """A folder of finished units of work."""

    def __init__(self, folder: Path, arguments: dict[str, Any], report: Callable[[str, int, int], None]):
        self.folder, self.report = folder, report
        self.state = process_state()
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / ARGUMENTS
        arguments = json.loads(json.dumps(arguments))
        if not begun.exists() and self.state.is_main_process:
            with atomic_write(begun) as file:
                file.write(json.dumps(arguments, indent=2).encode())
        wait_for_all()
        found = json.loads(begun.read_text())
        different = sorted(key for key in found.keys() | arguments.keys() if found.get(key) != arguments.get(key))
        if different:
            raise ValueError(
                f"out: {folder.parent} holds work that was begun with other arguments: "
                + "; ".join(f"{key} was {found.get(key)!r} and is {arguments.get(key)!r}" for key in different)
                + ". Give the same arguments to go on, or another directory."
            )

    def run(self, name: str, units: Sequence[Any], compute: Callable[[Any], pa.Table]) -> list[Path]:
        """Do the units that are not done yet, and wait until all processes have done theirs."""
        (self.folder / name).mkdir(exist_ok=True)
        files = [self.folder / name / f"{number:06d}.parquet" for number in range(len(units))]
        mine = range(self.state.process_index, len(units), self.state.num_processes)
        for done, number in enumerate(mine):
            self.report(name, done, len(mine))
            if not files[number].exists():
                write_table(compute(units[number]), files[number])
        self.report(name, len(mine), len(mine))
        wait_for_all()
        return files


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, complete or not at all."""
    with atomic_write(path) as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())


def read_table(files: Sequence[Path]) -> pa.Table:
    """Read Parquet files, one after the other."""
    return pa.concat_tables([pq.read_table(file) for file in files])
