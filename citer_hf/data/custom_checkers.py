"""Finding a user's own checker."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["load_function"]


def load_function(name: str) -> tuple[Callable[[str, Any], Any], bool]:
    """Import a function; modules in the current directory are found too."""
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"checker {name}: {module} cannot be imported (from {here} or what is installed): "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ValueError(f"checker {name}: {module} has no function {attribute!r}.")
    try:
        parameters = list(inspect.signature(function).parameters.values())
        inspect.signature(function).bind("", "")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"checker {name}: expected a function of (response, answer) or (response, example): {error}"
        ) from error
    return function, len(parameters) > 1 and parameters[1].name == "example"
