"""The processes that `accelerate launch` or `torchrun` started: which one this is, and waiting for the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

__all__ = ["alone", "from_main_process", "process_state", "wait_for_all"]

logger = logging.getLogger(__name__)

# One process may have hours of work left when another has none: torch would give up after minutes.
LONGEST_WAIT = timedelta(days=30)
# What launchers tell a process about the others.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def process_state() -> PartialState:
    """Return which of how many processes this is, and connect them the first time."""
    if PartialState._shared_state:
        return PartialState()
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ and not launched():
        logger.warning(
            "accelerate has started one process: with --cpu it starts several through MPI alone. Start them with "
            "`accelerate launch --multi_gpu --num_processes N` (on a CPU too) or `torchrun --nproc-per-node N`."
        )
    # accelerate takes a machine without accelerator for a single process, unless it is told.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT) if launched() else PartialState(cpu=on_cpu)


def launched() -> bool:
    """Say whether a launcher has told this process about others."""
    return any(name in os.environ for name in LAUNCHED)


def wait_for_all() -> None:
    """Wait until every process is here."""
    with explained():
        process_state().wait_for_everyone()


def from_main_process(value: Any) -> Any:
    """Return what the main process has, in every process."""
    with explained():
        return broadcast_object_list([value])[0]


@contextmanager
def explained() -> Iterator[None]:
    """Say what it means when the connection to another process breaks."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "Another process has ended before its work was done; the reason is above. What is done is kept: run the "
            f"same command to go on. ({str(error).strip().splitlines()[0]})"
        ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Let `Trainer` take this process for the only one: what it trains for all must not wait for the others."""
    if not launched():
        yield
        return
    hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
        process_state()
