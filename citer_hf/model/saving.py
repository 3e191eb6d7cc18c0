"""Saving a pair as a router repository, all or nothing, and uploading it."""

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import safe_save_file, unwrap_model
from transformers.utils import logging

from .adapters import active_adapter, adapter_origin, save_adapter, without_adapter
from .references import ROLES, commit_of, difference, reference_to, resolve

logger = logging.get_logger(__name__)

# Where `trust_remote_code=True` finds the classes: the files of this folder, copied into one of the repository.
CODE_FOLDER = "citer"
AUTO_MAP = {
    "AutoConfig": f"{CODE_FOLDER}/configuration.CiterConfig",
    "AutoModelForCausalLM": f"{CODE_FOLDER}/modeling.CiterForCausalLM",
}
# What an earlier save may have left beside the new files, and would be loaded in their place.
STALE = re.compile(
    r"(pytorch_)?model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?"
    r"|adapter_(config\.json|model\.(safetensors|bin))|\w+_citer\.py"
)
PUSH_KEYWORDS = ("private", "token", "create_pr", "revision", "commit_message", "commit_description", "tags")

# Upload a pair that is saved in a folder: (pair, folder, repo_id, **keywords of `push_to_hub`) -> address. `citer_hf`
# fills the list; the model, which travels without the rest, cannot write a card.
UPLOADERS: list[Callable[..., str]] = []


