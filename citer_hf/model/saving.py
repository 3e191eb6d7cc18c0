"""Writing a router repository, all or nothing."""

from __future__ import annotations

import copy
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import safe_save_file, unwrap_model

from .adapters import active_adapter, adapter_origin, save_adapter, without_adapter
from .references import commit_of

# Where `trust_remote_code=True` finds the classes: the files of this folder, copied into one of the repository.
CODE_FOLDER = "citer"
AUTO_MAP = {
    "AutoConfig": f"{CODE_FOLDER}/configuration.CiterConfig",
    "AutoModelForCausalLM": f"{CODE_FOLDER}/modeling.CiterForCausalLM",
}
STALE_SHARDS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_atomically(save_directory: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Write files beside the directory's present ones, and put them in place only when all are complete."""
    directory = os.path.abspath(save_directory)
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise NotADirectoryError(f"save_directory: expected a directory, got the file {directory}.")
    made = not os.path.exists(directory)
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as folder:
            write(folder)
            _move_into_place(folder, directory)
    except BaseException as error:
        if made:
            shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"save_directory: nothing was saved to {directory}: {error.strerror or error}. {ADVICE}"
            ) from error
        raise


ADVICE = "Check that the directory can be written to and that the disk has room."


def _move_into_place(folder: str, directory: str) -> None:
    files = [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    ]
    stale = [name for name in os.listdir(directory) if STALE_SHARDS.fullmatch(name) and name not in files]
    with tempfile.TemporaryDirectory(dir=directory, prefix=".replaced-") as replaced:
        steps: list[tuple[str, str]] = []
        try:
            for file in [*files, *stale]:
                new, present, kept = (os.path.join(place, file) for place in (folder, directory, replaced))
                _refuse_link(os.path.dirname(present), directory)
                for place in (present, kept):
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                moves = [(present, kept)] if os.path.exists(present) else []
                for source, target in [*moves, *([(new, present)] if file in files else [])]:
                    os.replace(source, target)
                    steps.append((source, target))
        except BaseException:
            for source, target in reversed(steps):
                os.replace(target, source)
            raise


def _refuse_link(folder: str, directory: str) -> None:
    root = os.path.realpath(directory)
    if os.path.commonpath([root, os.path.realpath(folder)]) != root:
        raise OSError(errno.ELOOP, f"{folder} is a link out of it")


def save_router_repository(model: Any, folder: str, save_base_models: bool, **kwargs: Any) -> None:
    """Write a router, its configuration, generation settings and tokenizer, and base models where they belong."""
    if not kwargs.pop("is_main_process", True):
        return
    model = unwrap_model(model)
    state_dict = kwargs.pop("state_dict", None)
    config = copy.deepcopy(model.config)
    for role in ("slm", "llm"):
        base = getattr(model, role)
        adapter = active_adapter(role, base)
        reference = getattr(config, f"{role}_reference")
        reference = None if reference is None else {key: reference[key] for key in reference if key != "adapter"}
        if save_base_models or reference is None:
            save_base_model(role, base, os.path.join(folder, role), **kwargs)
            reference = {"subfolder": role} | origin_of(model, role, reference)
        elif "name_or_path" not in reference and model._repository is not None:
            path, hub = model._repository
            reference = reference_from_elsewhere(reference, path, hub, os.path.dirname(folder))
        if adapter is not None:
            origin = None if save_base_models else adapter_origin(base, adapter)
            if origin is None:
                origin = {"subfolder": f"{role}_adapter"}
                save_adapter(base, adapter, os.path.join(folder, origin["subfolder"]), reference.get("name_or_path"))
            reference = {**reference, "adapter": origin}
        setattr(config, f"{role}_reference", reference)
    state_dict = model.router.state_dict(prefix="router.") if state_dict is None else state_dict
    weights = {key: tensor.contiguous() for key, tensor in state_dict.items() if key.startswith("router.")}
    if weights:
        safe_save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(folder)
    save_code(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(model, folder)


def origin_of(model: Any, role: str, reference: dict[str, str] | None) -> dict[str, str]:
    """Say from which published model one was loaded that is now saved along; nothing where that is not known."""
    name, (repository, _) = str(getattr(model, role).name_or_path), model._repository or ("", {})
    lies_there = name == repository or name.startswith(os.path.join(repository, ""))
    if reference is not None and "name_or_path" not in reference and lies_there:
        # The router's own repository may say where it was from before.
        return {key: reference[key] for key in ("origin", "origin_revision") if key in reference}
    commit = model._commits.get(role)
    return {"origin": name, "origin_revision": commit} if commit and not os.path.isdir(name) else {}


def reference_from_elsewhere(
    reference: dict[str, Any], path: str, hub: dict[str, Any], save_directory: str
) -> dict[str, Any]:
    """Say where a base model is that lies in a folder of the repository which the pair was loaded from."""
    folder = os.path.join(hub.get("subfolder", ""), reference.get("subfolder", ""))
    if not os.path.isdir(path):
        commit = commit_of(path, hub) or hub.get("revision")
        return {"name_or_path": path, "subfolder": folder} | ({"revision": commit} if commit else {})
    if os.path.realpath(path) == os.path.realpath(save_directory):
        return reference
    return {"name_or_path": os.path.abspath(os.path.join(path, folder))}


def save_code(folder: str) -> None:
    """Copy the files of the core, so that the repository works where this package is not installed."""
    model_file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "modeling.py")
    os.mkdir(os.path.join(folder, CODE_FOLDER))
    for file in {model_file, *get_relative_import_files(model_file)}:
        shutil.copyfile(file, os.path.join(folder, CODE_FOLDER, os.path.basename(file)))


def save_tokenizer(model: Any, folder: str) -> None:
    """Save the tokenizer of a pair that has one."""
    tokenizer = model.load_tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_base_model(role: str, model: Any, folder: str, **kwargs: Any) -> None:
    """Save one of the two base models."""
    names = ("max_shard_size", "variant", "save_original_format")
    try:
        without_adapter(role, model).save_pretrained(folder, **{key: kwargs[key] for key in names if key in kwargs})
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{role}: {type(model).__name__} cannot be saved as it is loaded ({error}). Leave save_base_models "
            "out, so that the router only refers to it."
        ) from error
