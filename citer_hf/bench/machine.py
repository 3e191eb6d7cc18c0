"""What the machine can do, and how much memory a run takes."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from .clock import Clock

__all__ = ["Machine", "PeakMemory", "available_memory", "describe_machine", "measure_bandwidth", "watch_memory"]

CPU_BUFFER = 256 << 20
DEVICE_BUFFER = 1 << 30
TRIALS = 5
SAMPLING_SECONDS = 0.002


@dataclass(frozen=True)
class Machine:
    """What the measurements were taken on."""

    device: str
    name: str
    threads: int
    memory_bandwidth: float
    torch: str
    transformers: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return asdict(self)


def describe_machine(device: torch.device) -> Machine:
    """Measure and describe the machine."""
    on_cuda = device.type == "cuda"
    return Machine(
        device=str(device),
        name=torch.cuda.get_device_name(device) if on_cuda else processor_name(),
        threads=torch.get_num_threads(),
        memory_bandwidth=measure_bandwidth(device),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def processor_name() -> str:
    """Return what the maker of the CPU calls it, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # Only Linux has that file.
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def measure_bandwidth(device: torch.device) -> float:
    """Measure how fast a device reaches its memory, in bytes per second."""
    largest = CPU_BUFFER if device.type == "cpu" else DEVICE_BUFFER
    size = min(largest, available_memory(device) // 16)
    rows = max(size // (4096 * 4), 1)
    source = torch.ones(rows, 4096, device=device)
    vector = torch.ones(4096, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    reads = min(clock.seconds(lambda: torch.mv(source, vector)) for _ in range(TRIALS))
    copies = min(clock.seconds(lambda: target.copy_(source)) for _ in range(TRIALS))
    return max(source.nbytes / reads, 2 * source.nbytes / copies)


def available_memory(device: torch.device) -> int:
    """Return the memory of a device that this process can still take, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    process, free = psutil.Process(), int(psutil.virtual_memory().available)
    # A limit of the shell (`ulimit -v`), which Linux alone tells.
    limit = process.rlimit(psutil.RLIMIT_AS)[0] if hasattr(process, "rlimit") else psutil.RLIM_INFINITY
    return free if limit == psutil.RLIM_INFINITY else min(free, max(limit - process.memory_info().vms, 0))


@dataclass
class PeakMemory:
    """Memory that a run took: of the process on a CPU, allocated by torch on CUDA, on all devices together."""

    before: int = 0
    peak: int = 0


def give_memory_back() -> None:
    """Give free memory of this process back to the system, where that can be asked for; elsewhere do nothing."""
    gc.collect()
    if sys.platform == "linux":
        # Not every C library has it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def watch_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the memory of what runs inside. On a CPU a thread samples it every 2 ms, so take no times meanwhile."""
    memory = PeakMemory()
    give_memory_back()
    if device.type == "cuda":
        every = range(torch.cuda.device_count())
        for index in every:
            torch.cuda.reset_peak_memory_stats(index)
        memory.before = sum(map(torch.cuda.memory_allocated, every))
        yield memory
        memory.peak = sum(map(torch.cuda.max_memory_allocated, every))
        return
    process = psutil.Process()
    memory.before = memory.peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            memory.peak = max(memory.peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.peak = max(memory.peak, process.memory_info().rss)