class CiterSharingMixin:
    """`save_pretrained` and `push_to_hub` of `CiterForCausalLM`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        save_base_models: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the router, the configuration, the generation settings and the tokenizer, all or nothing.

        The base models are referred to by name and revision. A base model that this would not lead back to is saved
        along with the router, with a warning that says why: it has no name, its weights or its vocabulary were
        changed, or it was loaded already, with a revision, subfolder or variant that nobody can know. So is an adapter
        that was not loaded by its name.

        Args:
            save_directory: Where to; made when it is not there.
            save_base_models: Whether to save both models too, in the folders `slm` and `llm`, so that the directory
                stands on its own and can be moved.
            push_to_hub: Whether to upload the result; `repo_id` says where to.
            kwargs: As in transformers.

        Raises:
            OSError: when the directory cannot be written; then nothing in it has changed.
            ValueError: when a base model cannot be saved.
        """
        if not kwargs.pop("is_main_process", True):
            return
        save_atomically(
            save_directory, lambda folder: save_router_repository(self, folder, save_base_models, **kwargs)
        )
        if push_to_hub:
            repo_id = kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory))
            options = {key: kwargs[key] for key in (*PUSH_KEYWORDS, "max_shard_size") if key in kwargs}
            self.push_to_hub(repo_id, save_base_models=save_base_models, **options)

    def push_to_hub(
        self, repo_id: str, save_base_models: bool = False, max_shard_size: int | str = "50GB", **kwargs: Any
    ) -> str:
        """Save the pair and upload it to the Hub with a model card; `citer_hf` must be imported.

        Args:
            repo_id: Where to, such as `user/my-router`; made when it is not there.
            save_base_models: Whether to upload both models too.
            max_shard_size: Of a base model's weights files.
            kwargs: `private`, `token`, `create_pr`, `revision`, `commit_message`, `commit_description` and `tags`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            OSError: when the upload fails.
            ValueError: when a base model is a directory of this machine and is not uploaded too.
        """
        if not UPLOADERS:
            raise ImportError("push_to_hub: only the installed package pushes: pip install citer-hf, import citer_hf.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, save_base_models=save_base_models, max_shard_size=max_shard_size)
            return UPLOADERS[0](self, folder, repo_id, **kwargs)


def save_router_repository(model: Any, folder: str, save_base_models: bool, **kwargs: Any) -> None:
    """Write a router, its configuration, generation settings and tokenizer, and base models where they belong."""
    model = unwrap_model(model)
    state_dict = kwargs.pop("state_dict", None)
    config: Any = copy.deepcopy(model.config)
    for role in ROLES:
        base, adapter = getattr(model, role), active_adapter(role, model)
        reference = None if save_base_models else found_again(role, model, os.path.dirname(folder))
        if reference is None:
            save_base_model(role, base, os.path.join(folder, role), **kwargs)
            reference = {"subfolder": role, **origin_of(model, role)}
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
    save_settings(model, config, folder)


def found_again(role: str, model: Any, directory: str) -> dict[str, Any] | None:
    """Return a reference under which a base model is found again, or `None` when it has to be saved."""
    base, stated = getattr(model, role), getattr(model.config, f"{role}_reference")
    if stated is None:
        return None
    reference = stated = {key: value for key, value in stated.items() if key != "adapter"}
    repository: tuple[str, dict[str, Any]] = model._repository or ("", {})
    path, hub = repository
    if "name_or_path" not in stated:
        # It lies in a folder of the repository which the pair was loaded from.
        if not os.path.isdir(path):
            hub = {**hub, "revision": commit_of(path, hub) or hub.get("revision")}
        place, there = resolve(role, path, {"subfolder": stated.get("subfolder", "")}, hub)
        reference = {"name_or_path": os.path.abspath(place) if os.path.isdir(path) else place, **there}
    problem = ""
    for one in filter(None, (reference, reference_to(base, {}))):
        found = difference(base, one, {"cache_dir": hub.get("cache_dir")})
        if found is None:
            is_inside = "name_or_path" not in stated and os.path.realpath(path) == os.path.realpath(directory)
            return stated if is_inside and one is reference else one
        problem = problem or f"it differs from {one['name_or_path']}: {found}"
    logger.warning(f"{role}: the {role.upper()} is saved along with the router, since {problem}.")
    return None


def origin_of(model: Any, role: str) -> dict[str, str]:
    """Return from which published model one was loaded that is now saved along; nothing where that is not known."""
    reference = getattr(model.config, f"{role}_reference") or {}
    name, (repository, _) = str(getattr(model, role).name_or_path), model._repository or ("", {})
    if "name_or_path" not in reference and (name == repository or name.startswith(os.path.join(repository, ""))):
        # The router's own repository may say where it was from before.
        return {key: reference[key] for key in ("origin", "origin_revision") if key in reference}
    commit = model._commits.get(role)
    return {"origin": name, "origin_revision": commit} if commit and not os.path.isdir(name) else {}


def save_base_model(role: str, model: Any, folder: str, **kwargs: Any) -> None:
    names = ("max_shard_size", "variant", "save_original_format")
    try:
        without_adapter(role, model).save_pretrained(folder, **{key: kwargs[key] for key in names if key in kwargs})
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{role}: it cannot be saved as it is loaded, leave save_base_models out: {error}") from error


def save_settings(model: Any, config: Any, folder: str) -> None:
    """Write the configuration, the code, the generation settings and the tokenizer of a pair."""
    config.auto_map = dict(AUTO_MAP)
    config.to_json_file(os.path.join(folder, "config.json"))
    model_file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "modeling.py")
    os.mkdir(os.path.join(folder, CODE_FOLDER))
    for file in {model_file, *get_relative_import_files(model_file)}:
        shutil.copyfile(file, os.path.join(folder, CODE_FOLDER, os.path.basename(file)))
    # Settings that transformers only warns about are saved too, as those of a published model are.
    settings = os.path.join(folder, "generation_config.json")
    model.generation_config.to_json_file(settings, keys_to_pop=["compile_config"])
    tokenizer = model.load_tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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
            move_into_place(folder, directory)
    except BaseException as error:
        if made:
            shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"save_directory: nothing was saved to {directory}: {error.strerror or error}. Check the disk's room.",
            ) from error
        raise


def move_into_place(folder: str, directory: str) -> None:
    """Move all files of a folder into a directory, and remove what an earlier save left there; undo it on an error."""
    moves: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(dir=directory, prefix=".replaced-") as replaced:
        try:
            for parent, _, names in os.walk(folder):
                target, kept = (os.path.join(root, os.path.relpath(parent, folder)) for root in (directory, replaced))
                os.makedirs(target, exist_ok=True)
                os.makedirs(kept, exist_ok=True)
                old = [name for name in os.listdir(target) if name in names or STALE.fullmatch(name)]
                for source, place, files in ((target, kept, old), (parent, target, names)):
                    for name in files:
                        move = os.path.join(source, name), os.path.join(place, name)
                        os.replace(*move)
                        moves.append(move)
        except BaseException:
            for source, place in reversed(moves):
                os.replace(place, source)
            raise
