"""`citer bench --simulate`: projections of a pair for the machines and settings that a user names."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig

from citer_hf.model.configuration import CiterConfig, context_length
from citer_hf.model.schedule import rows_to_wait_for

from .costs import ModelCost, cost_of_config
from .devices import DEVICES
from .simulate import Projection, check_number, check_whole, project
from .stored import StoredWeights, weights_of_config

__all__ = ["named_as_options", "simulate_command", "table", "to_json"]

# Tokens in the cache, unless told otherwise or the pair reads fewer.
CONTEXT = 1024
# What the command line calls the arguments of `simulate_command`.
OPTIONS = {
    "device": "--gpu",
    "bandwidth_gb_s": "--bandwidth",
    "slm": "--slm",
    "llm": "--llm",
    "context": "--prompt-length, --max-new-tokens",
    **{name: "--" + name.replace("_", "-") for name in ("slm_bits", "llm_bits", "tensor_parallel", "replicas")},
}


def simulate_command(
    slm: str,
    llm: str | None = None,
    *,
    device: str | None = None,
    bandwidth_gb_s: float | None = None,
    tflops: float | None = None,
    slm_bits: float | None = None,
    llm_bits: float | None = None,
    kv_bits: float | None = None,
    shares: Sequence[float] = (0.1, 0.2, 0.35),
    batch_sizes: Sequence[int] = (1,),
    context: int | None = None,
    waiting_rows: int | None = None,
    **options: Any,
) -> list[Projection]:
    """Project a pair at shares and batch sizes: in lock-step, and for batches with waiting rows where that is
    chosen."""
    machine: dict[str, Any] = {**_machine(device, bandwidth_gb_s, tflops), **options}
    for name, bits in (("slm_bits", slm_bits), ("llm_bits", llm_bits), ("kv_bits", kv_bits)):
        if bits is not None:
            check_number(name, bits, 1, 64, "bits per number from 1 to 64, such as 16, 8 or 4.5")
    small, large = _pair(slm, llm)
    machine["context"] = _context(context, small, large)
    stored = weights_of_config(small, slm_bits, "slm_bits"), weights_of_config(large, llm_bits, "llm_bits")
    costs = _cost(small, stored[0], kv_bits), _cost(large, stored[1], kv_bits)
    projections = []
    for batch_size in batch_sizes:
        for share in shares:
            lock_step = project(*costs, share=share, batch_size=batch_size, **machine)
            projections.append(lock_step)
            ratio = lock_step.slm_step_s / (lock_step.catch_up_s or lock_step.llm_step_s)
            waiting = waiting_rows or rows_to_wait_for(batch_size, share, ratio)
            if min(waiting, batch_size) > 1:
                machine_and_rows = {**machine, "waiting_rows": min(waiting, batch_size)}
                projections.append(project(*costs, share=share, batch_size=batch_size, **machine_and_rows))
    known: dict[str, Any] = {
        **{"slm_bits": stored[0].bits, "slm_bits_from": stored[0].source},
        **{"llm_bits": stored[1].bits, "llm_bits_from": stored[1].source},
    }
    return [replace(one, **known) for one in projections]


@contextmanager
def named_as_options(router: bool) -> Iterator[None]:
    """Let errors about an argument of `simulate_command` name the option of the command line."""
    names = {**OPTIONS, "slm": "MODEL"} if router else OPTIONS
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        argument, colon, said = str(error).partition(": ")
        if not colon or argument not in names:
            raise
        # "Correct device." and the like; what was given stays as it was.
        said = re.sub(rf"(Correct|give) ({'|'.join(names)})\.$", lambda found: f"{found[1]} {names[found[2]]}.", said)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{names[argument]}: {said}") from error


def table(projections: Sequence[Projection]) -> str:
    """Lay projections out as text, a line each."""
    headers = (
        *("rows", "LLM\nshare", "rows that\nwait", "SLM step\nms", "LLM call\nms", "LLM calls\n/ position"),
        *("SLM steps\n/ position", "ms /\nposition", "tokens\n/ s", "tokens / s\n/ device", "LLM\nalone"),
        *("speed-up", "break-even\nshare"),
    )
    shown = Table(box=SIMPLE)
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    for one in projections:
        shown.add_row(
            str(one.batch_size),
            f"{100 * one.share:.3g}%",
            "-" if one.waiting_rows is None else str(one.waiting_rows),
            *(f"{1e3 * seconds:.2f}" for seconds in (one.slm_step_s, one.catch_up_s)),
            *(f"{count:.2f}" for count in (one.llm_passes_per_position, one.slm_steps_per_position)),
            f"{1e3 * one.time_per_token_s:.2f}",
            *(f"{rate:,.1f}" for rate in (one.tokens_per_s, one.tokens_per_s_per_gpu)),
            f"{one.llm_alone.tokens_per_s_per_gpu:,.1f}",
            f"{one.speedup:.2f}",
            f"{one.break_even_share:.0%}",
        )
    text = io.StringIO()
    Console(file=text, width=200).print(shown)
    gigabytes = max((one.bytes_per_gpu for one in projections), default=0) / 1e9
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    for one in projections[:1]:
        lines.append(f"Bits per weight of the SLM: {one.slm_bits:.4g} ({one.slm_bits_from}).")
        lines.append(f"Bits per weight of the LLM: {one.llm_bits:.4g} ({one.llm_bits_from}).")
    return "\n".join([*lines, f"Projected, not measured. The fullest device holds {gigabytes:.3g} GB."])


def to_json(projections: Sequence[Projection]) -> str:
    """Write projections as a JSON list, times in seconds."""
    return json.dumps([asdict(one) for one in projections], indent=2)


def _cost(config: PreTrainedConfig, stored: StoredWeights, kv_bits: float | None) -> ModelCost:
    return cost_of_config(config, stored.bits, kv_bits or stored.other_bits, stored.other_bits, stored.skipped)


def _context(context: int | None, *pair: PreTrainedConfig) -> int:
    limits = [limit for limit in map(context_length, pair) if limit is not None]
    if context is None:
        return min([CONTEXT, *limits])
    check_whole("context", context, "tokens")
    if limits and context > min(limits):
        raise ValueError(
            f"context: expected at most {min(limits)} tokens in all, the pair's context (max_position_embeddings), "
            f"got {context}. Correct context."
        )
    return context


def _pair(slm: str, llm: str | None) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    if llm is not None:
        return _config("slm", slm), _config("llm", llm)
    router = _config("slm", slm, router=True)
    return router.slm_config, router.llm_config


def _config(argument: str, name: str, router: bool = False) -> Any:
    path = Path(name).expanduser()
    if path.is_file():
        try:
            content = PreTrainedConfig._dict_from_json_file(path)
        except ValueError as error:
            raise ValueError(
                f"{argument}: expected a model's config.json, got {name!r}. It is no JSON: {error}."
            ) from None
        if not isinstance(content, dict) or "model_type" not in content:
            raise ValueError(f"{argument}: expected a model's config.json, got {name!r}. It has no model_type.")
        config = AutoConfig.for_model(content.pop("model_type"), **content)
    elif path.suffix == ".json":
        raise FileNotFoundError(f"{argument}: expected a model's config.json, got {name!r}. There is no such file.")
    else:
        config = AutoConfig.from_pretrained(str(path) if path.exists() else name)
    if isinstance(config, CiterConfig) != router:
        expected, remedy = (
            ("a router", "Give two models, an SLM and an LLM.") if router else ("one model", "Give the router alone.")
        )
        raise ValueError(f"{argument}: expected {expected}, got {name!r}, a {config.model_type}. {remedy}")
    return config


def _machine(device: str | None, bandwidth_gb_s: float | None, tflops: float | None) -> dict[str, float | None]:
    machine: dict[str, float | None] = {}
    if device is not None or bandwidth_gb_s is None:
        if device not in DEVICES:
            raise ValueError(
                f"device: expected one of {', '.join(DEVICES)}, got {device!r}. Choose one, or give bandwidth_gb_s."
            )
        machine = {"bandwidth": DEVICES[device].bandwidth, "flops": DEVICES[device].flops}
    if bandwidth_gb_s is not None:
        check_number("bandwidth_gb_s", bandwidth_gb_s, 1e-9, math.inf, "GB per second above 0, such as 2039")
        machine["bandwidth"] = bandwidth_gb_s * 1e9
    if tflops is not None:
        check_number("tflops", tflops, 1e-9, math.inf, "10¹² operations per second above 0, such as 312")
        machine["flops"] = tflops * 1e12
    return machine
