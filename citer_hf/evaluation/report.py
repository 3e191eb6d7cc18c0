"""The files that an evaluation leaves."""

from __future__ import annotations

import logging
from pathlib import Path

from .plot import draw
from .results import Results
from .store import RESULTS
from .table import write_markdown

__all__ = ["write_report"]

logger = logging.getLogger(__name__)


def write_report(results: Results, directory: Path) -> None:
    """Write `results.md`, `curve.png` and, last, `results.json`."""
    write_markdown(results, directory / "results.md")
    try:
        draw(results, directory / "curve.png")
    except ImportError as error:
        logger.warning("curve.png is left out. %s", error)
    results.write(directory / RESULTS)
