"""Routers to compare with, trained on the same labels and with the same settings."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from citer_hf.model.routers import build_router

from .labels import Labels
from .objectives import OBJECTIVES, QUERY
from .router_trainer import DEFAULTS, NothingToLearn, TrainingSettings, train_router

__all__ = ["train_baselines"]

UNTRAINED = ("confidence", "entropy", "random")

logger = logging.getLogger(__name__)


def train_baselines(
    labels: Labels,
    settings: TrainingSettings = DEFAULTS,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
    methods: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """Train a router with every objective, and query-level routing; add those that need no training."""
    known = [*OBJECTIVES, "query", *UNTRAINED]
    unknown = sorted(set(methods or ()) - set(known))
    if unknown:
        raise ValueError(f"methods: there is no {unknown[0]!r}; expected some of {known}.")
    wanted = known if methods is None else methods
    objectives = {name: one for name, one in {**OBJECTIVES, "query": QUERY}.items() if name in wanted}
    routers: dict[str, nn.Module] = {}
    for name, objective in objectives.items():
        report("training", len(routers), len(objectives))
        with tempfile.TemporaryDirectory() as folder:
            try:
                routers[name] = train_router(labels, objective, Path(folder), settings).router
            except NothingToLearn as error:
                # An SLM that is never right alone leaves query-level routing nothing to learn; the others go on.
                logger.warning("%s is left out. %s", name, error)
    report("training", len(routers), len(objectives))
    hidden_size = labels.hidden.shape[1]
    return routers | {name: build_router({"type": name}, hidden_size) for name in UNTRAINED if name in wanted}
