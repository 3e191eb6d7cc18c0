"""What lies beside a router where a pair was loaded from, and still belongs to it when the pair is pushed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from .belonging import check_provenance, method_in
from .card import CARD
from .evaluation.provenance import module_fingerprint
from .evaluation.results import Results
from .facts import CURVE
from .model.configuration import CiterConfig
from .model.paths import refuse_outsider
from .model.references import ROLES, commit_of, file_keywords
from .model.saved_router import router_state_dict
from .runs import read_json

__all__ = ["FACTS", "carry"]

TRAINING: tuple[str, ...] = ("provenance.json", "training.png")
EVALUATION: tuple[str, ...] = ("results.json", "results.md", CURVE)
FACTS = (*TRAINING, *EVALUATION)

logger = logging.getLogger(__name__)


def carry(model: Any, folder: Path) -> Path | None:
    """Copy what belongs to a pair's router from where the pair was loaded; warn of what is left out."""
    if model._repository is None:
        return None
    source, hub = model._repository
    try:
        found = fetch(source, hub)
        changed = found.keys() & {*FACTS, CARD} and what_has_changed(model, folder, source, hub)
    except (OSError, ValueError) as error:
        logger.warning("What lies beside the router in %s is not pushed: it cannot be read (%s).", source, error)
        return None
    if changed:
        left = ", ".join(sorted(found))
        logger.warning("Not pushed: %s of %s. They tell of what was loaded from there, but %s.", left, source, changed)
        return None
    config, router = read_json(folder / "config.json"), module_fingerprint(model.router)
    for names in (TRAINING, EVALUATION):
        of_these = [name for name in names if name in found]
        try:
            for name in of_these:
                refuse_foreign(name, found[name], config, router)
        except ValueError as error:
            logger.warning("Not pushed: %s of %s. %s", ", ".join(of_these), source, error)
            continue
        for name in of_these:
            shutil.copyfile(found[name], folder / name)
    return found.get(CARD)


def fetch(source: str, hub: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files beside a router that tell something of it, by name, those that are there."""
    options = {key: value for key, value in files_of(source, hub).items() if key != "force_download"}
    found = {
        name: cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
        for name in (*FACTS, CARD)
    }
    here = {name: Path(file) for name, file in found.items() if file is not None}
    if os.path.isdir(source):
        for file in here.values():
            refuse_outsider(str(file), source)
    return here


def files_of(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords for fetching files of the commit that a pair was loaded from."""
    options = file_keywords(dict(hub))
    commit = None if os.path.isdir(source) else commit_of(source, dict(hub))
    return options | ({"revision": commit} if commit else {})


def what_has_changed(model: Any, folder: Path, source: str, hub: Mapping[str, Any]) -> str | None:
    """Say what of a pair is not what was loaded, or `None`."""
    options = files_of(source, hub)
    before = CiterConfig.from_pretrained(source, **options)
    now = model.router.state_dict()
    then = router_state_dict(source, options) if now else {}
    if before.router != model.config.router or now.keys() != then.keys():
        return "the router is another one"
    if not all(torch.equal(tensor.cpu(), then[name]) for name, tensor in now.items()):
        return "the router has other weights now"
    saved = read_json(folder / "config.json")
    for role in ROLES:
        is_copied = "name_or_path" not in (saved.get(f"{role}_reference") or {})
        if is_copied and getattr(model, role).name_or_path != place_of(
            getattr(before, f"{role}_reference"), source, hub
        ):
            return f"the {role.upper()} is another one"
    return None


def place_of(reference: Mapping[str, str] | None, source: str, hub: Mapping[str, Any]) -> str:
    """Return the name under which a base model is loaded."""
    if reference is None or "name_or_path" in reference or not os.path.isdir(source):
        return (reference or {}).get("name_or_path", source)
    return os.path.join(source, os.path.join(hub.get("subfolder", ""), reference["subfolder"]))


def refuse_foreign(name: str, file: Path, config: Mapping[str, Any], router: str) -> None:
    """Refuse the provenance or results of another router or pair."""
    if name == "provenance.json":
        check_provenance(read_json(file), router)
    elif name == "results.json":
        method_in(Results.read(file), config, router)
