"""How many rows should wait for the LLM before it is called: the policy of batches."""

from collections.abc import Callable
from functools import lru_cache, partial
from math import comb, sqrt
from numbers import Real
from typing import Any

# Takes the number of unfinished rows, the LLM share seen so far, and the time of an SLM step over that of an LLM call;
# returns how many waiting rows trigger a call.
WaitingPolicy = Callable[[int, float, float], int]

# Rows that wait make the others' text longer than theirs. Up to this many SLM steps per token the text of the slowest
# row, and so the answer to the whole batch, is not held up by more than the LLM calls saved are worth.
MOST_SLM_STEPS = 1.45
# A row that lags by this many tokens, over the square root of the number of rows, counts for two: the more rows, the
# further the last of them lags.
LAG = 40
# Beyond this, what is best grows in proportion, and predicting it would take longer than it saves.
MOST_ROWS = 16
# Rows that part end one after the other, which takes SLM steps for fewer and fewer of them: played with dice, about
# six more, and one for twenty positions. And parting must promise more than it costs.
LAST_STEPS, DRIFT = 6, 0.05
MARGIN = 1.08
# With an SLM step this dear, one call less is worth an SLM step more only as long as both are about as frequent.
DEAREST_STEP = 0.3
# Seconds. What shorter calls of the LLM take is overhead of the host and noise, and says little of the models: the
# SLM is then taken for the cheaper one, as it is in every pair that is worth routing.
SHORTEST_CALL, CHEAPER = 3e-3, 0.9


def waiting_policy(waiting_rows: int | WaitingPolicy | None) -> WaitingPolicy | None:
    if waiting_rows is None:
        return None
    if callable(waiting_rows):
        return partial(answer_of, waiting_rows)
    if isinstance(waiting_rows, bool) or not isinstance(waiting_rows, int) or waiting_rows < 1:
        raise ValueError(
            "waiting_rows: expected how many rows wait for the LLM before it is called, 1 (lock-step) or more, or a "
            "function of (unfinished rows, LLM share, time of an SLM step over that of an LLM call), got "
            f"{waiting_rows!r}. Leave it out for the measured default."
        )
    return lambda unfinished, llm_share, step_ratio: waiting_rows


def answer_of(policy: WaitingPolicy, unfinished: int, llm_share: float, step_ratio: float) -> int:
    enough: Any = policy(unfinished, llm_share, step_ratio)
    if not isinstance(enough, Real):
        raise ValueError(
            f"waiting_rows: expected a function that returns a number of rows, got {enough!r} for "
            f"({unfinished}, {llm_share:.3g}, {step_ratio:.3g}). Return 1 for lock-step."
        )
    return enough  # type: ignore[return-value]


def rows_to_wait_for(
    unfinished: int, llm_share: float, step_ratio: float, growth: float = 0.0, length: int = 512
) -> int:
    """Choose how many waiting rows trigger a call of the LLM; 1 is lock-step."""
    if unfinished > MOST_ROWS:
        return round(rows_to_wait_for(MOST_ROWS, llm_share, step_ratio, growth, length) * unfinished / MOST_ROWS)
    # Steps of 0.02 and of 0.05, so that few predictions are ever made.
    share = min(max(round(llm_share * 50), 1), 49) / 50
    return _cheapest(unfinished, share, max(round(step_ratio * 20), 1) / 20, round(growth * 20) / 20, length)


@lru_cache(maxsize=4096)
def _cheapest(unfinished: int, share: float, step_ratio: float, growth: float, length: int) -> int:
    options = [passes_per_position(unfinished, waiting, share) for waiting in range(1, unfinished + 1)]
    lock_step = step_ratio + (1 - growth) * options[0][0] + growth
    weight, at_the_end = min(step_ratio, DEAREST_STEP), LAST_STEPS / length + DRIFT
    allowed = [
        waiting
        for waiting, (calls, steps) in enumerate(options, 1)
        if steps <= MOST_SLM_STEPS and (step_ratio * (steps + at_the_end) + calls + growth) * MARGIN <= lock_step
    ]
    return min(allowed, key=lambda waiting: weight * options[waiting - 1][1] + options[waiting - 1][0], default=1)


class Pace:
    """How long an SLM step and a call of the LLM take."""

    def __init__(self) -> None:
        self._slm, self._llm = Durations(), Durations()

    def note(self, model: str, seconds: float, tokens: int = 1) -> None:
        (self._slm if model == "slm" else self._llm).add(seconds, tokens)

    def note_writing(self, seconds: float) -> None:
        """Add what choosing and writing tokens took, which every SLM step is followed by."""
        self._slm.lengthen(seconds)

    @property
    def ratio(self) -> float:
        """Time of an SLM step over time of an LLM call that reads as many tokens."""
        if not (self._slm.count and self._llm.count):
            return 0.1
        ratio = self._slm.of_one_token() / self._llm.of_one_token()
        return min(ratio, CHEAPER) if self._llm_is_tiny else ratio

    @property
    def growth(self) -> float:
        """What a call of the LLM takes more for another token of each row, as a part of one that reads one token."""
        if not self._llm.count or self._llm_is_tiny:
            return 0.0
        return self._llm.of_another_token() / self._llm.of_one_token()

    @property
    def _llm_is_tiny(self) -> bool:
        return self._llm.of_one_token() < SHORTEST_CALL


class Durations:
    """Running sums of how long passes over different numbers of tokens took, and the straight line through them."""

    def __init__(self) -> None:
        self.count = 0
        self._seconds = self._tokens = self._squares = self._products = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self.count += 1
        self._seconds += seconds
        self._tokens += tokens
        self._squares += tokens * tokens
        self._products += tokens * seconds

    def lengthen(self, seconds: float) -> None:
        """Add to what passes over one token took."""
        self._seconds += seconds
        self._products += seconds

    def of_another_token(self) -> float:
        """Return the seconds that another token takes: none, where it is not known, and at most a token's part."""
        seconds, tokens = self._seconds / self.count, self._tokens / self.count
        spread = self._squares / self.count - tokens * tokens
        slope = (self._products / self.count - tokens * seconds) / spread if spread > 0 else 0.0
        return min(max(slope, 0.0), seconds / tokens)

    def of_one_token(self) -> float:
        seconds, tokens = self._seconds / self.count, self._tokens / self.count
        return seconds - self.of_another_token() * (tokens - 1)


def pressure(waiting: list[int], unfinished: list[int]) -> float:
    """Count waiting rows, those that lag behind for more than one and those that are ahead for less."""
    mean, weight = sum(unfinished) / len(unfinished), sqrt(len(unfinished)) / LAG
    return sum(min(max(1 + (mean - written) * weight, 0.0), 6.0) for written in waiting)


@lru_cache(maxsize=4096)
def passes_per_position(rows: int, waiting: int, llm_share: float) -> tuple[float, float]:
    """Predict LLM calls and SLM steps per position of the text, where each token is the LLM's independently."""
    # Rows only ever join those that wait, so that one pass over the states is enough.
    visits = [1.0] + [0.0] * (waiting - 1)
    for already in range(waiting):
        moving = rows - already
        visits[already] /= 1 - (1 - llm_share) ** moving
        for joining in range(1, waiting - already):
            odds = comb(moving, joining) * llm_share**joining * (1 - llm_share) ** (moving - joining)
            visits[already + joining] += visits[already] * odds
    steps = sum(visits)
    moved = sum(count * (rows - already) for already, count in enumerate(visits))
    return rows / moved, steps * rows / moved
