"""What `citer bench` was asked for, and whether that can be done."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from citer_hf.model.routers import as_threshold

__all__ = ["DEFAULT_SHARES", "BenchOptions", "Setting", "check_device", "check_dtype", "check_plot", "parse_numbers"]

DEFAULT_SHARES = (0.0, 0.2, 0.5, 1.0)
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
# Narrower ones have no arithmetic of their own in torch.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What torch's generators take.
LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Setting:
    """How the pair decides who writes: by a forced share, or by its own router at a threshold."""

    share: float | None = None
    threshold: float | None = None

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"share {self.share:g}" if self.share is not None else f"threshold {self.threshold:g}"

    @property
    def router_threshold(self) -> float:
        """The `router_threshold` to generate with; of a forced router it is the share itself."""
        if self.share is None:
            assert self.threshold is not None
            return self.threshold
        # Forced scores lie between 0 and 1, but what is close to 1 could round to it.
        return 2.0 if self.share == 1 else self.share


@dataclass(frozen=True)
class BenchOptions:
    """Everything that decides what is measured."""

    shares: tuple[float, ...] = DEFAULT_SHARES
    thresholds: tuple[float, ...] = ()
    prompts: Path | None = None
    prompt_length: int = 128
    batch_size: int = 1
    max_new_tokens: int = 64
    repeats: int = 3
    warmup: int = 1
    cache_implementation: str | None = None
    seed: int = 0
    released_loop: bool = False
    assisted: bool = True

    def __post_init__(self) -> None:
        for share in self.shares:
            if not 0 <= share <= 1:
                raise ValueError(
                    f"--shares: expected numbers from 0 (every token from the SLM) to 1 (every token from the LLM), "
                    f"got {share:g}. Give shares such as 0,0.2,0.5,1."
                )
        for threshold in self.thresholds:
            as_threshold(threshold)
        for name, least in (("prompt_length", 1), ("batch_size", 1), ("max_new_tokens", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: expected a whole number from {least}, got {getattr(self, name)}.")
        if self.warmup < 0:
            raise ValueError(f"--warmup: expected a whole number from 0, got {self.warmup}.")
        if abs(self.seed) > LARGEST_SEED:
            raise ValueError(f"--seed: expected a whole number up to {LARGEST_SEED}, got {self.seed}.")

    @property
    def static(self) -> bool:
        """Whether caches are static, and passes compiled on an accelerator."""
        return self.cache_implementation == "static"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings of the pair, each once, in the order given."""
        wanted = [Setting(share=share) for share in self.shares]
        wanted += [Setting(threshold=threshold) for threshold in self.thresholds]
        return tuple(dict.fromkeys(wanted))

    def as_dict(self) -> dict[str, Any]:
        """Return everything above, for JSON."""
        return asdict(self) | {"prompts": None if self.prompts is None else str(self.prompts)}


def parse_numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Read numbers separated by commas."""
    if text is None or not text.strip():
        return ()
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            raise ValueError(
                f"{option}: expected numbers separated by commas, such as 0.2,0.5, got {part.strip()!r} in {text!r}."
            ) from None
    return tuple(numbers)


def check_device(name: str | None) -> str:
    """Return the device to run on: the one given, or the machine's first accelerator, or its CPU."""
    there = available_devices()
    if name is None:
        return there[1] if len(there) > 1 else there[0]
    if name == "auto":
        return name
    # A name without a number is the first of its kind.
    if name in there or f"{name}:0" in there:
        return name
    raise ValueError(
        f"--device: expected a device of this machine, got {name!r}. There is: {', '.join(there)} "
        "(or auto, which spreads the models over all of them)."
    )


def available_devices() -> list[str]:
    """Return the names of the devices of this machine: `cpu`, then its accelerators."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]


def check_dtype(name: str) -> str:
    """Return the name of a precision that models can be loaded in."""
    if name != "auto" and getattr(torch, name, None) not in DTYPES:
        raise ValueError(f"--dtype: expected auto, float32, bfloat16 or float16, got {name!r}.")
    return name


def check_plot(path: Path | None) -> None:
    """Refuse, before anything is measured, a plot that could not be drawn or written."""
    if path is None:
        return
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(f"--plot: expected a file name that ends in {', '.join(PLOT_SUFFIXES)}, got {path.name!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: {path.parent} is no directory to write {path.name} in.")
    if path.is_dir():
        raise IsADirectoryError(f"--plot: {path} is a directory. Give the name of a file.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"--plot: {path.name} cannot be written into {path.parent}: {error.strerror}.") from error
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'citer-hf[plot]'")


def check_cache(name: str | None, device: torch.device) -> None:
    """Refuse a kind of cache that there is no use for on a device."""
    if device.type == "cpu" and name is not None and "offloaded" in name:
        raise ValueError(
            f"--cache-implementation: {name} moves keys and values from an accelerator to the CPU, but the pair is on "
            "the CPU. Leave the option out, or give another --device."
        )


def check_context(limit: int | None, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for the text."""
    longest = max(lengths)
    if limit is None or longest + max_new_tokens <= limit:
        return
    context = f"the pair's context (max_position_embeddings) is {limit}"
    if longest < limit:
        raise ValueError(
            f"--prompt-length, --max-new-tokens: a prompt of {longest} tokens and {max_new_tokens} new ones are "
            f"{longest + max_new_tokens} tokens, but {context}. Give shorter prompts or at most --max-new-tokens "
            f"{limit - longest}."
        )
    room = limit - max_new_tokens
    advice = f"Give prompts of at most {room} tokens" if room > 0 else f"Give shorter prompts, and less than {limit}"
    raise ValueError(
        f"--prompts, --prompt-length: a prompt of {longest} tokens leaves no room, since {context}. {advice} for "
        f"--max-new-tokens (now {max_new_tokens})."
    )
