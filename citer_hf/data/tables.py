"""Tables of examples: from files, directories of `datasets`, the Hub and memory, as rows with named values."""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs import import_extra


def read_table(data: Any, split: str | None) -> tuple[str, list[str], Any]:
    """Return the name of a table, its columns, and its rows."""
    name, found = "data", data
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        found = _load(name, Path(data).expanduser(), split)
    elif not isinstance(data, list) and type(data).__name__ != "Dataset":
        kind = type(data).__name__
        raise TypeError(f"data: expected a path, a Hub dataset id, a datasets.Dataset or a list of dicts, got {kind}.")
    if isinstance(found, Mapping):
        chosen = next(iter(found)) if split is None and len(found) == 1 else split
        if chosen not in found:
            raise ValueError(f"split: {name} has the splits {', '.join(found)}; expected one of them, got {split!r}.")
        found = found[chosen]
    elif split is not None:
        raise ValueError(f"split: {name} has no splits, got {split!r}.")
    if len(found) == 0:
        raise ValueError(f"{name}: there are no rows.")
    if not isinstance(found, list):
        return name, list(found.column_names), map(_without_nulls, found.with_format(None))
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number}: expected an object with named fields, got {type(row).__name__}.")
    found = list(map(_flat, found))
    return name, list(dict.fromkeys(column for row in found for column in row)), found


def _flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row without the question's own columns: the files of ARC and CommonsenseQA have the choices there."""
    inner = row.get("question")
    return {**row, **inner, "question": inner["stem"]} if isinstance(inner, Mapping) and "stem" in inner else row


def _without_nulls(value: Any) -> Any:
    """Return a value of a `Dataset` without what tables add to make objects alike."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _load(name: str, path: Path, split: str | None) -> Any:
    """Return a file's rows, a `Dataset`, or the splits of one."""
    # `datasets` makes dates of text that looks like one, 7 of 007 and nothing of NA, and does not name the broken row.
    if kind_of(path) in (".jsonl", ".json", ".csv"):
        return _rows(path)
    datasets = import_extra("datasets", "train")
    try:
        if path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        # A split may be any expression that `datasets` knows.
        found = datasets.load_dataset(str(path) if path.exists() else name, split=split)
        return found if split is None else {split: found}
    except (RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"data: {name} cannot be loaded: {reason} Expected a file (.jsonl, .json, .csv, .parquet), a directory of "
            "`datasets`, or a Hub dataset id such as user/name."
        ) from error


def kind_of(path: Path) -> str:
    """Return the suffix that tells the format of a file, which may be compressed."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _rows(path: Path) -> list[Any]:
    """Return the rows of CSV, or of JSON: one array of objects, or one object a line."""
    rows: list[Any] = []
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if content.lstrip().startswith(b"[") and kind_of(path) != ".csv":
            return json.loads(content.decode())
        # A line at a time, so that an error names its row. Not splitlines: it also ends a line at characters that JSON
        # allows in a string.
        lines = (line.decode() for line in io.BytesIO(content))
        if kind_of(path) == ".csv":
            csv.field_size_limit(2**31 - 1)
            for row in csv.DictReader(lines, strict=True):
                if None in row or None in row.values():
                    raise ValueError("a row without one value for each column; values with commas need quotes")
                rows.append(row)
            return rows
        for line in lines:
            rows += [json.loads(line)] if line.strip() else []
    except (csv.Error, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, row {len(rows) + 1}: {error}. Expected UTF-8: CSV, a JSON object a line, or one JSON array."
        ) from error
    return rows
