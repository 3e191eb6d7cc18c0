"""Two language models that decode as one: a small one for the easy tokens, a large one for the critical ones."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from .model.cache import CiterCache
from .model.configuration import CiterConfig
from .model.modeling import CiterForCausalLM
from .model.saving import register_uploader

__version__ = "0.1.0"
__all__ = ["CiterCache", "CiterConfig", "CiterForCausalLM", "__version__"]

AutoConfig.register("citer", CiterConfig)
AutoModelForCausalLM.register(CiterConfig, CiterForCausalLM)


def _upload(model: CiterForCausalLM, folder: str, repo_id: str, **options: Any) -> str:
    from .hub import push_model

    return push_model(model, folder, repo_id, **options)


# The model, which travels without the rest, cannot write a card.
register_uploader(_upload)
