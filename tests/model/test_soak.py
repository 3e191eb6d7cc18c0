"""Long runs: throughput does not fall and memory does not grow."""

from __future__ import annotations

import gc
import os
import statistics
import time

import psutil
import pytest
import torch

from tests.conftest import left_padded, make_pair, random_prompts

SEGMENTS = 12


@pytest.mark.slow
def test_throughput_does_not_fall_and_memory_does_not_grow():
    """Runs for `CITER_SOAK_SECONDS` of processor time: other work on the machine does not slow that down much."""
    model = make_pair(hidden_size=48)
    process = psutil.Process()
    # The first segment warms up.
    segment = float(os.environ.get("CITER_SOAK_SECONDS", "24")) / (SEGMENTS + 1)

    def write() -> tuple[float, int]:
        """Return tokens per second of one segment, and the memory of the process after it."""
        tokens, texts, began = 0, 0, time.process_time()
        while time.process_time() - began < segment:
            for lengths in ((9,), (3, 12, 7, 5)):
                batch = left_padded(random_prompts(lengths, seed=texts))
                model.generate(**batch, max_new_tokens=60, do_sample=True, eos_token_id=None)
                tokens += 60 * len(lengths)
            texts += 1
        seconds = time.process_time() - began
        gc.collect()
        return tokens / seconds, process.memory_info().rss

    write()
    throughput, memory = zip(*(write() for _ in range(SEGMENTS)), strict=True)
    third = SEGMENTS // 3
    first, last = statistics.median(throughput[:third]), statistics.median(throughput[-third:])
    print(f"tokens/s {first:.0f} to {last:.0f}, memory {memory[0] / 2**20:.1f} to {memory[-1] / 2**20:.1f} MiB")
    assert last > 0.85 * first
    assert memory[-1] - memory[0] < 8 * 2**20


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
