"""The command that shares a router: `citer push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import plain_errors

__all__ = ["push"]


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A router's directory.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to on the Hub, such as user/my-router.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Upload a router to the Hub, with a model card made from what is in its directory."""
    with plain_errors():
        from citer_hf.hub import push as push_directory

        typer.echo(push_directory(directory, repo_id, private=private or None, create_pr=create_pr))
