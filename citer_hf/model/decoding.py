"""What one call of `generate` asks for, and what the loops over one row and over many share."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from .cache import CiterCache
from .compat import CACHE, CiterGenerateOutput


class Stops:
    """When a text ends; the two usual reasons are looked at without a call and a tensor each."""

    def __init__(self, criteria: StoppingCriteriaList):
        self.max_length = min(one.max_length for one in criteria if type(one) is MaxLengthCriteria)
        self.end_tokens: set[int] = set()
        self.others = StoppingCriteriaList()
        for one in criteria:
            if type(one) is EosTokenCriteria:
                self.end_tokens.update(one.eos_token_id.tolist())
            elif type(one) is not MaxLengthCriteria:
                self.others.append(one)

    def reached(self, length: int, token: int) -> bool:
        return length >= self.max_length or token in self.end_tokens

    def met(self, text: torch.Tensor, scores: Any = None) -> bool:
        """Say whether the text of one row ends here for any other reason."""
        return bool(self.others) and bool(self.others(text, scores).all())


@dataclass
class Decoding:
    """One call of `generate`, up to the choice of the loop."""

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    stops: Stops
    settings: GenerationConfig
    cache: CiterCache
    threshold: float | torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    streamer: Any = None
    runs_plain_models: bool = False
    logits: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)

    @property
    def keeps_logits(self) -> bool:
        return bool(self.settings.return_dict_in_generate and self.settings.output_logits)

    @property
    def keeps_scores(self) -> bool:
        return bool(self.settings.return_dict_in_generate and self.settings.output_scores)

    def meets_criteria(self, text: torch.Tensor) -> bool:
        """Return True if a criterion other than length and end tokens ends a single sequence."""
        return self.stops.met(text, tuple(self.scores) if self.keeps_scores else None)

    def reading(self) -> Any:
        """Return the context in which the models read a token."""
        return torch.inference_mode() if self.runs_plain_models else nullcontext()

    def next_positions(self) -> torch.Tensor:
        """Return the position of each row's first new token, `[batch or 1, 1]`."""
        if self.position_ids is not None:
            return self.position_ids[:, -1:] + 1
        if self.attention_mask is not None:
            return self.attention_mask.sum(dim=1, keepdim=True)
        return torch.tensor([[self.cache.get_seq_length()]], device=self.input_ids.device)

    def result(self, text: torch.Tensor) -> CiterGenerateOutput | torch.Tensor:
        if not self.settings.return_dict_in_generate:
            return text
        return CiterGenerateOutput(
            sequences=text,
            scores=tuple(self.scores) if self.keeps_scores else None,
            logits=tuple(self.logits) if self.keeps_logits else None,
            **{CACHE: self.cache},
        )
