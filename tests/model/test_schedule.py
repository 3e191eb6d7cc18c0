"""How many sequences wait before the LLM is called."""

import itertools
import random

import pytest

from citer_hf.model.schedule import Pace, passes_per_position, pressure, rows_to_wait_for


def play(rows: int, waiting: int, share: float, steps: int = 5_000) -> tuple[float, float]:
    """LLM calls and SLM steps per position, played with dice."""
    dice, waits, calls, moved = random.Random(0), 0, 0, 0
    for _ in range(steps):
        moving = rows - waits
        moved += moving
        waits += sum(dice.random() < share for _ in range(moving))
        if waits >= waiting:
            calls, waits = calls + 1, 0
    return calls * rows / moved, steps * rows / moved


@pytest.mark.parametrize(("rows", "waiting", "share"), [(1, 1, 0.3), (8, 5, 0.2), (8, 1, 0.1), (16, 10, 0.2)])
def test_the_prediction_is_what_dice_give(rows, waiting, share):
    assert passes_per_position(rows, waiting, share) == pytest.approx(play(rows, waiting, share), rel=0.06)


@pytest.mark.parametrize("step_ratio", [0.02, 0.1, 0.3, 0.6])
def test_a_fifth_of_the_tokens_waits_for_five_rows_of_eight_and_ten_of_sixteen(step_ratio):
    assert rows_to_wait_for(8, 0.2, step_ratio) == 5
    assert rows_to_wait_for(16, 0.2, step_ratio) == 10


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_policy_stays_among_the_rows(rows):
    for share, step_ratio in itertools.product((0.0, 0.05, 0.5, 1.0), (0.0, 0.1, 1.0, 10.0)):
        assert 1 <= rows_to_wait_for(rows, share, step_ratio) <= rows


def test_nothing_waits_where_it_costs_more_than_the_calls_saved():
    assert rows_to_wait_for(8, 0.2, 5.0) == 1
    # Texts that end soon take SLM steps for few of them, and what another token costs the LLM is paid all the same.
    assert rows_to_wait_for(8, 0.2, 0.9, length=512) > 1 == rows_to_wait_for(8, 0.2, 0.9, length=32)
    assert rows_to_wait_for(16, 0.5, 0.3) > 1 == rows_to_wait_for(16, 0.5, 0.3, 0.3)


def test_rows_that_lag_behind_press_more_than_rows_that_are_ahead():
    unfinished = [10, 10, 50, 50]
    assert pressure([10], unfinished) > 1 > pressure([50], unfinished)
    assert pressure([30, 30], [30, 30, 30]) == 2


def timed(steps: list[float], calls: list[tuple[float, int]]) -> Pace:
    """What was measured, in milliseconds; of calls, also the tokens that they read."""
    pace = Pace()
    for took in steps:
        pace.note("slm", took / 1000)
    for took, tokens in calls:
        pace.note("llm", took / 1000, tokens)
    return pace


def test_longer_calls_do_not_make_the_llm_look_dearer():
    pace = timed([10, 10], [(14, 3), (16, 4), (20, 6)])
    assert pace.ratio == pytest.approx(1.0) and pace.growth == pytest.approx(0.2)
    assert rows_to_wait_for(8, 0.2, pace.ratio, pace.growth) == 1


def test_writing_is_a_part_of_the_slms_step():
    pace = timed([8, 8], [(20, 1)])
    pace.note_writing(4 / 1000)
    assert pace.ratio == pytest.approx(0.5)


def test_calls_of_one_length_tell_nothing_of_longer_ones():
    assert timed([5], [(10, 4), (10, 4)]).growth == 0


def test_times_too_short_to_tell_take_the_slm_for_the_cheaper_model():
    pace = timed([2], [(2, 1), (2.5, 3)])
    assert pace.ratio == 0.9 and pace.growth == 0
