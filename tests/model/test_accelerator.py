"""What only an accelerator shows: passes that are compiled and recorded there give the text of the naive loop.

Without one, `CITER_TEST_DEVICE=cpu` runs what can be run.
"""

import os
from typing import Any

import pytest
import torch

from citer_hf.bench.bench import bench
from tests.conftest import left_padded, make_pair, random_prompts
from tests.reference import assert_sequences, naive_texts

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}

FOUND = torch.accelerator.current_accelerator(check_available=True)
DEVICE = os.environ.get("CITER_TEST_DEVICE", "cpu" if FOUND is None else f"{FOUND.type}:0")
ROWS = (3, 11, 7, 9)

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and "CITER_TEST_DEVICE" not in os.environ, reason="no accelerator")


@pytest.fixture(scope="module")
def placed() -> Any:
    return make_pair("llama", "qwen2", threshold=0.4).to(DEVICE)


def assert_naive(model: Any, rows: list[list[int]], **options: Any) -> None:
    wanted = {**GREEDY, "eos_token_id": [2, 9], "return_dict_in_generate": True, **options}
    assert_sequences(model.generate(**on_device(rows), **wanted), rows, naive_texts(model, rows, 20, (2, 9)))


def on_device(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in left_padded(rows).items()}


@pytest.mark.parametrize("max_drafts", [None, 0])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("lengths", [(9,), ROWS])
def test_sequences_are_those_of_the_naive_loop(placed, lengths, cache, max_drafts):
    assert_naive(placed, random_prompts(lengths), cache_implementation=cache, max_drafts=max_drafts)


def test_passes_that_were_recorded_serve_other_texts(placed):
    """A graph reads and writes the same addresses again: what an earlier text has left there must not be seen."""
    for seed, lengths in enumerate((ROWS, (4, 4, 2, 3), (30, 2, 1, 9), ROWS)):
        assert_naive(placed, random_prompts(lengths, seed), cache_implementation="static")


@pytest.mark.skipif(not DEVICE.startswith("cuda"), reason="the bench is tested on a CPU elsewhere")
def test_the_bench_measures_the_time_of_the_device():
    model = make_pair("llama", "qwen2", router="confidence").to(DEVICE)
    sizes = {"prompt_length": 8, "max_new_tokens": 8, "repeats": 2}
    report = bench(model, "pair", shares=(0.5,), cache_implementation="static", **sizes)
    assert report["complete"] and report["machine"]["device"].startswith("cuda")
    assert all(min(row["seconds"]) > 0 for row in report["rows"])
