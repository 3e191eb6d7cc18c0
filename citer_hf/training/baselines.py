"""Routers to compare with in evaluations: trained on the same labels, or by somebody else for the same pair."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file

from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.model.loading import load_router
from citer_hf.model.routers import build_router
from citer_hf.runs import alone, from_main_process, process_state, progress_bar

from .labels import Labels
from .objectives import OBJECTIVES, QUERY
from .train import PROVENANCE, NothingToLearn, TrainOptions, train_router

TRAINED = {**OBJECTIVES, "query": QUERY}
UNTRAINED = ("confidence", "entropy", "random")

logger = logging.getLogger(__name__)


def baseline_routers(
    model: CiterForCausalLM, labels_dir: str | Path, methods: Sequence[str] | None = None, seed: int = 0
) -> dict[str, nn.Module]:
    """Train a router with every objective and for whole queries; add the kinds that need no training.

    One process trains. Routers are returned in every process, on the SLM's device, by the names of `methods`.
    """
    known = [*TRAINED, *UNTRAINED]
    unknown = sorted(set(methods or ()) - set(known))
    if unknown:
        raise ValueError(f"methods: there is no {unknown[0]!r}; expected some of {known}.")
    labels = Labels.load(labels_dir)
    labels.check_pair(model)
    routers: dict[str, nn.Module] = {}
    if process_state().is_main_process:
        with progress_bar() as progress, alone(), tempfile.TemporaryDirectory() as folder:
            progress.begin("training", len(methods or known))
            for name in methods or known:
                try:
                    if name in UNTRAINED:
                        routers[name] = build_router({"type": name}, labels.hidden.shape[1])
                    else:
                        settings = TrainOptions(seed=seed)
                        routers[name], _ = train_router(labels, TRAINED[name], settings, Path(folder, name))
                except NothingToLearn as error:
                    # An SLM that is never right alone leaves query-level routing nothing to learn.
                    logger.warning("%s is left out. %s", name, error)
                progress.advance()
    return {name: router.to(model.slm.device) for name, router in from_main_process(routers).items()}


def router_of(directory: str | Path, model: CiterForCausalLM) -> tuple[str, nn.Module]:
    """Return method and router of a directory that `citer train` has made for the same pair."""
    directory = Path(directory)
    method = method_of(str(directory)) if (directory / PROVENANCE).is_file() else None
    if method is None:
        raise FileNotFoundError(
            f"--compare: {directory} has no {PROVENANCE} that names its method: expected a directory that "
            "`citer train` has made."
        )
    router: Any = load_router(CiterConfig.from_pretrained(directory).router, model.slm.config, str(directory), {})
    return method, router.eval().to(model.slm.device)


def method_of(name: str) -> str | None:
    """Return the method that a router was trained with, where `citer train` has noted it; `name`: path or id."""
    file = cached_file(name, PROVENANCE, _raise_exceptions_for_missing_entries=False) if name else None
    return json.loads(Path(file).read_text()).get("objective") if file else None
