"""The costs of a step: measured, interpolated, and the break-even share that follows."""

import pytest

from citer_hf import CiterForCausalLM
from citer_hf.bench.contenders import count_passes
from citer_hf.bench.cost_curve import CostCurve, measure_curve
from tests.conftest import make_pair


def curve(slm_step: float, sequences: int = 1, per_token: float = 0.0) -> CostCurve:
    llm = {size: 1.0 + per_token * (size - 1) for size in (1, 2, 3, 4, 8, 16, 32)}
    return CostCurve(128, sequences, slm_step, llm)


def test_break_even_is_what_the_slm_leaves_when_tokens_are_free() -> None:
    # slm + p·llm = llm at p = 1 - slm/llm.
    assert curve(0.1).break_even() == pytest.approx(0.9, abs=2e-3)
    # In lock-step the LLM runs when any of four sequences needs it.
    assert curve(0.1, sequences=4).break_even() == pytest.approx(1 - 0.1**0.25, abs=2e-3)


def test_break_even_counts_the_tokens_of_a_catch_up() -> None:
    # With llm(k) = 1 + a·(k - 1) and mean 1/p: slm + p + a·(1 - p) = 1 at p = 1 - slm/(1 - a).
    assert curve(0.1, per_token=0.2).break_even() == pytest.approx(1 - 0.1 / 0.8, abs=2e-3)
    assert curve(0.1, per_token=0.2).seconds_per_token(0.01) == pytest.approx(0.1 + 0.01 + 0.2 * 0.99)
    assert curve(0.1, per_token=0.2).seconds_per_token(0) == 0.1


def test_there_is_no_break_even_where_the_slm_costs_more() -> None:
    assert curve(1.2).break_even() is None and "at no LLM share" in str(curve(1.2))


def test_costs_are_linear_between_measured_lengths_and_beyond() -> None:
    costs = CostCurve(128, 1, 0.1, {1: 1.0, 2: 3.0, 8: 2.0, 32: 4.4})
    assert [costs.llm_seconds(size) for size in (1, 2, 5, 8, 20, 32, 42)] == pytest.approx(
        [1, 3, 2.5, 2, 3.2, 4.4, 5.4]
    )


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_every_length_is_timed_behind_the_same_cache(family: str) -> None:
    model = make_pair(slm=family, llm=family)
    with count_passes(model) as (slm, llm):
        measured = measure_curve(model, prompt_length=9, sequences=2)
    assert list(measured.llm) == [1, 2, 3, 4, 8, 16, 32] and all(time > 0 for time in measured.llm.values())
    prompt, *timed = llm
    assert prompt == (2, 9, 0) and {(sequences, context) for sequences, _, context in timed} == {(2, 9)}
    assert {tokens for _, tokens, _ in slm[1:]} == {1} and measured.slm_step > 0


@pytest.mark.usefixtures("small_machine")
def test_lengths_end_with_the_context(pair: CiterForCausalLM) -> None:
    assert list(measure_curve(pair, prompt_length=240, sequences=1, longest=16).llm) == [1, 2, 3, 4, 8, 16]
    # Absolute positions: there is none for another token.
    measured = measure_curve(make_pair("gpt2", "gpt2"), prompt_length=255, sequences=1, longest=1)
    assert list(measured.llm) == [1]
    assert measured.seconds_per_token(0.5) == pytest.approx(measured.slm_step + 0.5 * measured.llm[1])
