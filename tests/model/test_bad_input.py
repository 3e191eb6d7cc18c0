"""Input to `forward` and `generate` that means nothing."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import left_padded, random_prompts

TEXT = torch.tensor(random_prompts((6, 6)))
BAD_THRESHOLDS = [
    (-0.5, "expected a number from 0"),
    (float("nan"), "expected a number from 0"),
    ("half", "expected a number from 0"),
    (torch.tensor([0.5, -0.1]), r"numbers from 0 .* got tensor\(\[ 0.5"),
    (torch.tensor([0.5, float("nan")]), "numbers from 0"),
]


@pytest.mark.parametrize(("threshold", "message"), BAD_THRESHOLDS)
def test_a_threshold_that_means_nothing_is_refused(pair, threshold, message):
    with pytest.raises(ValueError, match=f"router_threshold: .*{message}"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_threshold=threshold)
    with torch.no_grad(), pytest.raises(ValueError, match=f"router_threshold: .*{message}"):
        pair(input_ids=TEXT, router_threshold=threshold)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
def test_a_threshold_of_another_shape_is_refused(pair, shape):
    threshold = torch.full(shape, 0.5)
    with torch.no_grad(), pytest.raises(ValueError, match=r"router_threshold: expected a number or a tensor \[2\]"):
        pair(input_ids=TEXT, router_threshold=threshold)
    with pytest.raises(ValueError, match="router_threshold: expected a number"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_threshold=threshold)


def test_a_wrong_threshold_is_refused_before_the_prompt_is_read(pair, count_calls):
    calls = count_calls(pair.slm)
    with pytest.raises(ValueError, match="router_threshold"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_threshold=-1.0)
    assert calls == []


def test_embeddings_and_no_input_are_refused_by_forward(pair):
    with pytest.raises(ValueError, match="inputs_embeds: the two models have an embedding space each"):
        pair(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="input_ids: expected token ids"):
        pair()


def test_a_misspelt_keyword_of_generate_is_refused(pair):
    with pytest.raises(ValueError, match="router_treshold"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_treshold=0.5)


def test_a_cache_of_another_batch_is_refused_by_generate(pair):
    output = pair.generate(input_ids=TEXT, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="this cache holds 2 rows, but input_ids has 1"):
        pair.generate(**left_padded(random_prompts((12,))), past_key_values=output.past_key_values, max_new_tokens=2)
