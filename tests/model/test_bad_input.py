"""Input to `forward` and `generate` that means nothing."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.model.routers import as_threshold
from tests.conftest import random_prompts
from tests.families import tiny_model

TEXT = torch.tensor(random_prompts((6, 6)))
BAD_NUMBERS = [-0.5, 2.01, 70, float("nan"), float("inf"), "0.7", True, [0.5, 0.5], None]
BAD_TENSORS = [
    torch.tensor(values)
    for values in ([0.5, -0.1], [0.5, float("nan")], [0.5, 70], [True, False], [0.5], 0.5, [[0.5], [0.5]])
]


@pytest.mark.parametrize("threshold", BAD_NUMBERS + BAD_TENSORS, ids=str)
def test_what_is_no_threshold_is_an_error_that_names_the_range_and_the_value(pair, count_calls, threshold):
    message = r"router_threshold: expected a number from 0 .* to 2 .*; got " + re.escape(repr(threshold))
    with pytest.raises(ValueError, match=message):
        as_threshold(threshold, 2)
    if threshold is None:
        return
    calls = count_calls(pair.slm)
    with pytest.raises(ValueError, match=message.replace(" .*; got", ".*; got")):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_threshold=threshold)
    assert calls == []
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        pair(input_ids=TEXT, router_threshold=threshold)
    for make in (CiterConfig, partial(CiterForCausalLM.from_pair, pair.slm, pair.llm)):
        with pytest.raises(ValueError, match="router_threshold: expected a number from 0"):
            make(router_threshold=threshold)


@pytest.mark.parametrize("value", [0, 0.7, 1, 2, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_a_threshold_is_any_number_from_0_to_2(value):
    assert type(as_threshold(value)) is float and as_threshold(value) == value
    assert as_threshold(torch.tensor([value, value]), 2).shape == (2, 1)


def test_embeddings_no_input_and_misspelt_keywords_are_errors(pair):
    with pytest.raises(ValueError, match="inputs_embeds fit one of the two models at most"):
        pair(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="input_ids: expected token ids"):
        pair()
    with pytest.raises(ValueError, match="inputs_embeds"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="router_treshold"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_treshold=0.5)


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig"])
def test_a_model_that_keeps_its_state_elsewhere_is_an_error_when_the_pair_is_made(name):
    other = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(vocab_size=61, hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(ValueError, match="keeps no keys and values in a `cache`"):
        CiterForCausalLM.from_pair(tiny_model("llama"), other)
