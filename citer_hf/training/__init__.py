"""From examples with reference answers to a trained router: label preferences, train, repeat (CITER, section 3)."""

from citer_hf.runs import import_extra

import_extra("pyarrow", "train")

from .labelling import label_preferences  # noqa: E402 - what it imports may be missing, which is told above
from .labels import Labels  # noqa: E402
from .train import train  # noqa: E402

__all__ = ["Labels", "label_preferences", "train"]
