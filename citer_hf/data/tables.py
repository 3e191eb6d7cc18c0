"""Rows of a task, from a file, a directory, the Hub or memory.

JSON lines, JSON and CSV are read with the standard library, everything else with `datasets`. What `datasets` makes of
such files turns text that looks like a date into a date, 007 into 7, NA into nothing and long numbers into rounded
ones, shifts the columns of a CSV row that has too many, and does not say which line is broken.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs import import_extra

__all__ = ["Data", "Table", "read_table"]

Data = Any
"""A path, a Hub dataset id, a `datasets.Dataset`, or a list of dicts."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Table:
    """Rows that are not understood yet."""

    name: str
    columns: list[str]
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    untyped: bool = False


def read_table(data: Data, split: str | None = None) -> Table:
    """Read rows from wherever they are."""
    if isinstance(data, (str, os.PathLike)):
        return _from_name(os.fspath(data), split)
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        _refuse_split(split, "a list")
        return _from_dicts("data", list(enumerate(data, start=1)))
    if type(data).__module__.startswith("datasets."):
        return _from_datasets("data", data, split)
    raise TypeError(
        "data: expected the path of a file, a Hub dataset id, a datasets.Dataset or a list of dicts, "
        f"got {type(data).__name__}."
    )


def _from_name(name: str, split: str | None) -> Table:
    """Read a file or a directory, or else a dataset of the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_directory(path, split)
    if path.exists():
        _refuse_split(split, "a file")
        return _from_file(path)
    if not HUB_ID.fullmatch(name) or path.suffix.lower() in SUFFIXES or name.startswith("."):
        raise FileNotFoundError(
            f"data: {name} does not exist. Give a file ({', '.join(SUFFIXES)}), a directory that `datasets` saved, "
            "or a Hub dataset id such as user/name."
        )
    return _from_datasets(name, _load(name, split), None)


def _from_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"data: {path} ends in {suffix or 'nothing'!r}; expected {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"data: {path} is empty.")
    if suffix in (".jsonl", ".json"):
        return _from_dicts(str(path), list(_read_json(path)))
    if suffix == ".csv":
        return _from_dicts(str(path), list(enumerate(_read_csv(path), start=1)), untyped=True)
    datasets = import_extra("datasets", "train")
    try:
        with _no_progress_bars(datasets):
            rows = datasets.Dataset.from_parquet(str(path))
    except Exception as error:
        # What goes wrong comes as errors of datasets or pyarrow, most of them wrapped in another.
        raise ValueError(f"data: {path} cannot be read: {_reason(error)}") from error
    return _from_datasets(str(path), rows, None)


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Read rows under a line of column names."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"data: {path}, line {reader.line_num}: the row does not have as many values as there are columns "
                    f"({', '.join(reader.fieldnames or ())}). Values with commas in them are put in quotes."
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"data: {path}: broken CSV after line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Read one array of objects, or one object a line; either may be in a file with either name."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path}, line {error.lineno}: broken JSON: {error.msg}.") from error
        return
    # Not splitlines: it also ends a line at characters that JSON allows in a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"data: {path}, line {number}: broken JSON: {error.msg} at character {error.colno}. "
                    "Expected one object a line, or one array of objects."
                ) from error


def _from_dicts(name: str, rows: list[tuple[int, Any]], untyped: bool = False) -> Table:
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number}: expected an object with named fields, got {type(row).__name__}.")
    if not rows:
        raise ValueError(f"{name}: there are no rows.")
    return Table(name, list(dict.fromkeys(column for _, row in rows for column in row)), rows, untyped)


def _from_directory(path: Path, split: str | None) -> Table:
    """Read what `save_to_disk` wrote, or else a directory of data files."""
    if not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _from_datasets(str(path), _load(str(path), split), None)
    datasets = import_extra("datasets", "train")
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise OSError(f"data: {path} cannot be loaded: {_reason(error)}") from error
    return _from_datasets(str(path), saved, split)


def _load(name: str, split: str | None) -> Any:
    """Load a dataset by its name; a split may be any expression that `datasets` knows."""
    datasets = import_extra("datasets", "train")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        # Missing repositories, bad connections, broken files: every layer below has errors of its own.
        raise OSError(
            f"data: {name} cannot be loaded as a dataset: {_reason(error)} "
            "(What needs more than a name and a split: load it with `datasets` and give the Dataset.)"
        ) from error


def _from_datasets(name: str, data: Any, split: str | None) -> Table:
    """Take the rows of a `Dataset`, or of one split of a `DatasetDict`."""
    if isinstance(data, Mapping):
        known = ", ".join(data)
        if split is None and len(data) != 1:
            raise ValueError(f"split: {name} has the splits {known}; say which.")
        if split is not None and split not in data:
            raise ValueError(f"split: {name} has no split {split!r}; it has {known}.")
        data = data[split or next(iter(data))]
    elif type(data).__name__ != "Dataset":
        raise TypeError(f"data: expected a datasets.Dataset, got {type(data).__name__}: load it without streaming.")
    else:
        _refuse_split(split, "a Dataset")
    if not len(data):
        raise ValueError(f"{name}: there are no rows.")
    return Table(name, list(data.column_names), enumerate(data.with_format(None), start=1))


def _refuse_split(split: str | None, what: str) -> None:
    if split is not None:
        raise ValueError(f"split: {what} has no splits, got {split!r}.")


def _reason(error: BaseException) -> str:
    """Say the cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    """Read a local file without a bar that is full before one sees it."""
    hidden = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
