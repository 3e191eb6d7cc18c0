"""Devices that a projection knows by name. Imports nothing, so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICES", "Device"]


@dataclass(frozen=True)
class Device:
    """What the maker publishes about one device; no program reaches quite as much."""

    bandwidth: float
    flops: float | None


# Published peaks. The CPU: two channels of DDR5-5200.
DEVICES = {
    "h200": Device(4800e9, 989e12),
    "h100": Device(3350e9, 989e12),
    "a100-80gb": Device(2039e9, 312e12),
    "a100-40gb": Device(1555e9, 312e12),
    "l40s": Device(864e9, 362e12),
    "rtx4090": Device(1008e9, 165e12),
    "cpu-ddr5": Device(83e9, None),
}
