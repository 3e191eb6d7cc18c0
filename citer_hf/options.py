"""From options dataclasses to the options of a command line."""

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

Options = dict[str, Any]


def load(path: str) -> type[Any]:
    """Return the options dataclass `module.Class` of this package."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def expanded(
    function: Callable[..., None], around: Callable[[Any], AbstractContextManager[None]]
) -> Callable[..., None]:
    """Return a command, run within `around(out)`, with the fields of its options dataclasses as parameters.

    A parameter that stands for a dataclass is annotated with its name: `Annotated[Options, "module.Class"]`.
    """
    given, hints = inspect.signature(function).parameters, get_type_hints(function, include_extras=True)
    marks = [(name, one) for name in given for one in getattr(hints[name], "__metadata__", ())]
    classes = {name: load(mark) for name, mark in marks if isinstance(mark, str)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in given.items():
        own = [parameter.replace(annotation=hints[name])] if name not in classes else parameters_of(classes[name])
        for one in own:
            parameters.setdefault(one.name, one.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        with around(values.get("out")):
            keywords = {name: values[name] for name in given if name not in classes}
            for name, options in classes.items():
                own = {field.name: values[field.name] for field in dataclasses.fields(options)}
                # Pairs come as a list; what was not given is left to the default of the dataclass.
                own = {key: dict(chain(*value)) if is_pairs(value) else value for key, value in own.items()}
                keywords[name] = {key: value for key, value in own.items() if value not in (None, [], {})}
                # Wrong values are found before the command has done anything.
                options(**keywords[name])
            function(**keywords)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    return run


def parameters_of(options: type[Any]) -> list[inspect.Parameter]:
    """Return the parameters of typer for the fields of an options dataclass."""
    found, hints = [], get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, about = hints[field.name], dict(field.metadata)
        default: Any = field.default
        flags = (about.pop("flag") or "--" + field.name.replace("_", "-")).split()
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(one for one in get_args(kind) if one is not type(None))
        if get_origin(kind) in (tuple, Sequence, Mapping):
            if default:
                about["help"] += f" [default: {','.join(map(str, default))}]"
            if get_origin(kind) is Mapping:
                kind, about["parser"] = list[Any], as_pairs
            elif str(about["metavar"]).endswith(",..."):
                kind, about["callback"] = str, separated_by_commas(get_args(kind)[0])
            else:
                kind = list[get_args(kind)[0]]  # type: ignore[misc]
            default = None
        elif kind is bool and default:
            flags = [f"{flag}/--no-{flag[2:]}" for flag in flags]
        elif kind is Any:
            kind = str
        is_argument = about.pop("argument", False)
        info = typer.Argument(**about, show_default=False) if is_argument else typer.Option(*flags, **about)
        annotation: Any = Annotated[kind if default is not None else kind | None, info]
        found.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    return found


def is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, tuple) for one in value)


def as_pairs(text: str) -> tuple[tuple[str, str], ...]:
    # A comma divides where a field follows: the name of a column may have one.
    pairs = [one.partition("=") for one in re.split(r",(?=\s*\w+\s*=)", text)]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise typer.BadParameter(f"expected FIELD=COLUMN,..., such as prompt=question, got {text!r}.")
    return tuple((key.strip(), value.strip()) for key, _, value in pairs)


def separated_by_commas(kind: type[Any]) -> Callable[[str | None], Any]:
    def split(text: str | None) -> Any:
        try:
            return tuple(kind(part.strip()) for part in (text or "").split(",") if part.strip()) or None
        except ValueError:
            raise typer.BadParameter(f"expected numbers separated by commas, such as 0.2,0.5, got {text!r}.") from None

    return split
