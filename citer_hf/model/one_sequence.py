"""Decoding of one row: transformers' loop for greedy decoding and sampling, without what a pair does not need."""

from typing import Any

import torch

from .decoding import Decoding
from .routers import defer


def decode_one_row(model: Any, decoding: Decoding, logits: torch.Tensor) -> Any:
    """Write one text, token by token, each with the model that the router chooses (CITER, section 3)."""
    text = TextOfOneRow(decoding)
    while True:
        token = choose(decoding, text.so_far, logits)
        new = text.append(token)
        if decoding.streamer is not None:
            decoding.streamer.put(token.cpu())
        if decoding.stops.reached(text.length, int(token)) or decoding.meets_criteria(text.so_far):
            break
        logits = read_token(model, decoding, new, text.next_position(), text.mask)
    if decoding.streamer is not None:
        decoding.streamer.end()
    # The cache may hold views of the last tokens: the caller gets a text of his own.
    return decoding.result(text.so_far.clone())


class TextOfOneRow:
    """The text, its mask and its positions, in memory for the longest text that may come."""

    def __init__(self, decoding: Decoding):
        prompt = decoding.input_ids
        self.length = prompt.shape[1]
        room = max(decoding.stops.max_length - self.length, 1)
        self._ids = torch.cat([prompt, prompt.new_zeros((1, room))], dim=1)
        self._mask: torch.Tensor | None = None
        if decoding.attention_mask is not None:
            self._mask = torch.cat([decoding.attention_mask, decoding.attention_mask.new_ones((1, room))], dim=1)
            self._read = decoding.attention_mask.shape[1]
        self._positions = decoding.next_positions() + torch.arange(room, device=prompt.device)
        self._new = 0

    @property
    def so_far(self) -> torch.Tensor:
        """The prompt and the tokens written, `[1, length]`."""
        return self._ids.narrow(1, 0, self.length)

    @property
    def mask(self) -> torch.Tensor | None:
        """The attention mask up to the token that is read next, `[1, cached + new]`."""
        return None if self._mask is None else self._mask.narrow(1, 0, self._read + self._new)

    def append(self, token: torch.Tensor) -> torch.Tensor:
        """Add a token, and return it as the next input, `[1, 1]`."""
        place = self._ids.narrow(1, self.length, 1)
        place.copy_(token)
        self.length += 1
        return place

    def next_position(self) -> torch.Tensor:
        """Return the position of the token that was added last, `[1, 1]`."""
        position = self._positions.narrow(1, self._new, 1)
        self._new += 1
        return position


def choose(decoding: Decoding, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # A copy where others see it: they may change it.
    seen = bool(decoding.processors) or decoding.keeps_logits or decoding.keeps_scores
    raw = logits[:, -1].to(dtype=torch.float32, device=text.device, copy=seen)
    scores = decoding.processors(text, raw) if decoding.processors else raw
    if decoding.keeps_logits:
        decoding.logits.append(raw)
    if decoding.keeps_scores:
        decoding.scores.append(scores)
    if not decoding.settings.do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def read_token(
    model: Any, decoding: Decoding, token: torch.Tensor, position: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Let the SLM read one token, the router decide about the next, and the LLM catch up if it is to write that."""
    cache = decoding.cache
    inputs = {"attention_mask": mask, "position_ids": position}
    with decoding.reading():
        slm = model.run_slm(token, cache.slm, 1, **inputs)
        logits = slm.logits
        scores = model.router(slm.hidden, logits)
        to_llm = defer(scores, decoding.threshold)
        cache.add_tokens(token, position)
        if to_llm.item():
            logits = model.catch_up(token, cache, 1, **inputs)
        cache.routing.add(cache.get_seq_length(), scores, to_llm, torch.ones_like(to_llm))
    return logits
