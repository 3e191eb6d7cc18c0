"""Figures that need no display, in files that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import written_beside

__all__ = ["GREY", "new_figure", "save_figure"]

GREY = "#555555"


def new_figure(inches: tuple[float, float], what: str = "A plot") -> Any:
    """Return an empty figure of matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"{what} needs matplotlib: pip install 'citer-hf[plot]'") from None
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure beside its place and move it there."""
    with written_beside(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
