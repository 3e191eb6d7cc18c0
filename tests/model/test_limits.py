"""Every row of a batch has its own `max_new_tokens`, `max_length` and `max_time`, also when rows part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import left_padded, make_pair, random_prompts
from tests.reference import naive_generate

LENGTHS = (3, 12, 7, 5, 9)
# No token that the naive loop or the pair would end at.
ENDLESS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}


@pytest.mark.parametrize("waiting", [1, None, 2, 5])
@pytest.mark.parametrize("limit", [{"max_new_tokens": 17}, {"max_length": 12 + 17}, {"max_new_tokens": 1}])
def test_every_row_gets_exactly_as_many_tokens_as_it_may(pair, limit: dict[str, int], waiting: int | None) -> None:
    rows = random_prompts(LENGTHS)
    output = pair.generate(**left_padded(rows), **limit, **ENDLESS, waiting_rows=waiting)
    count = limit.get("max_new_tokens", 17)
    # `max_length` counts the padding, in transformers too.
    assert output.sequences.shape == (5, 12 + count)
    assert output.past_key_values.routing.unfinished.tolist() == [[True] * count] * 5
    for row, text in zip(rows, output.sequences, strict=True):
        expected, *_ = naive_generate(pair, row, count, pair.config.router_threshold, eos=())
        assert text[12:].tolist() == expected


def test_the_limit_is_a_rows_own_when_others_end_early(pair) -> None:
    rows = random_prompts(LENGTHS)
    expected = [naive_generate(pair, row, 30, pair.config.router_threshold, eos=(9, 14))[0] for row in rows]
    assert {len(text) for text in expected} > {30}, "some rows must reach the limit, and some end before"
    output = pair.generate(**left_padded(rows), **{**ENDLESS, "eos_token_id": [9, 14]}, max_new_tokens=30)
    for text, wanted in zip(output.sequences, expected, strict=True):
        assert text[12:].tolist() == wanted + [0] * (30 - len(wanted))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a pair whose forward passes take a second each on the clock that `max_time` reads, and those passes."""
    pair, done = make_pair(hidden_size=48), []
    for model in (pair.slm, pair.llm):
        forward = model.forward

        def timed(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            done.append(1)
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", timed)
    clock = SimpleNamespace(time=lambda: float(len(done)))
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", clock)
    return pair, done


@pytest.mark.parametrize("eos", [None, [2]])
@pytest.mark.parametrize("lengths", [(6,), LENGTHS])
@pytest.mark.parametrize("waiting", [1, None, 3])
def test_when_the_time_is_up_every_row_stops_soon(
    passes: Any, lengths: tuple[int, ...], waiting: int | None, eos: Any
) -> None:
    pair, done = passes
    rows = random_prompts(lengths)
    wanted = {**ENDLESS, "eos_token_id": eos, "waiting_rows": waiting}
    full = pair.generate(**left_padded(rows), **wanted, max_new_tokens=100)
    done.clear()
    output = pair.generate(**left_padded(rows), **wanted, max_new_tokens=100, max_time=40.0)
    # Of every row the token that it is at, by one pass of each model; then one over what ended rows have not read.
    assert 40 < len(done) <= 40 + 4
    width = max(lengths)
    unfinished = output.past_key_values.routing.unfinished
    for row in range(len(rows)):
        length = int(unfinished[row].sum())
        assert 0 < length < 100
        assert torch.equal(output.sequences[row, : width + length], full.sequences[row, : width + length])
        assert not output.sequences[row, width + length :].any()
