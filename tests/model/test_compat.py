"""Both names of the cache, on every supported version of transformers, and nothing deprecated by our own calls."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers.utils import logging

from citer_hf import CiterCache
from citer_hf.model import compat
from tests.conftest import left_padded, make_pair, random_prompts

NAMES = ("cache", "past_key_values")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
BATCH = left_padded(random_prompts())
ONE = left_padded(random_prompts((9,)))
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one sequence": (ONE, {}),
    "batch": (BATCH, {}),
    "lock-step": (BATCH, {"waiting_rows": 1}),
    "hidden states": (BATCH, {"output_hidden_states": True}),
    "beams": (BATCH, {"num_beams": 3}),
    "assisted": (ONE, {}),
    "prompt lookup": (ONE, {"prompt_lookup_num_tokens": 3}),
    "static": (BATCH, {"cache_implementation": "static"}),
    "chunked prompt": (ONE, {"prefill_chunk_size": 4}),
}


@pytest.fixture(autouse=True)
def every_notice():
    """Lets transformers repeat notices that it gives once per process; the test fails on them."""
    type(logging.get_logger("transformers")).warning_once.cache_clear()


def inputs_and_options(pair: Any, way: str) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs, options = WAYS[way]
    return inputs, {"assistant_model": pair.slm} if way == "assisted" else options


@pytest.mark.parametrize("way", WAYS)
def test_outputs_of_generate_have_both_names_and_nothing_deprecated_is_called(pair, way):
    inputs, options = inputs_and_options(pair, way)
    output = pair.generate(**inputs, **GREEDY, **options)
    assert isinstance(output.cache, CiterCache) and output.cache is output.past_key_values
    assert output.cache.routing.to_llm.shape[1] == 8


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_and_returns_the_cache_under_both_names(pair, name):
    ids = ONE["input_ids"]
    cache = CiterCache(pair.config)
    with torch.no_grad():
        pair(input_ids=ids[:, :5], **{name: cache})
        output = pair(input_ids=ids[:, 5:], **{name: cache})
        whole = pair(input_ids=ids)
    assert output.cache is cache and output.past_key_values is cache
    torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["one sequence", "batch", "lock-step", "assisted", "prompt lookup"])
def test_generate_takes_the_cache_under_both_names(pair, name, way):
    inputs, options = inputs_and_options(pair, way)
    expected = pair.generate(**inputs, **GREEDY)
    cache = CiterCache(pair.config)
    output = pair.generate(**inputs, **GREEDY, **options, **{name: cache})
    assert output.cache is cache
    assert torch.equal(output.sequences, expected.sequences)


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


@pytest.mark.parametrize("name", NAMES)
def test_a_base_model_with_code_of_its_own_gets_the_name_that_it_knows(name):
    """Code in a repository was written for one version of transformers, and runs on others."""
    pair = make_pair()
    expected = pair.generate(**BATCH, **GREEDY)
    llm, asked = pair.llm, []

    def inner(self: Any, input_ids: Any, cache: Any, rest: dict[str, Any]) -> Any:
        asked.append(cache)
        return type(llm).forward(self, input_ids, **compat.with_cache_name(rest), **{compat.CACHE: cache})

    space: dict[str, Any] = {"inner": inner}
    names = "attention_mask=attention_mask, position_ids=position_ids"
    exec(
        f"def forward(self, input_ids=None, attention_mask=None, position_ids=None, {name}=None, **rest):\n"
        f"    return inner(self, input_ids, {name}, dict({names}, **rest))\n",
        space,
    )
    own = type("OwnCode", (type(llm),), {"forward": space["forward"]})(llm.config).eval()
    own.load_state_dict(llm.state_dict())
    again = type(pair)(pair.config, slm=pair.slm, llm=own, router=pair.router)
    assert torch.equal(again.generate(**BATCH, **GREEDY).sequences, expected.sequences)
    assert asked and all(cache is not None for cache in asked)
