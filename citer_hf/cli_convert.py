"""`citer convert`: a router of other people's code becomes a router repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import Threshold, plain_errors

__all__ = ["convert"]


def convert(
    file: Annotated[Path, typer.Argument(help="A router of CITER's (.pth) or R2R's (.pt) released code.")],
    slm: Annotated[str, typer.Option(metavar="X", help="The SLM that it was trained with, a path or an id.")],
    llm: Annotated[str, typer.Option(metavar="Y", help="The LLM, a path or an id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A directory that does not exist yet, or is empty.")],
    router_threshold: Threshold = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the models' repositories bring.")] = False,
) -> None:
    """Turn a router of CITER's or R2R's released code into a router repository."""
    with plain_errors():
        from citer_hf import converting

        model = converting.convert(
            file, slm, llm, out, router_threshold=router_threshold, trust_remote_code=trust_remote_code
        )
        router = model.config.router
        typer.echo(
            f"Router saved in {out}: kind {router['type']}, for a hidden size of {router['hidden_size']}. It starts "
            f"with the threshold {model.config.router_threshold:.6g}; `citer calibrate` finds the one for your budget."
        )
