"""When the LLM is called: measured times, acceptance by score, and the value of one more draft."""

import math
import random

import pytest

from citer_hf.model.schedule import LEAST_RATIO, Durations, Pace


@pytest.mark.parametrize(("base", "slope"), [(2.0, 0.0), (1.0, 0.25), (0.0, 1.0)])
def test_the_time_of_a_pass_is_a_line_through_what_was_measured(base, slope):
    durations, rng = Durations(), random.Random(0)
    assert durations.of(5) == 0.0
    for _ in range(200):
        tokens = rng.randint(1, 40)
        durations.add(base + slope * tokens, tokens)
    for tokens in (1, 10, 40):
        assert durations.of(tokens) == pytest.approx(base + slope * tokens, rel=1e-3)
    assert durations.overhead() == pytest.approx(base / slope if slope else math.inf, abs=1e-3)


def test_times_of_today_count_more_than_those_of_long_ago():
    durations = Durations()
    for seconds in (1.0, 2.0):
        for _ in range(200):
            durations.add(seconds, 1)
    assert durations.of(1) == pytest.approx(2.0, rel=0.05)


def test_acceptance_starts_at_a_guess_and_is_learnt_by_score():
    pace = Pace()
    assert pace.acceptance(True, 0.3) == 0.5 and pace.acceptance(False, 0.9) == 0.98
    for _ in range(100):
        pace.judge(True, 0.1, False)
        pace.judge(True, 0.95, True)
    assert pace.acceptance(True, 0.1) < 0.1 and pace.acceptance(True, 0.95) > 0.9
    assert pace.acceptance(False, 0.95) == 0.98, "of tokens that are not flagged nothing was learnt"


def test_an_llm_that_was_not_measured_or_hardly_takes_longer_is_taken_for_a_slow_one():
    pace, slow = Pace(), Pace(fixed_ratio=float(LEAST_RATIO))
    pace.steps.add(1.0, 1)
    for expected in (1.0, 5.0, 20.0):
        both = [one.call_is_due([0.5], 3, 3.0, 4, expected) for one in (pace, slow)]
        assert both[0] == both[1]
    pace.calls.add(1.5, 4)
    assert pace.call_is_due([0.5], 3, 3.0, 4, 5.0) == slow.call_is_due([0.5], 3, 3.0, 4, 5.0)


def test_drafts_of_many_sequences_are_fewer_where_the_llm_is_bound_by_arithmetic():
    due = []
    for slope in (0.0, 0.5):
        pace = Pace()
        pace.steps.add(1.0, 8)
        for tokens in (8, 64, 256):
            pace.calls.add(20.0 + slope * tokens, tokens)
        due.append(pace.call_is_due([0.3] * 8, 3, 3.0, 32, 20.0))
    assert due == [False, True]
