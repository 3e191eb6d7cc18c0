"""Saving a pair as a router repository, and uploading it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

from transformers.utils.hub import PushToHubMixin

from .adapters import adapter_layers
from .saving import AUTO_MAP, save_atomically, save_code, save_router_repository, save_tokenizer

PUSH_KEYWORDS = ("private", "token", "create_pr", "revision", "commit_message", "commit_description", "tags")

# Upload a pair that is saved in a folder: (pair, folder, repo_id, **keywords of `push_to_hub`) -> address. `citer_hf`
# registers one that writes a model card; where a pair runs without the package, transformers uploads it alone.
UPLOADERS: list[Callable[..., str]] = []


def register_uploader(upload: Callable[..., str]) -> None:
    """Let `push_to_hub` upload with this function."""
    UPLOADERS[:] = [upload]


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

        The base models are referred to by name and revision. A base model that has no name (it was never saved or
        loaded) is saved along with the router; so is an adapter that was not loaded by its name.

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
        model: Any = self
        references = (model.config.slm_reference, model.config.llm_reference)
        # An adapter has files of its own, which say what it is.
        is_whole = references == (None, None) and not adapter_layers(model)
        if not save_base_models and is_whole:
            save_atomically(save_directory, lambda folder: self._save_whole(folder, **kwargs))
        else:
            save_atomically(
                save_directory, lambda folder: save_router_repository(model, folder, save_base_models, **kwargs)
            )
        if push_to_hub:
            repo_id = kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory))
            options = {key: kwargs[key] for key in (*PUSH_KEYWORDS, "max_shard_size") if key in kwargs}
            self.push_to_hub(repo_id, save_base_models=save_base_models, **options)

    def push_to_hub(
        self,
        repo_id: str,
        save_base_models: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> str:
        """Save the pair and upload it to the Hub; where `citer_hf` is imported, with a model card.

        Then results, provenance and plots that lie beside the router where it was loaded from go along, as long as it
        is still that router; a warning says what does not.

        Args:
            repo_id: Where to, such as `user/my-router`; made when it is not there.
            save_base_models: Whether to upload both models too.
            max_shard_size: Of a base model's weights files.
            kwargs: `private`, `token`, `create_pr`, `revision`, `commit_message`, `commit_description` and `tags`, as
                in transformers.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            OSError: when the upload fails.
            ValueError: when a base model is a directory of this machine and is not uploaded too.
        """
        unknown = sorted(kwargs.keys() - set(PUSH_KEYWORDS))
        if unknown:
            raise TypeError(f"{unknown[0]}: push_to_hub takes {', '.join(PUSH_KEYWORDS)}.")
        if not UPLOADERS:
            return Saved(self, save_base_models).push_to_hub(repo_id, max_shard_size=max_shard_size, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, save_base_models=save_base_models, max_shard_size=max_shard_size)
            return UPLOADERS[0](self, folder, repo_id, **kwargs)

    def _save_whole(self, folder: str, **kwargs: Any) -> None:
        self.config.auto_map = dict(AUTO_MAP)  # type: ignore[attr-defined]
        super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
        save_code(folder)
        save_tokenizer(self, folder)


class Saved(PushToHubMixin):
    """What transformers uploads of a pair."""

    def __init__(self, model: Any, save_base_models: bool):
        self.model, self.save_base_models = model, save_base_models

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Save the pair.

        Args:
            folder: Where to.
            kwargs: As for `CiterForCausalLM.save_pretrained`.
        """
        self.model.save_pretrained(folder, save_base_models=self.save_base_models, **kwargs)
