"""Former place of `judge`; goes when training imports it from `evaluate`."""

from .evaluate import judge

__all__ = ["judge"]
