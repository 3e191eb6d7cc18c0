"""How a sequence chooses its tokens, with either model, and when it ends."""

import copy
import re
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

# Processors of transformers that look at logits alone: many positions are processed in one call.
READ_NO_TEXT = re.compile(
    "(Epsilon|Eta|MinP|Temperature|TopH|TopK|TopP|Typical)LogitsWarper|LogitNormalization"
    "|(InfNanRemove|SuppressTokens)LogitsProcessor"
)
# Processors of transformers that look at one sequence's logits and text, and at nothing else.
READ_TEXT = re.compile(
    "ExponentialDecayLengthPenalty|(Forced[BE]OSToken|Min(NewTokens)?Length|NoBadWords|NoRepeatNGram|RepetitionPenalty"
    "|SequenceBias|SuppressTokensAtBegin)LogitsProcessor"
)


class Stops:
    """When a sequence ends; length and end tokens are looked at without a tensor.

    Args:
        max_length: Most tokens, the prompt's included.
        end_tokens: Ids of end tokens.
        others: Further criteria, which see settled tokens only.
    """

    def __init__(self, max_length: int, end_tokens: Any = (), others: StoppingCriteriaList | None = None):
        self.max_length, self.end_tokens = max_length, frozenset(end_tokens)
        self.others = StoppingCriteriaList() if others is None else others

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> "Stops":
        """Sort the stopping criteria of a call of `generate`."""
        end_tokens: set[int] = set()
        lengths, others = [], StoppingCriteriaList()
        for one in criteria:
            if type(one) is MaxLengthCriteria:
                lengths.append(one.max_length)
            elif type(one) is EosTokenCriteria:
                end_tokens.update(one.eos_token_id.tolist())
            else:
                others.append(one)
        return cls(min(lengths), end_tokens, others)

    def reached(self, length: int, token: int) -> bool:
        """Return True if a sequence of this length with this last token ends, whatever other criteria give."""
        return length >= self.max_length or token in self.end_tokens

    @property
    def look_at_one_sequence(self) -> bool:
        """Whether all criteria look at a sequence's own tokens and the clock alone."""
        # Without end tokens, transformers does not pad sequences that have ended: they go on until all have.
        known = all(type(one) in (MaxTimeCriteria, StopStringCriteria) for one in self.others)
        return known and (bool(self.end_tokens) or not self.others)


@dataclass
class Choice:
    """How one sequence chooses: processors, and for sampling a generator of its own.

    Both models choose with the same exponential noise E: the largest p / E is a draw from p (arXiv 2408.07978). The
    noise of a place is drawn once, so that the text does not depend on drafts that were dropped.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    generator: torch.Generator | None = None
    _noise: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _drawn: int = 0

    @property
    def reads_no_text(self) -> bool:
        return all(READ_NO_TEXT.fullmatch(type(one).__name__) for one in self.processors)

    def log_noise(self, place: int, like: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the noise for the token at a place, counted from the first generated one."""
        assert self.generator is not None
        while self._drawn <= place:
            noise = torch.empty_like(like).exponential_(generator=self.generator).log_()
            self._noise[self._drawn] = noise, self.generator.get_state()
            self._drawn += 1
        return self._noise[place][0]

    def forget(self, place: int) -> None:
        """Drop the noise of a settled token; `state` is the generator's after it."""
        if self.generator is not None:
            self.state = self._noise.pop(place)[1]

    def drop_noise(self) -> None:
        """Drop the noise of drafts, when no more tokens come."""
        self._noise.clear()


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator of a device that `torch.manual_seed` seeds."""
    if device.type == "cpu":
        return torch.default_generator
    return getattr(torch, device.type).default_generators[device.index or 0]


def processed(
    choices: Several[Choice], prefixes: Several[torch.Tensor], logits: torch.Tensor
) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Return processed logits `[positions, vocabulary]`, and the errors of positions whose processors raise.

    Each position has a choice and a prefix `[1, length]`.
    """
    first, errors = choices[0].processors, dict[int, Exception]()
    if all(choice.processors is first for choice in choices) and choices[0].reads_no_text:
        return first(prefixes[0].expand(len(logits), -1), logits.clone()), errors
    rows = list(torch.split(logits.clone(), 1))
    for index, (choice, prefix) in enumerate(zip(choices, prefixes, strict=True)):
        try:
            rows[index] = choice.processors(prefix, rows[index])
        except Exception as error:  # a user's own code: it ends its own sequence
            errors[index] = error
    return torch.cat(rows), errors


def chosen(choices: Several[Choice], places: Several[int], scores: torch.Tensor) -> torch.Tensor:
    """Return the token of each position, the likeliest or a draw: `[positions]`."""
    if any(choice.generator is not None for choice in choices):
        nothing = scores.new_zeros(())
        noise = [
            nothing.expand_as(one) if choice.generator is None else choice.log_noise(place, one)
            for choice, place, one in zip(choices, places, scores, strict=True)
        ]
        scores = scores - torch.stack(noise)
    return scores.argmax(dim=-1)


class InexactError(ValueError):
    """A setting that cannot be followed exactly with what is known of the LLM's probabilities."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def looks_at_one_sequence(processor: Any, batch: int) -> bool:
    """Return True if a processor may be asked about any position of one sequence, in any order.

    Those of transformers are known. One of your own may look across a batch; with a single sequence it cannot.
    """
    if type(processor).__module__.partition(".")[0] == "transformers":
        return any(names.fullmatch(type(processor).__name__) for names in (READ_NO_TEXT, READ_TEXT))
    return batch == 1


def processors_of(processors: LogitsProcessorList, index: int) -> LogitsProcessorList:
    """Return the processors of a batch as one of its sequences sees them."""
    own = []
    for one in processors:
        ignored = getattr(one, "prompt_ignore_length", None)
        if type(one) is RepetitionPenaltyLogitsProcessor and isinstance(ignored, torch.Tensor):
            one = copy.copy(one)
            one.prompt_ignore_length = ignored[index : index + 1]
        own.append(one)
    same = all(one is other for one, other in zip(own, processors, strict=True))
    return processors if same else LogitsProcessorList(own)
