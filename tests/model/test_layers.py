"""Layers that append in place behave as those that concatenate."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from citer_hf.model.kv_layers import GrowingLayer

SHAPE = (2, 3, 1, 4)


def states(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, tokens, 4), torch.randn(rows, 3, tokens, 4)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.integers(1, 9)),
            st.tuples(st.just("crop"), st.integers(1, 3)),
            st.tuples(st.just("select"), st.integers(0, 1)),
            st.tuples(st.just("copy"), st.just(0)),
        ),
        max_size=14,
    )
)
def test_whatever_is_done_to_it_it_holds_what_a_dynamic_layer_holds(steps):
    ours, theirs = GrowingLayer(), DynamicLayer()
    for layer in (ours, theirs):
        torch.manual_seed(0)
        layer.update(*states(4))
    for number, (action, amount) in enumerate(steps):
        for name, layer in (("ours", ours), ("theirs", theirs)):
            torch.manual_seed(number)
            if action == "update":
                layer.update(*states(amount))
            elif action == "crop" and layer.get_seq_length() > amount:
                layer.crop(-amount)
            elif action == "select":
                layer.batch_select_indices(torch.tensor([amount, 1]))
            elif action == "copy" and name == "ours":
                ours = copy.deepcopy(ours)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_step_copies_nothing_that_is_there_already():
    layer = GrowingLayer()
    layer.update(*states(4000))
    places = set()
    for _ in range(400):
        keys, _ = layer.update(*states(1))
        places.add(keys.data_ptr())
    assert len(places) <= 2, "the room for the prompt, and one with room to spare"


def test_a_prompt_gets_no_room_to_spare():
    layer = GrowingLayer()
    keys, _ = layer.update(*states(4000))
    assert keys.untyped_storage().nbytes() == keys.numel() * keys.element_size()


def test_room_to_spare_is_bounded():
    layer = GrowingLayer()
    for _ in range(1000):
        keys, _ = layer.update(*states(1))
    spare = keys.untyped_storage().nbytes() / keys.element_size() / (2 * 3 * 4) - 1000
    assert 0 <= spare <= 1000 / 8 + 64


@pytest.mark.parametrize("crop", [1, 3])
def test_a_copy_taken_before_a_crop_keeps_what_it_had(crop):
    layer = GrowingLayer()
    layer.update(*states(6))
    layer.update(*states(2))
    before = layer.keys
    kept = before.clone()
    layer.crop(-crop)
    layer.update(*states(2))
    assert torch.equal(before, kept)


def test_what_needs_a_gradient_is_not_written_in_place():
    layer = GrowingLayer()
    keys = torch.randn(1, 1, 2, 4, requires_grad=True)
    layer.update(keys, keys.detach())
    out, _ = layer.update(keys, keys.detach())
    out.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))
