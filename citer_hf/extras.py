"""Libraries that only some commands need."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["import_extra"]


def import_extra(library: str, extra: str) -> ModuleType:
    """Import a library that comes with an optional extra of this package."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(f"{library} is not installed: pip install 'citer-hf[{extra}]'") from None
