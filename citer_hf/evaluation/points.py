"""Former place of `Point`; goes when hub and its tests import it from `results`."""

from .results import Point

__all__ = ["Point"]
