"""Out of memory inside `generate` and `forward`: the message says which model, what it needs, and what helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from citer_hf.costs import cost_of_model
from citer_hf.model.memory import kv_bytes_per_token, weight_bytes
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import FAMILIES, tiny_model

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    MemoryError(),
]
# Two have layers without attention; two get from the tests' common shape a number of key-value heads that means
# nothing to them.
COUNTED = sorted(set(FAMILIES) - {"qwen3_next", "lfm2", "gpt2", "bloom"})


def failing_at(model: Any, call: int, error: Exception) -> Any:
    """Let a model's forward pass of this number fail, after its first layer has read the tokens."""
    calls, layer = [], model.base_model.layers[0]
    forward = layer.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise error
        return output

    layer.forward = fail
    return model


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "cpu", "cpu on Windows", "python"])
@pytest.mark.parametrize("role", ["slm", "llm"])
def test_out_of_memory_keeps_its_type_and_names_the_model(error: Exception, role: str) -> None:
    pair = make_pair()
    failing_at(getattr(pair, role), 1, error)
    with pytest.raises(type(error)) as caught:
        pair.generate(**left_padded(random_prompts((5, 9, 12))), max_new_tokens=20, do_sample=False)
    message = str(caught.value)
    assert type(caught.value) is type(error) and caught.value.__cause__ is error
    assert message.startswith(f"{role.upper()}: out of memory") and str(error) in message
    for said in (
        "of 3 row(s)",
        "GB for its weights",
        "keys and values of",
        "fewer rows or shorter prompts",
        "prefill_chunk_size",
        f"{role}_quantization_config",
        'cache_implementation="offloaded"',
        "device_map",
    ):
        assert said in message


@pytest.mark.parametrize("lengths", [(6,), (6, 4)])
def test_it_says_how_much_was_being_read(lengths: tuple[int, ...]) -> None:
    pair = make_pair(threshold=0.0)
    failing_at(pair.slm, 4, ERRORS[0])
    with pytest.raises(torch.OutOfMemoryError, match=rf"reading 1 token\(s\) of {len(lengths)} row.* of 9 token\(s\)"):
        pair.generate(**left_padded(random_prompts(lengths)), max_new_tokens=20, do_sample=False, eos_token_id=None)


def test_without_a_cache_too() -> None:
    pair = make_pair(threshold=2.0)
    failing_at(pair.llm, 1, ERRORS[0])
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match=r"^LLM: .* reading 6 token\(s\) of 1 row"):
        pair(input_ids=torch.tensor(random_prompts((6,))), use_cache=False)


def test_another_error_is_left_as_it_is() -> None:
    pair, error = make_pair(), RuntimeError("shapes do not match")
    failing_at(pair.slm, 1, error)
    with pytest.raises(RuntimeError) as caught:
        pair.generate(torch.tensor(random_prompts((6,))), max_new_tokens=2)
    assert caught.value is error


def test_accelerate_still_finds_a_batch_size_that_fits() -> None:
    from accelerate.utils import find_executable_batch_size

    tried: list[int] = []

    def work(batch_size: int) -> None:
        tried.append(batch_size)
        pair = make_pair()
        if batch_size > 2:
            failing_at(pair.slm, 1, ERRORS[0])
        pair.generate(torch.tensor(random_prompts((6,) * batch_size)), max_new_tokens=2)

    find_executable_batch_size(work, starting_batch_size=4)()
    assert tried[0] == 4 and tried[-1] <= 2


@pytest.mark.parametrize("family", COUNTED)
def test_the_estimate_is_what_the_bench_counts(family: str) -> None:
    model = tiny_model(family, 1)
    assert kv_bytes_per_token(model) == cost_of_model(model).kv_bytes_per_token
    assert weight_bytes(model) >= cost_of_model(model).weight_bytes
