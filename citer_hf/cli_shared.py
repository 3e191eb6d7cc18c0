"""What the commands of `citer` share: the program, options, models by name, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .model.routers import as_threshold

__all__ = ["DeviceMap", "Dtype", "Threshold", "TrustRemoteCode", "app", "plain_errors", "resolve_model"]

DEMO = "demo"

app = typer.Typer(
    name="citer",
    help="Two language models that decode as one: a small one for the easy tokens, a large one for the critical ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def threshold_option(value: float | None) -> float | None:
    """Return a valid threshold."""
    try:
        return None if value is None else as_threshold(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Threshold = Annotated[
    float | None,
    typer.Option(callback=threshold_option, help="The SLM writes a token when its score reaches this.", metavar="X"),
]

Dtype = Annotated[str, typer.Option(help="Precision of both models, such as bfloat16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Where the models go, such as auto, cpu or cuda:0.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that the repository brings.")]


def resolve_model(name: str) -> str:
    """Return the directory or repository id that a user means."""
    if name == DEMO:
        from citer_hf.demo import PAIR

        name = str(PAIR)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} is no router directory: it has no config.json.")
        return str(path)
    looks_like_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if looks_like_path or path.exists():
        raise FileNotFoundError(f"{name} is neither a router directory nor a repository id.")
    return name


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that a user can do something about into one line on stderr and exit status 1."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except BrokenPipeError:
        # Whoever read the output has had enough of it, which is no error of ours.
        raise
    except (OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1) from error
