"""Pushing a router repository to the Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from .card import CARD, Facts, write_card

__all__ = ["push", "repository_files"]


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
) -> str:
    """Upload a router repository with a card, in one commit.

    Args:
        directory: Made by `save_pretrained` or `citer train`; with `results.json` and `curve.png` of `citer evaluate`
            in it, the card tells them. The card is written into it as `README.md`, unless a person's is there or on
            the Hub.
        repo_id: Where to, such as `user/my-router`; made when it is not there.
        private: Whether a new repository is private. Default: as the account has it.
        create_pr: Whether to propose the files in a pull request.
        revision: The branch to push to. Default: the main one.
        commit_message: What the commit says.
        commit_description: What else it says.
        tags: More tags for the card.
        token: Of the Hub. Default: the one that `hf auth login` saved.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: when the directory refers to models that nobody else has, or is no router repository.
        OSError: when something cannot be read, or uploaded; then the directory is as it was, but for the card.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"directory: {folder} is no router directory: it has no config.json.")
    check_references(Facts.read(folder))
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        fetch_card(api, repo_id, revision, folder)
        write_card(folder, repo_id, tags or ())
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, file) for name, file in repository_files(folder)],
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
    """Refuse a repository that refers to a directory of this machine.

    Args:
        facts: What its files say.

    Raises:
        ValueError: which names the model.
    """
    if facts.config.get("model_type") != "citer":
        raise ValueError(f"directory: expected a router repository, got a {facts.config.get('model_type')} model.")
    for role in ("slm", "llm"):
        reference = facts.reference(role)
        for name in (reference.get("name_or_path"), (reference.get("adapter") or {}).get("name_or_path")):
            if name is not None and (os.path.isabs(name) or os.path.isdir(name)):
                raise ValueError(
                    f"{role}: the router refers to the directory {name} of this machine, which nobody else has. Save "
                    "it from a pair that was loaded by repository ids, or with save_base_models=True."
                )


def fetch_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Get the card that is on the Hub already, so that what a person wrote there is kept.

    Args:
        api: The Hub.
        repo_id: The repository.
        revision: The branch.
        folder: The router repository; a card in it is left alone.
    """
    if (folder / CARD).exists():
        return
    try:
        shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=revision), folder / CARD)
    except EntryNotFoundError:
        return


class ForeignFileError(ValueError):
    """A file of a repository lies elsewhere."""


def repository_files(directory: Path) -> list[tuple[str, Path]]:
    """Return what belongs into a repository, the path in it and the file of each; hidden files do not.

    Args:
        directory: The router repository.

    Raises:
        ForeignFileError: for a link that leads out of the directory.
    """
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
