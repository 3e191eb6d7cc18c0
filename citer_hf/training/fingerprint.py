"""What a set of labels was made with, so that it is never used with anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from citer_hf.data.tokens import Encoded, template_fingerprint, tokenizer_fingerprint
from citer_hf.evaluation.provenance import base_model_fingerprint, fingerprint
from citer_hf.model.routers import hidden_size_of

__all__ = ["check_made_with", "fingerprint_of_questions", "made_with"]

NAMES = {
    "slm": "SLM",
    "llm": "LLM",
    "layer": "layer whose hidden states the router reads",
    "hidden_size": "hidden size of the SLM",
    "tokenizer": "tokenizer",
    "template": "chat template",
}


def made_with(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what labels depend on, for `labels.json`."""
    return {
        "slm": base_model_fingerprint(model.slm)[:16],
        "llm": base_model_fingerprint(model.llm)[:16],
        "layer": "last",
        "hidden_size": hidden_size_of(model.slm),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template_fingerprint(tokenizer),
    }


def check_made_with(found: dict[str, Any], expected: dict[str, Any], directory: Any) -> None:
    """Refuse labels that were made with something else."""
    different = [name for name in NAMES if found.get(name) != expected[name]]
    if different:
        what = ", ".join(f"{NAMES[name]} ({found.get(name)!r} there, {expected[name]!r} here)" for name in different)
        raise ValueError(
            f"labels: {directory} was made with another {what}. Train with the pair that the labels were made with, "
            "or make new labels with `citer label`."
        )


def fingerprint_of_questions(questions: Sequence[Encoded]) -> str:
    """Return a hash of questions, their references and answers, in their order."""
    return fingerprint([[asdict(one.example), one.prompt_ids, one.response_ids] for one in questions])[:16]
