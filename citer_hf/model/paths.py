"""What a router's configuration may point at: its own directory, and repositories on the Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_reference(role: str, reference: Any, router_path: str) -> None:
    """Refuse a reference to a base model, or to its adapter, that leads anywhere else than where a router may
    point."""
    values = [value for key, value in reference.items() if key != "adapter"] if isinstance(reference, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"{role}_reference: expected a dictionary of texts, got {reference!r}. Save the router again."
        )
    for key in ("subfolder", "gguf_file", "revision"):
        if leads_out(reference.get(key, "")):
            raise ValueError(refusal(role, key, reference[key], "a name inside the repository"))
    name = reference.get("name_or_path")
    if name is None:
        return
    if os.path.isdir(router_path):
        allowed = os.path.isabs(name) or not leads_out(name)
        expected = "a repository id or an absolute path"
    else:
        allowed = REPOSITORY_ID.fullmatch(name) is not None and not leads_out(name) and not os.path.exists(name)
        expected = "the id of a repository on the Hub, and no directory of this machine"
    if not allowed:
        raise ValueError(refusal(role, "name_or_path", name, expected))


def refusal(role: str, key: str, value: str, expected: str) -> str:
    """Return the message about a reference that is not followed."""
    return (
        f"{role}_reference: the router's configuration says {key}={value!r}, expected {expected}. It is not followed. "
        f"If you trust that place, pass {role}_name_or_path=... yourself."
    )


def leads_out(name: str) -> bool:
    """Say whether a relative path could lead out of the directory that it is meant for."""
    return any(
        path.is_absolute() or bool(path.drive) or bool(path.root) or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def check_folder(path: str, folder: str = "") -> None:
    """Refuse a folder of a local router whose files lie elsewhere, by links or by the names in an index of shards."""
    inside = os.path.join(path, folder)
    if not os.path.isdir(inside):
        return
    for name in [".", *os.listdir(inside)]:
        file = os.path.join(inside, name)
        if folder or "safetensors" in name:
            refuse_outsider(file, path)
        if name.endswith(".index.json"):
            check_index(os.path.realpath(file))


def refuse_outsider(file: str, path: str) -> None:
    """Refuse a file of a local router that is a link out of the router's directory."""
    roots = [os.path.realpath(path)]
    if os.path.basename(os.path.dirname(roots[0])) == "snapshots":
        # In the Hub's cache, the files of a snapshot are links to the repository's blobs.
        roots.append(os.path.dirname(os.path.dirname(roots[0])))
    target = os.path.realpath(file)
    if not any(os.path.commonpath([root, target]) == root for root in roots):
        raise ValueError(f"{file} leads out of the router's directory, to {target}; not read.")


def check_index(file: str) -> None:
    """Refuse an index of weights files that names files elsewhere."""
    with open(file, encoding="utf-8") as opened:
        named = set(json.load(opened).get("weight_map", {}).values())
    for name in sorted(named):
        if leads_out(name):
            raise ValueError(f"{file} names {name!r}, which leads out of the router's directory; it is not read.")
