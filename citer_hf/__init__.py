"""Two language models that decode as one: a small one for the easy tokens, a large one for the critical ones."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from .model.cache import CiterCache
from .model.configuration import CiterConfig
from .model.modeling import CiterForCausalLM
from .model.saving import UPLOADERS

if TYPE_CHECKING:
    from .data.checkers import Verdict, get_checker
    from .data.examples import Example, read_examples
    from .demo import DEMO_PAIR
    from .evaluation.calibrate import Calibration, calibrate
    from .evaluation.evaluate import evaluate
    from .evaluation.results import Results
    from .hub import push
    from .importers import convert
    from .serving.server import serve
    from .training.label import label_preferences
    from .training.labels import Labels
    from .training.train import train

__version__ = "0.1.0"
__all__ = [
    "DEMO_PAIR",
    "Calibration",
    "CiterCache",
    "CiterConfig",
    "CiterForCausalLM",
    "Example",
    "Labels",
    "Results",
    "Verdict",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "get_checker",
    "label_preferences",
    "push",
    "read_examples",
    "serve",
    "train",
]

AutoConfig.register("citer", CiterConfig)
AutoModelForCausalLM.register(CiterConfig, CiterForCausalLM)


def _upload(model: CiterForCausalLM, folder: str, repo_id: str, **options: Any) -> str:
    from .hub import push_model

    return push_model(model, folder, repo_id, **options)


UPLOADERS[:] = [_upload]

# What takes long to import, or needs an extra, is imported when it is asked for.
_LATER = {
    "data.checkers": ("Verdict", "get_checker"),
    "data.examples": ("Example", "read_examples"),
    "demo": ("DEMO_PAIR",),
    "evaluation.calibrate": ("Calibration", "calibrate"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.results": ("Results",),
    "hub": ("push",),
    "importers": ("convert",),
    "serving.server": ("serve",),
    "training.label": ("label_preferences",),
    "training.labels": ("Labels",),
    "training.train": ("train",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
