"""How fast a pair would decode on a machine that is not at hand, from its configurations alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from .costs import ModelCost
from .costs import flops as operations

__all__ = ["Alone", "Projection", "asynchronous_passes", "project"]

# Seconds of a forward pass that are neither memory nor arithmetic, when it is replayed as a CUDA graph: the launch,
# sampling and the host. Published: 5.4 ms for an SLM of 28 layers (TokenRouter). Eager, it is several times that.
OVERHEAD = 1e-3
# Of a link like NVLink 3: bytes per second in one direction, and seconds until a small all-reduce is through.
INTERCONNECT = 300e9
ALL_REDUCE_LATENCY = 15e-6
# Activations that the GPUs of a model exchange have 16 bits.
ACTIVATION_BYTES = 2
# Length and number of the texts in which waiting rows are simulated.
SIMULATED_TOKENS = 512
SIMULATED_SEEDS = 4
# Beyond this, passes per position hang on the part of the rows that waits alone, and playing all would take minutes.
MOST_SIMULATED_ROWS = 64


@dataclass(frozen=True)
class Alone:
    """One model decoding by itself, on the same devices."""

    time_per_token_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float


@dataclass(frozen=True)
class Projection:
    """What `project` expects of a pair. Times in seconds."""

    share: float
    batch_size: int
    context: int
    tensor_parallel: int
    replicas: int
    waiting_rows: int | None
    slm_step_s: float
    llm_step_s: float
    catch_up_s: float
    catch_up_tokens: float
    llm_passes_per_position: float
    slm_steps_per_position: float
    time_per_token_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    llm_alone: Alone
    slm_alone: Alone
    speedup: float
    break_even_share: float
    bytes_per_gpu: float
    slm_bits: float | None = None
    slm_bits_from: str | None = None
    llm_bits: float | None = None
    llm_bits_from: str | None = None


@dataclass(frozen=True)
class _Machine:
    bandwidth: float
    flops: float | None
    overhead: float
    interconnect: float
    all_reduce_latency: float

    def seconds(self, cost: ModelCost, rows: float, tokens: float, context: int, degree: int = 1) -> float:
        """Time of a forward pass of `rows` rows over `tokens` tokens each: memory or arithmetic, the slower one."""
        kv = rows * (cost.kv_bytes_read(context) + tokens * cost.kv_bytes_per_token) / _kv_parts(cost, degree)
        memory = (cost.weight_bytes_read(rows * tokens) / degree + kv) / self.bandwidth
        arithmetic = rows * operations(cost, tokens, context) / degree / self.flops if self.flops else 0.0
        return max(memory, arithmetic) + self.overhead + self.exchange_seconds(cost, rows * tokens, degree)

    def exchange_seconds(self, cost: ModelCost, tokens: float, degree: int) -> float:
        """Time of the two all-reduces of every layer, in a ring."""
        if degree == 1:
            return 0.0
        sent = 2 * (degree - 1) / degree * tokens * cost.hidden_size * ACTIVATION_BYTES
        return 2 * cost.num_layers * (self.all_reduce_latency + sent / self.interconnect)


def project(
    slm: ModelCost,
    llm: ModelCost,
    *,
    bandwidth: float,
    flops: float | None = None,
    share: float,
    batch_size: int = 1,
    context: int = 1024,
    overhead: float = OVERHEAD,
    tensor_parallel: int = 1,
    interconnect: float = INTERCONNECT,
    all_reduce_latency: float = ALL_REDUCE_LATENCY,
    replicas: int = 1,
    waiting_rows: int | None = None,
) -> Projection:
    """Project how fast a pair decodes, and each of its models alone."""
    check_whole("batch_size", batch_size, "rows")
    check_whole("context", context, "tokens")
    check_whole("replicas", replicas, "copies of the pair")
    check_whole("tensor_parallel", tensor_parallel, "devices")
    _check_heads(llm, tensor_parallel)
    check_number("share", share, 0, 1, "a share of the tokens from 0 to 1 (20 % is 0.2)")
    check_number("bandwidth", bandwidth, 1, math.inf, "bytes per second above 0, such as 2039e9")
    check_number("interconnect", interconnect, 1, math.inf, "bytes per second above 0, such as 300e9")
    check_number("overhead", overhead, 0, math.inf, "seconds per forward pass from 0 up, such as 0.001")
    check_number("all_reduce_latency", all_reduce_latency, 0, math.inf, "seconds from 0 up, such as 15e-6")
    if flops is not None:
        check_number("flops", flops, 1, math.inf, "operations per second above 0, such as 312e12, or None")
    if waiting_rows is not None:
        check_whole("waiting_rows", waiting_rows, "rows, or None for lock-step", most=batch_size)
    machine = _Machine(bandwidth, flops, overhead, interconnect, all_reduce_latency)
    llm_step = machine.seconds(llm, batch_size, 1, context, tensor_parallel)
    slm_alone = machine.seconds(slm, batch_size, 1, context)

    def times(at_share: float) -> tuple[float, float, float, float, float]:
        """SLM step and catch-up in seconds, tokens of a catch-up, LLM passes and SLM steps per position."""
        llm_passes, slm_steps, rows, tokens = _passes(batch_size, at_share, waiting_rows)
        # Where the LLM is hardly ever called, there is no more to catch up on than the text.
        tokens = min(tokens, context)
        slm_step = machine.seconds(slm, batch_size / slm_steps, 1, context)
        catch_up = machine.seconds(llm, rows, tokens, context, tensor_parallel) if llm_passes else 0.0
        return slm_step, catch_up, tokens, llm_passes, slm_steps

    def per_position(at_share: float) -> float:
        slm_step, catch_up, _, llm_passes, slm_steps = times(at_share)
        return slm_steps * slm_step + llm_passes * catch_up

    def alone(seconds: float) -> Alone:
        rate = batch_size / seconds
        return Alone(seconds, replicas * rate, rate / tensor_parallel)

    slm_step, catch_up, tokens, llm_passes, slm_steps = times(share)
    pair = alone(per_position(share))
    caches = batch_size * context * (llm.kv_bytes_per_token / _kv_parts(llm, tensor_parallel) + slm.kv_bytes_per_token)
    return Projection(
        share=share,
        batch_size=batch_size,
        context=context,
        tensor_parallel=tensor_parallel,
        replicas=replicas,
        waiting_rows=waiting_rows,
        slm_step_s=slm_step,
        llm_step_s=llm_step,
        catch_up_s=catch_up,
        catch_up_tokens=tokens,
        llm_passes_per_position=llm_passes,
        slm_steps_per_position=slm_steps,
        time_per_token_s=pair.time_per_token_s,
        tokens_per_s=pair.tokens_per_s,
        tokens_per_s_per_gpu=pair.tokens_per_s_per_gpu,
        llm_alone=alone(llm_step),
        slm_alone=alone(slm_alone),
        speedup=llm_step / pair.time_per_token_s,
        break_even_share=_break_even(per_position, llm_step),
        bytes_per_gpu=slm.resident_bytes + llm.resident_bytes / tensor_parallel + caches,
    )


def asynchronous_passes(
    rows: int, share: float, waiting_rows: int, tokens: int = SIMULATED_TOKENS, seed: int = 0
) -> tuple[float, float]:
    """Play a batch whose rows wait for the LLM while the others go on; texts that drift apart and end are included."""
    check_whole("rows", rows, "rows")
    check_whole("waiting_rows", waiting_rows, "rows", most=rows)
    check_whole("tokens", tokens, "tokens")
    check_number("share", share, 0, 1, "a share of the tokens from 0 to 1 (20 % is 0.2)")
    draw = random.Random(seed).random
    left, waits = [tokens] * rows, [False] * rows
    calls = steps = 0
    while any(left):
        steps += 1
        for row in range(rows):
            if left[row] and not waits[row]:
                waits[row] = draw() < share
                left[row] -= not waits[row]
        unfinished = rows - left.count(0)
        # With all rows waiting, the number of waiting rows cannot be below what triggers a call.
        if any(waits) and sum(waits) >= math.ceil(waiting_rows * unfinished / rows):
            calls += 1
            left = [count - wait for count, wait in zip(left, waits, strict=True)]
            waits = [False] * rows
    return calls / tokens, steps / tokens


@lru_cache(maxsize=1024)
def _passes(rows: int, share: float, waiting_rows: int | None) -> tuple[float, float, float, float]:
    """LLM passes and SLM steps per position; rows that an LLM pass reads and tokens of each."""
    if share == 0:
        return 0.0, 1.0, 0.0, 0.0
    if waiting_rows is None:
        # In this form a share too small to change 1 is not lost.
        any_row = 1.0 if share == 1 else -math.expm1(rows * math.log1p(-share))
        return any_row, 1.0, rows, 1 / any_row
    calls, steps = _waiting_passes(rows, share, waiting_rows)
    return calls, steps, rows * share / calls, 1 / share


def _waiting_passes(rows: int, share: float, waiting_rows: int) -> tuple[float, float]:
    """LLM passes and SLM steps per position of rows that wait, of many rows in proportion."""
    if rows > MOST_SIMULATED_ROWS:
        waiting_rows = max(round(waiting_rows * MOST_SIMULATED_ROWS / rows), 1)
        rows = MOST_SIMULATED_ROWS
    rare = rows * share
    if rare * SIMULATED_TOKENS < 1:
        # Dice would hardly ever show a row that waits. It waits until the others end, at half of its text on average.
        return rare, 1 + rare * SIMULATED_TOKENS / 2 * (waiting_rows > 1)
    played = [asynchronous_passes(rows, share, waiting_rows, seed=seed) for seed in range(SIMULATED_SEEDS)]
    calls, steps = (sum(counts) / SIMULATED_SEEDS for counts in zip(*played, strict=True))
    return calls, steps


def _break_even(per_position: Callable[[float], float], llm_step: float) -> float:
    """Share at which the pair takes as long as the LLM alone, found by halving."""
    low, high = 0.0, 1.0
    if per_position(high) < llm_step:
        return high
    if per_position(low) >= llm_step:
        return low
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if per_position(middle) < llm_step else (low, middle)
    return (low + high) / 2


def check_whole(name: str, value: int, what: str, most: int | None = None) -> None:
    """Refuse what is no count."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        limits = "1 or more" if most is None else f"1 to {most}"
        raise ValueError(f"{name}: expected a whole number of {what}, {limits}, got {value!r}. Correct {name}.")


def check_number(name: str, value: float, least: float, most: float, what: str) -> None:
    """Refuse a number outside its range."""
    if not (least <= value <= most) or math.isinf(value):
        raise ValueError(f"{name}: expected {what}, got {value!r}. Correct {name}.")


def _kv_parts(cost: ModelCost, degree: int) -> int:
    """Parts into which keys and values are divided: a head never is, so that more devices than heads keep copies."""
    return min(degree, cost.num_kv_heads)


def _check_heads(llm: ModelCost, degree: int) -> None:
    heads, kv_heads = llm.num_heads, llm.num_kv_heads
    if not heads:
        return
    possible = [
        str(count)
        for count in range(1, heads + 1)
        if heads % count == 0 and max(count, kv_heads) % min(count, kv_heads) == 0
    ]
    if str(degree) not in possible:
        kinds = f"{heads} attention heads" + (f" and {kv_heads} key-value heads" if kv_heads > 1 else "")
        raise ValueError(
            f"tensor_parallel: expected a number of devices that shares out the LLM's {kinds} evenly, got {degree}. "
            f"Give {' or '.join(filter(None, [', '.join(possible[:-1]), possible[-1]]))}."
        )
