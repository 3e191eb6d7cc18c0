"""When to call the LLM: measured times, running acceptance, and the marginal value of one more draft."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# An LLM that is slower than its SLM is taken for at least so many times as slow: before its first call, and where
# models are so small that calls take mostly overhead.
LEAST_RATIO = 12
# A pass takes at least as long as so many more tokens would.
OVERHEAD = 32
# What was measured long ago counts less: sequences grow, and other work comes and goes.
FADING_TIMES, FADING_VERDICTS = 0.98, 0.995
# Verdicts on tokens of like scores count as soon as there are more than so many.
WEIGHT = 2.0


def kind_of(score: float) -> int:
    """Return which scores are alike: the distance to 1 halves from one kind to the next."""
    # A score that is no number is like one of 0: who compares it says so.
    return int(-math.log2(max(1 - score, 1e-3))) if score == score else 0


class Durations:
    """Running sums of how long passes over different numbers of tokens took, and the straight line through them."""

    def __init__(self) -> None:
        self.count = self._seconds = self._tokens = self._squares = self._products = 0.0

    def add(self, seconds: float, tokens: float) -> None:
        """Add a pass over so many tokens."""
        new = (1.0, seconds, tokens, tokens * tokens, tokens * seconds)
        old = (self.count, self._seconds, self._tokens, self._squares, self._products)
        faded = [FADING_TIMES * before + now for before, now in zip(old, new, strict=True)]
        self.count, self._seconds, self._tokens, self._squares, self._products = faded

    def of(self, tokens: float) -> float:
        """Return the seconds of a pass over so many tokens, 0 before anything was measured."""
        return self._base() + self._slope() * tokens if self.count else 0.0

    def overhead(self) -> float | None:
        """Return how many more tokens take as long as a pass does beside its tokens; `None` if that is not known."""
        if self.count < 4 or self._spread() < 1e-9:
            return None
        return self._base() / self._slope() if self._slope() > 0 else math.inf

    def _spread(self) -> float:
        return self._squares / self.count - (self._tokens / self.count) ** 2

    def _base(self) -> float:
        return (self._seconds - self._slope() * self._tokens) / self.count

    def _slope(self) -> float:
        seconds, mean, spread = self._seconds / self.count, self._tokens / self.count, self._spread()
        slope = (self._products / self.count - mean * seconds) / spread if spread > 1e-9 else 0.0
        # Another token takes no less than nothing, and no more than its part.
        return min(max(slope, 0.0), seconds / mean)


# Time of an LLM call over that of an SLM step, where a model is divided among processes.
SHARED_RATIO = 10.0


@dataclass
class Pace:
    """Times and acceptances, as far as they are known. They decide when the LLM is called, and never the text.

    Args:
        fixed_ratio: Time of an LLM call over that of an SLM step, where times are not to be measured: the same work
            is then done in the same passes.
    """

    fixed_ratio: float | None = None
    steps: Durations = field(default_factory=Durations)
    calls: Durations = field(default_factory=Durations)
    # Accepted and judged, of flagged tokens and of others: all, and those of like scores.
    _all: dict[bool, list[float]] = field(default_factory=lambda: {True: [1.0, 2.0], False: [49.0, 50.0]})
    _alike: dict[tuple[bool, int], list[float]] = field(default_factory=dict)

    def judge(self, flagged: bool, score: float, accepted: bool) -> None:
        """Note the LLM's verdict on a drafted token."""
        for counts in (self._all[flagged], self._alike.setdefault((flagged, kind_of(score)), [0.0, 0.0])):
            counts[0], counts[1] = FADING_VERDICTS * counts[0] + accepted, FADING_VERDICTS * counts[1] + 1

    def acceptance(self, flagged: bool, score: float) -> float:
        """Return the probability that the LLM accepts a drafted token."""
        accepted, judged = self._all[flagged]
        alike, count = self._alike.get((flagged, kind_of(score)), (0.0, 0.0))
        return (alike + WEIGHT * accepted / judged) / (count + WEIGHT)

    def call_is_due(self, survivals: Sequence[float], steps: int, spent: float, tokens: int, expected: float) -> bool:
        """Return True if calling the LLM now is worth more than one more draft of every sequence.

        Args:
            survivals: Of each sequence that could go on: the probability that all its unsettled tokens hold.
            steps: SLM steps since the last call.
            spent: Seconds that they took.
            tokens: Tokens that the LLM would process.
            expected: Tokens that this cycle is expected to settle.
        """
        if self.fixed_ratio is not None:
            more, call, spent = 1.0, self.fixed_ratio, float(steps)
        else:
            step, call = self.steps.of(len(survivals)), self.calls.of(tokens)
            # The LLM processes what is drafted.
            more = step + self.calls.of(tokens + len(survivals)) - call
            call = call if 0 < call < step else max(call, LEAST_RATIO * step)
        return sum(survivals) * (spent + call) <= expected * more

    def overhead(self) -> float:
        """Return how many more tokens take as long as a pass does beside its tokens."""
        measured = None if self.fixed_ratio is not None else self.calls.overhead()
        return max(OVERHEAD, measured or 0)
