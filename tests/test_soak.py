"""Long runs: memory does not grow."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from .conftest import left_padded, make_pair, random_prompts


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_texts():
    model = make_pair(hidden_size=48)
    process = psutil.Process()

    def write(texts: int) -> int:
        for seed in range(texts):
            for lengths in ((9,), (3, 12, 7, 5)):
                model.generate(**left_padded(random_prompts(lengths, seed)), max_new_tokens=60, do_sample=True)
        gc.collect()
        return process.memory_info().rss

    write(60)
    before = write(60)
    after = write(240)
    assert after - before < 8 * 2**20


@pytest.mark.slow
def test_the_cache_of_a_long_text_holds_its_tokens_and_an_eighth_to_spare():
    model = make_pair(max_position_embeddings=8192)
    output = model.generate(
        torch.tensor(random_prompts((6,))),
        max_new_tokens=4000,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    for cache in (output.past_key_values.slm, output.past_key_values.llm):
        for layer in cache.layers:
            room = layer.keys.untyped_storage().nbytes() / layer.keys.element_size()
            assert room <= layer.keys[0, :, 0].numel() * (4006 * 1.125 + 64)
