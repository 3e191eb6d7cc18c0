"""Both models read the reference answers once: cases 1 and 2 need nothing else (CITER, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from citer_hf.data.tokens import Encoded
from citer_hf.model.routers import top_logprobs

__all__ = ["BOTH_WRONG", "LLM_RIGHT", "SLM_RIGHT", "TOP_LOGPROBS", "ForcedText", "read_references"]

SLM_RIGHT, LLM_RIGHT, BOTH_WRONG = 1, 2, 3
TOP_LOGPROBS = 8
# Positions whose log-probabilities over the whole vocabulary are in memory at once.
SLICE = 2048


@dataclass(frozen=True)
class ForcedText:
    """What the models say along one reference answer, before each of its tokens."""

    hidden: torch.Tensor
    top_logprobs: torch.Tensor
    reference: torch.Tensor
    slm_token: torch.Tensor
    llm_token: torch.Tensor
    slm_logprob: torch.Tensor
    llm_logprob: torch.Tensor
    score: torch.Tensor

    @property
    def case(self) -> torch.Tensor:
        """1 where the SLM's token is the reference, else 2 where the LLM's is, else 3; int `[tokens]`."""
        case = torch.where(self.llm_token == self.reference, LLM_RIGHT, BOTH_WRONG)
        return torch.where(self.slm_token == self.reference, SLM_RIGHT, case)


@torch.inference_mode()
def read_references(model: Any, batch: Sequence[Encoded]) -> list[ForcedText]:
    """Let each model read prompts and reference answers in one forward pass."""
    texts = [one.prompt_ids + one.response_ids for one in batch]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.slm.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=ids.device)
    positions = torch.arange(width, device=ids.device)[None]
    # The state before a token decides about it; nothing before the shortest prompt's last token decides anything.
    first = min(len(one.prompt_ids) for one in batch) - 1
    kept = width - first
    rows = torch.tensor([row for row, one in enumerate(batch) for _ in one.response_ids], device=ids.device)
    columns = torch.tensor(
        [len(one.prompt_ids) - 1 + place for one in batch for place in range(len(one.response_ids))], device=ids.device
    )
    reference = ids[rows, columns + 1]
    inputs = {"attention_mask": mask, "position_ids": positions}
    slm = model.run_slm(ids, None, kept, **inputs)
    hidden, slm_logits = (values[rows, columns - first] for values in (slm.hidden, slm.logits))
    slm_token, slm_logprob = follow(slm_logits, reference)
    largest = top_logprobs(slm_logits, TOP_LOGPROBS)
    score = model.router(hidden, slm_logits).float()
    del slm, slm_logits
    llm_logits = model.run_llm(ids, None, kept, **inputs)
    llm_token, llm_logprob = follow(llm_logits[rows, columns - first], reference)

    hidden = hidden.to(torch.float16)
    lengths = [len(one.response_ids) for one in batch]
    columns_of = (hidden, largest.half(), reference, slm_token, llm_token, slm_logprob, llm_logprob, score)
    parts = zip(*(values.cpu().split_with_sizes(lengths) for values in columns_of), strict=True)
    forced = [ForcedText(*part) for part in parts]
    for one, text in zip(batch, forced, strict=True):
        check_finite(one, text)
    return forced


def follow(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest token at each position and the log-probability of the reference token."""
    tokens, logprobs = [], []
    for start in range(0, len(logits), SLICE):
        part, wanted = logits[start : start + SLICE], reference[start : start + SLICE, None]
        tokens.append(part.argmax(-1))
        logprobs.append(part.float().log_softmax(-1).gather(1, wanted)[:, 0])
    return torch.cat(tokens), torch.cat(logprobs)


def check_finite(question: Encoded, text: ForcedText) -> None:
    """Refuse hidden states and log-probabilities that are not numbers."""
    for name, values in (("hidden states", text.hidden), ("log-probabilities", text.slm_logprob + text.llm_logprob)):
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"model: NaN or infinite {name} at the example {question.example.id!r} (row {question.example.row}). "
                "Hidden states are kept in fp16, up to 65504. Load the pair in a precision that it was trained for, "
                "such as dtype='bfloat16', and check its weights."
            )
