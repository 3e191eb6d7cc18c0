"""Two language models that decode as one: a small one for the easy tokens, a large one for the critical ones."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from .model.cache import CiterCache
from .model.configuration import CiterConfig
from .model.modeling import CiterForCausalLM
from .model.saving import UPLOADERS

if TYPE_CHECKING:
    from .data.checkers import Verdict as Verdict
    from .data.checkers import get_checker as get_checker
    from .data.examples import Example as Example
    from .data.examples import read_examples as read_examples
    from .demo import DEMO_PAIR as DEMO_PAIR
    from .evaluation.calibrate import Calibration as Calibration
    from .evaluation.calibrate import calibrate as calibrate
    from .evaluation.check import check as check
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.results import Results as Results
    from .hub import push as push
    from .importers import convert as convert
    from .scale.remote import RemoteLM as RemoteLM
    from .serving.server import serve as serve
    from .training.label import label_preferences as label_preferences
    from .training.labels import Labels as Labels
    from .training.train import train as train

__version__ = "0.1.0"
# What takes long to import, or needs an extra, is imported when it is asked for.
LATER = {
    "DEMO_PAIR": "demo",
    "Calibration": "evaluation.calibrate",
    "Example": "data.examples",
    "Labels": "training.labels",
    "RemoteLM": "scale.remote",
    "Results": "evaluation.results",
    "Verdict": "data.checkers",
    "calibrate": "evaluation.calibrate",
    "check": "evaluation.check",
    "convert": "importers",
    "evaluate": "evaluation.evaluate",
    "get_checker": "data.checkers",
    "label_preferences": "training.label",
    "push": "hub",
    "read_examples": "data.examples",
    "serve": "serving.server",
    "train": "training.train",
}
__all__ = ["CiterCache", "CiterConfig", "CiterForCausalLM", "__version__", *LATER]

AutoConfig.register("citer", CiterConfig)
AutoModelForCausalLM.register(CiterConfig, CiterForCausalLM)


def _upload(model: CiterForCausalLM, folder: str, repo_id: str, **options: Any) -> str:
    from .hub import push_model

    return push_model(model, folder, repo_id, **options)


UPLOADERS[:] = [_upload]


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LATER[name]}"), name)
