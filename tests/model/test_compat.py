"""Both names of the cache, on every supported version of transformers, and nothing deprecated by our own calls."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers.utils import logging

from citer_hf import CiterCache
from citer_hf.model.compat import is_out_of_memory
from tests.conftest import left_padded, random_prompts

NAMES = ("cache", "past_key_values")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
BATCH = left_padded(random_prompts())
ONE = left_padded(random_prompts((9,)))
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one sequence": (ONE, {}),
    "batch": (BATCH, {}),
    "hidden states": (BATCH, {"output_hidden_states": True}),
    "beams": (BATCH, {"num_beams": 3}),
    "assisted": (ONE, {}),
    "prompt lookup": (ONE, {"prompt_lookup_num_tokens": 3}),
    "chunked prompt": (ONE, {"prefill_chunk_size": 4}),
}


@pytest.fixture(autouse=True)
def every_notice():
    """Lets transformers repeat notices that it gives once per process; the test fails on them."""
    type(logging.get_logger("transformers")).warning_once.cache_clear()


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("way", WAYS)
def test_generate_takes_and_returns_the_cache_under_both_names_and_calls_nothing_deprecated(pair, way, name):
    inputs, options = WAYS[way]
    options = {"assistant_model": pair.slm} if way == "assisted" else dict(options)
    if name:
        options[name] = CiterCache(pair.config)
    output = pair.generate(**inputs, **GREEDY, **options)
    assert isinstance(output.cache, CiterCache) and output.cache is output.past_key_values
    assert output.cache is options.get(name, output.cache) and output.cache.routing.to_llm.shape[1] == 8
    assert way == "beams" or torch.equal(output.sequences, pair.generate(**inputs, **GREEDY).sequences)


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_and_returns_the_cache_under_both_names(pair, name):
    ids = ONE["input_ids"]
    cache = CiterCache(pair.config)
    pair(input_ids=ids[:, :5], **{name: cache})
    output = pair(input_ids=ids[:, 5:], **{name: cache})
    whole = pair(input_ids=ids)
    assert output.cache is cache and output.past_key_values is cache
    torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1])


def test_two_caches_are_an_error_and_one_that_is_none_does_not_count(pair):
    caches = {name: CiterCache(pair.config) for name in NAMES}
    for function in (pair, pair.generate):
        with pytest.raises(ValueError, match="cache, past_key_values: got both, expected one"):
            function(**ONE, **caches)
    expected = pair.generate(**ONE, **GREEDY).sequences
    assert torch.equal(pair.generate(**ONE, **GREEDY, cache=None, past_key_values=None).sequences, expected)
    assert pair(**ONE, cache=caches["cache"], past_key_values=None).cache is caches["cache"]


def test_outputs_are_copied_and_pickled_with_both_names(pair):
    output = pair(**ONE)
    for again in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert again.cache.get_seq_length() == again.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_memory_that_ran_out_is_told_from_other_errors(error):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shapes do not match"))
