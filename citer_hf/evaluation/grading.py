"""Former place of `judge` and `name_of`; goes when training imports them from `evaluate`."""

from .evaluate import judge, name_of

__all__ = ["judge", "name_of"]
