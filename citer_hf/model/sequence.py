"""One text in the making: what is drafted, what is settled, and where both models stand in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .routers import SLM_ALONE
from .sampling import Choice, Stops

# Most unsettled tokens of a sequence: streams flow, and a catch-up has a bound.
MOST_DRAFTS = 32


class Draft(NamedTuple):
    """A drafted token whose verdict is open; `kept` are the SLM's raw and processed logits, if asked for."""

    flagged: bool
    score: float
    kept: tuple[torch.Tensor, ...] = ()


class Settled(NamedTuple):
    """A settled token: its score, who decided, whether the LLM agreed with a flagged draft, the decider's logits."""

    score: float
    to_llm: bool = False
    vetoed: bool = False
    agreed: bool = False
    kept: tuple[torch.Tensor, ...] = ()


@dataclass(eq=False)
class Sequence:
    """One text in the making. Places count all its tokens in the caches, the prompt's padding included.

    Args:
        tokens: Token ids from the place `origin` on, of which each model has processed what `seen` says.
        stops: When the sequence ends.
        threshold: The SLM's token stands where its score reaches this.
        veto: The LLM takes back a token to which it gives less than this part of its best token's probability.
        max_drafts: Most flagged tokens to draft past before the LLM is called; `None`: the schedule decides.
        choice: How tokens are chosen.
        on_settled: Called with the sequence after every settled token.
        keeps_logits: Whether the record keeps raw and processed logits.
        prompt: What processors and criteria see before the generated tokens, `[1, tokens]`; default: `tokens`.
        origin: Place of the first token in `tokens`.
        first: First place that is no padding.
        positions: Of `tokens`, where they are not places.
        shown: Whether each place of the prompt is seen, where some are not.
        slot: Which slot it gets; default: any.
        seen: Up to which place each model, "slm" and "llm", has processed its tokens; default: `origin`.
    """

    tokens: list[int]
    stops: Stops
    threshold: float
    veto: float = 0.0
    max_drafts: int | None = None
    choice: Choice = field(default_factory=Choice)
    on_settled: Callable[["Sequence"], None] | None = None
    keeps_logits: bool = False
    prompt: torch.Tensor | None = None
    origin: int = 0
    first: int = 0
    positions: list[int] | None = None
    shown: list[bool] | None = None

    slot: int = -1
    # How many first tokens of the prompt the slots held already.
    shared: int = field(default=0, init=False)
    seen: dict[str, int] = field(default_factory=dict)
    record: list[Settled] = field(default_factory=list, init=False)
    drafts: list[Draft] = field(default_factory=list, init=False)
    # Of each model: from which place to which its passes went in which the sequence took part.
    passes: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"slm": [], "llm": []}, init=False)
    survival: float = field(default=1.0, init=False)
    finished: bool = field(default=False, init=False)
    error: BaseException | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.begin = self.end
        self.seen = self.seen or dict.fromkeys(("slm", "llm"), self.origin)
        if self.threshold == SLM_ALONE:
            self.veto = 0.0
        if self.prompt is None:
            self.prompt = torch.tensor([self.tokens])
        if self.positions is None:
            self.positions = list(range(self.origin, self.end))

    @property
    def end(self) -> int:
        """The place behind the last token, drafts included."""
        return self.origin + len(self.tokens)

    @property
    def length(self) -> int:
        """Number of tokens of the prompt, as criteria count it, and of all generated ones, drafts included."""
        return self.prompt.shape[1] + self.end - self.begin  # type: ignore[union-attr]

    @property
    def generated(self) -> list[int]:
        """The settled tokens."""
        return self.tokens[self.begin - self.origin : len(self.tokens) - len(self.drafts)]

    @property
    def last(self) -> int:
        """The last settled token."""
        return self.tokens[len(self.tokens) - len(self.drafts) - 1]

    @property
    def needs_verdict(self) -> bool:
        """Whether the SLM has drafted past as many flagged tokens as it may."""
        return self.max_drafts is not None and sum(draft.flagged for draft in self.drafts) > self.max_drafts

    @property
    def may_draft(self) -> bool:
        """Whether the SLM may write another token before the LLM has its word."""
        if not self.drafts:
            return True
        if len(self.drafts) >= MOST_DRAFTS or self.needs_verdict:
            return False
        return not self.stops.reached(self.length, self.tokens[-1])

    def unread(self, role: str) -> int:
        """Return how many tokens the SLM has to process for the next token, or the LLM for its verdicts."""
        return self.end - (role == "llm") - self.seen[role]

    def prefix(self, count: int) -> torch.Tensor:
        """Return the prompt and the first generated tokens, `[1, tokens]`."""
        assert self.prompt is not None
        start = self.begin - self.origin
        return torch.cat([self.prompt, self.prompt.new_tensor([self.tokens[start : start + count]])], dim=1)

    def position(self, start: int, end: int) -> list[int]:
        """Return the positions of the tokens at these places: behind the prompt, they go on by one."""
        known = self.positions or [-1]
        given, last = known[start - self.origin : end - self.origin], known[-1] + 1 - self.begin
        return given + [last + place for place in range(max(start, self.begin), end)]

    def shares(self, other: "Sequence", least: int) -> int:
        """Return how many first tokens of the prompt another sequence has at the same places, if at least so many."""
        if self.begin - self.origin <= least:
            return 0
        alike = (self.origin, self.first, self.shown) == (other.origin, other.first, None)
        if not alike or self.position(self.origin, self.origin + 1) != other.position(other.origin, other.origin + 1):
            return 0
        # The last token of a prompt is always processed: it gives the logits of the first new one.
        pairs = zip(self.tokens[: self.begin - self.origin - 1], other.tokens, strict=False)
        count = next((index for index, (own, their) in enumerate(pairs) if own != their), None)
        same = min(self.begin - self.origin - 1, len(other.tokens)) if count is None else count
        return same if same >= least else 0
