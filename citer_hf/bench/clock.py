"""How long something takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["Clock"]


class Clock:
    """Times calls on a device, from an idle device to an idle device."""

    def __init__(self, device: torch.device):
        self.device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Run something and return the time it took, in seconds."""
        self.wait()
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                began.record()
                work()
                ended.record()
            self.wait()
            return began.elapsed_time(ended) / 1000
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until all accelerators that the work may use are idle."""
        if self.device.type == "cpu":
            return
        # The two models may be on different devices.
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
