"""Pushing a router repository to the Hub."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from .belonging import ForeignFactsError
from .card import CARD, write_card
from .carrying import FACTS, carry
from .facts import Facts
from .model.saved_router import ROUTER_WEIGHTS
from .runs import read_json

__all__ = ["push", "push_pair", "repository_files"]

CONFIG = "config.json"

logger = logging.getLogger(__name__)


def push_pair(model: Any, folder: str, repo_id: str, **options: Any) -> str:
    """Upload a pair that has just been saved, with what belongs to its router where the pair was loaded from."""
    return push(folder, repo_id, card=carry(model, Path(folder)), **options)


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
    token: str | bool | None = None,
    card: Path | None = None,
) -> str:
    """Upload a router repository with a card, in one commit.

    Args:
        directory: Made by `save_pretrained` or `citer train`; with `results.json` and `curve.png` of `citer evaluate`
            in it, the card tells them. The card is written into it as `README.md`, unless a person's is there or on
            the Hub. What lies on the Hub beside another router, and not in the directory, is removed there.
        repo_id: Where to, such as `user/my-router`; made when it is not there.
        private: Whether a new repository is private. Default: as the account has it.
        create_pr: Whether to propose the files in a pull request.
        revision: The branch to push to. Default: the main one.
        commit_message: What the commit says.
        commit_description: What else it says.
        tags: More tags for the card.
        token: Of the Hub. Default: the one that `hf auth login` saved.
        card: An earlier card, for what a person wrote into it, where neither the directory nor the Hub has one.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: when the directory refers to models that nobody else has, holds results or provenance of another
            router, or is no router repository.
        OSError: when something cannot be read, or uploaded; then the directory is as it was, but for the card.
    """
    folder = Path(directory)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"directory: {folder} is no router directory: it has no config.json.")
    facts = Facts.read(folder)
    check_references(facts)
    check_facts(facts, folder)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        fetch_card(api, repo_id, revision, folder, card)
        write_card(folder, repo_id, tags or ())
        stale = [name for name in stale_facts(api, repo_id, revision, folder) if not (folder / name).exists()]
        if stale:
            logger.warning("%s: %s there are of another router, and are removed.", repo_id, ", ".join(stale))
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, file) for name, file in repository_files(folder)),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message or "Upload router",
            commit_description=commit_description,
            create_pr=create_pr,
            revision=revision,
        )
    except (HFValidationError, ForeignFileError):
        raise
    # What a failed transfer raises depends on the library that made it.
    except Exception as error:
        raise OSError(
            f"push: the upload to {repo_id} failed: {str(error).strip() or repr(error)}\nNothing on this machine was "
            "lost, and nothing half on the Hub. Check the network and your token (`hf auth login`), and push again."
        ) from error
    return str(commit.pr_url or commit.commit_url)


def check_references(facts: Facts) -> None:
    """Refuse a repository that refers to a directory of this machine."""
    for role in ("slm", "llm"):
        for name in (part.get("name_or_path") for part in (facts.reference(role), facts.adapter(role))):
            if name is not None and (os.path.isabs(name) or os.path.isdir(name)):
                raise ValueError(
                    f"{role}: the router refers to the directory {name} of this machine, which nobody else has. Save "
                    "it from a pair that was loaded by repository ids, or with save_base_models=True."
                )


def check_facts(facts: Facts, folder: Path) -> None:
    """Refuse files that tell of another router; warn of results that do not say which router they are of."""
    if facts.foreign:
        raise ForeignFactsError(f"{folder}: {facts.foreign[0]}")
    if facts.results is not None and facts.measured_as is None:
        logger.warning(
            "%s does not say which router it measured, and is taken at its word. `citer evaluate` of this version "
            "writes one that does.",
            folder / "results.json",
        )


def fetch_card(api: HfApi, repo_id: str, revision: str | None, folder: Path, otherwise: Path | None) -> None:
    """Get the card that is on the Hub already, so that what a person wrote there is kept."""
    if (folder / CARD).exists():
        return
    try:
        shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=revision), folder / CARD)
    except EntryNotFoundError:
        if otherwise is not None:
            shutil.copyfile(otherwise, folder / CARD)


def stale_facts(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> list[str]:
    """Return the files on the Hub that tell of the router there, where that is not the one that comes now."""
    names = [CONFIG, ROUTER_WEIGHTS, *FACTS]
    there = {one.path: one for one in api.get_paths_info(repo_id, names, revision=revision)}
    facts = [name for name in FACTS if name in there]
    if not facts or CONFIG not in there:
        return []
    before = read_json(Path(api.hf_hub_download(repo_id, CONFIG, revision=revision)))
    weights = there.get(ROUTER_WEIGHTS)
    is_same = before.get("router") == read_json(folder / CONFIG)["router"]
    return [] if is_same and is_same_file(weights, folder / ROUTER_WEIGHTS) else facts


def is_same_file(there: Any, here: Path) -> bool:
    """Say whether a large file on the Hub is the one on this machine."""
    if there is None or not here.is_file():
        return there is None and not here.is_file()
    if there.lfs is None or there.size != here.stat().st_size:
        return False
    digest = hashlib.sha256()
    with here.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest() == str(there.lfs.sha256)


class ForeignFileError(ValueError):
    """A file of a repository lies elsewhere."""


def repository_files(directory: Path) -> list[tuple[str, Path]]:
    """Return what belongs into a repository, the path in it and the file of each; hidden files do not."""
    root = directory.resolve()
    found: list[tuple[str, Path]] = []
    for parent, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(parent, name)
            if not file.resolve().is_relative_to(root):
                raise ForeignFileError(f"directory: {file} is a link out of the directory. Replace it by the file.")
            found.append((file.relative_to(directory).as_posix(), file))
    return found
