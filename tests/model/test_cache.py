"""CiterCache and its layers: cropped, reordered, copied, repeated, and never at odds with the two models."""

import copy

import pytest
import torch
from transformers import DynamicCache

from citer_hf import CiterCache
from citer_hf.model.compat import cache_argument
from citer_hf.model.slots import Pass, SlotLayer
from tests.conftest import make_pair, random_prompts

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def read(model, cache, text, **options):
    return model(input_ids=text, past_key_values=cache, **options)


def filled(model, text, seen_by_llm: int, cache: CiterCache | None = None) -> CiterCache:
    """A cache of the whole text of which the LLM has seen the first part."""
    cache = CiterCache(model.config) if cache is None else cache
    if seen_by_llm:
        read(model, cache, text[:, :seen_by_llm], router_threshold=2.0)
    if seen_by_llm < text.shape[1]:
        read(model, cache, text[:, seen_by_llm:], router_threshold=0.0)
    assert (cache.get_seq_length(), cache.llm_length) == (text.shape[1], seen_by_llm)
    return cache


def assert_continues(model, cache, text):
    """What follows from the cache is what follows from the text, by either model."""
    follow = torch.full((text.shape[0], 2), 7)
    whole = torch.cat([text, follow], dim=1)
    for threshold in (0.0, 2.0):
        branch = copy.deepcopy(cache)
        ours = read(model, branch, follow, router_threshold=threshold).logits[:, -1]
        expected = (model.llm if threshold else model.slm)(whole, use_cache=False).logits[:, -1]
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("seen", [0, 4, 12])
@pytest.mark.parametrize("remove", [0, 3, 12])
@pytest.mark.parametrize("llm", ["llama", "mistral_sliding"])
def test_a_cropped_cache_is_that_of_the_shorter_text(seen, remove, llm):
    model = make_pair("llama", llm)
    text = torch.tensor(random_prompts((12,)))
    cache = CiterCache(model.config)
    cache.activate_past_recording()
    filled(model, text, seen, cache)
    cache.crop(-remove)
    assert cache.get_seq_length() == 12 - remove
    assert cache.llm_length == min(seen, 12 - remove)
    if remove < 12:
        assert_continues(model, cache, text[:, : 12 - remove])


@pytest.mark.parametrize("seen", [0, 4, 9])
def test_reordered_repeated_and_selected_sequences_go_on(pair, seen):
    text, order = torch.tensor(random_prompts((9, 9, 9))), torch.tensor([2, 0, 0])
    cache = filled(pair, text, seen)
    before = cache.routing.to_llm
    cache.reorder_cache(order)
    assert torch.equal(cache.routing.to_llm, before[order])
    assert_continues(pair, cache, text[order])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    assert_continues(pair, cache, text[order].repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.batch_size == 1
    assert_continues(pair, cache, text[:1])


@pytest.mark.parametrize("options", [None, {}, {"max_cache_len": 32}], ids=str)
def test_a_copy_goes_its_own_way(pair, options):
    text = torch.tensor(random_prompts((9,)))
    cache = filled(pair, text, 4, CiterCache() if options is None else CiterCache(pair.config, **options))
    other = copy.deepcopy(cache)
    other.crop(-3)
    read(pair, other, torch.tensor([[5, 6]]), router_threshold=2.0)
    assert (cache.get_seq_length(), cache.llm_length, len(cache.routing)) == (9, 4, 9)
    assert_continues(pair, cache, text)


def test_a_reset_cache_is_empty(pair):
    cache = filled(pair, torch.tensor(random_prompts((9,))), 4)
    cache.reset()
    assert (cache.get_seq_length(), cache.llm_length, cache.batch_size, len(cache.routing)) == (0, 0, -1, 0)
    text = torch.tensor(random_prompts((5, 5)))
    read(pair, cache, text, router_threshold=2.0)
    assert_continues(pair, cache, text)


def test_positions_given_late_are_completed(pair):
    text = torch.tensor(random_prompts((9,)))
    cache = CiterCache(pair.config)
    read(pair, cache, text[:, :5], router_threshold=0.0)
    read(pair, cache, text[:, 5:], router_threshold=0.0, position_ids=torch.arange(5, 9)[None])
    ids, positions = cache.unseen_tokens()
    assert torch.equal(ids, text) and positions.tolist() == [list(range(9))]


def test_what_a_cache_cannot_do_is_refused(pair):
    text = torch.tensor(random_prompts((5, 5)))
    cache = filled(pair, text, 5)
    with pytest.raises(ValueError, match="crop: expected a negative number"):
        cache.crop(2)
    with pytest.raises(ValueError, match=r"past_key_values: this cache holds 2 sequences, but input_ids has 3"):
        read(pair, cache, torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(TypeError, match="CiterCache belongs to a CiterForCausalLM"):
        pair.slm(text, **cache_argument(pair.slm, CiterCache(pair.config)))
    with pytest.raises(ValueError, match="this cache holds 2 sequences, but input_ids has 1"):
        pair.generate(text[:1], past_key_values=cache, max_new_tokens=2)
    for function in (pair, pair.generate):
        with pytest.raises(TypeError, match=r"expected a CiterCache, got DynamicCache"):
            function(input_ids=text, past_key_values=DynamicCache(config=pair.slm.config))


def states(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, tokens, 4), torch.randn(rows, 3, tokens, 4)


def test_a_step_copies_nothing_that_is_there_already_and_memory_to_spare_is_bounded():
    layer, places = SlotLayer(Pass()), set()
    keys, _ = layer.update(*states(4000))
    assert keys.untyped_storage().nbytes() == keys.numel() * keys.element_size()
    for _ in range(400):
        keys, _ = layer.update(*states(1))
        places.add(keys.data_ptr())
    assert len(places) <= 2, "that of the prompt, and one with memory to spare"
    room = keys.untyped_storage().nbytes() / keys.element_size() / (2 * 3 * 4)
    assert 4400 <= room <= 4400 * 9 / 8 + 64


def test_what_needs_a_gradient_is_not_written_in_place():
    layer = SlotLayer(Pass())
    keys = torch.randn(1, 1, 2, 4, requires_grad=True)
    layer.update(keys, keys.detach())
    out, _ = layer.update(keys, keys.detach())
    out.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))
