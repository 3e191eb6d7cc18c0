"""Decoding with static caches: for GPUs, where launching a small model's kernels takes longer than running them."""

import time
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from transformers.utils import logging

from .batch import Rows, write_rows
from .batch_support import (
    criteria_are_known,
    criteria_part_rows,
    ever_mixed,
    is_known,
    processors_part_rows,
    why_not_placed,
)
from .compiled import catch_up, read_and_decide
from .decoding import Decoding
from .kv_layers import layers_can_part
from .schedule import WaitingPolicy, waiting_policy
from .static_memory import Room, Workspace, read_with_slm

logger = logging.get_logger(__name__)


def decode_static(model: Any, decoding: Decoding, logits: torch.Tensor, policy: WaitingPolicy | None = None) -> Any:
    """Write the texts of a batch, or of one row, with passes that always have the same shapes and addresses."""
    cache = decoding.cache
    longest = cache.get_seq_length() + decoding.stops.max_length - decoding.input_ids.shape[1]
    # The last token of the longest text is read by nobody.
    cache.max_cache_len = max(cache.max_cache_len or 0, longest - 1)
    if not ever_mixed(decoding.threshold):
        policy = waiting_policy(1)
    rows = decoding.input_ids.shape[0]
    with model.compiled_steps.workspace(model, decoding.settings, rows, max(cache.max_cache_len, longest)) as work:
        return write_rows(StaticRows(model, decoding, work), logits, policy)


class StaticRows(Rows):
    """Rows whose state is on the device, in a workspace; the host knows where they are and what was written."""

    def __init__(self, model: Any, decoding: Decoding, work: Workspace):
        self.work = work
        super().__init__(model, decoding)
        self._new: list[list[int]] = [[] for _ in range(self.batch)]
        # What is written where the text has to be looked at is written at once, and all at the end otherwise.
        self._text_is_read = bool(decoding.processors) or not criteria_are_known(decoding)
        # Whoever counts calls, or looks at its neighbours, is asked about what is written and nothing else.
        self._guesses = all(map(is_known, decoding.processors))
        self._guess: tuple[Any, ...] | None = None
        self._call_began: tuple[float, int] | None = None
        # The host needs the answers of criteria, and would wait for each that a device gives.
        self._text_of_host: torch.Tensor | None = None
        if decoding.stops.others and criteria_are_known(decoding):
            self._text_of_host = self.text.clone().cpu()
        work.offset.copy_((self.first_position - self.start).expand(self.batch, 1))
        threshold = torch.as_tensor(decoding.threshold, dtype=work.threshold.dtype)
        work.threshold.copy_(threshold.expand(self.batch, 1))

    def _readable_places(self) -> torch.Tensor:
        readable, mask = self.work.readable, self.decoding.attention_mask
        readable.zero_()
        readable[:, : self.start] = True if mask is None else mask[:, : self.start].bool()
        return readable

    def _room_for_rows(self, cache: Any) -> Room:  # type: ignore[override]
        name = "slm" if cache is self.cache.slm else "llm"
        return self.work.take(name, getattr(self.model, name), cache)

    def _reading(self) -> Any:
        # Recorded graphs have no operations to launch, so that inference mode has nothing to save.
        return nullcontext() if self.work.compiled else self.decoding.reading()

    def _tell(self) -> None:
        self.work.tell(
            [
                [self.start + written - 1, self.start + seen, new[-1]]
                for written, seen, new in zip(self.written, self.seen_by_llm, self._new, strict=True)
            ]
        )

    # ---- reading ------------------------------------------------------------------------------------------------

    def read_with_slm(self) -> tuple[torch.Tensor, list[int]]:
        began = time.perf_counter()
        self._tell()
        with self._reading():
            (logits, scores, to_llm, best), settled = read_and_decide(self.model, self.work)
        logits = logits[:, -1]
        moving = [row for row in self.unfinished if row not in self.waiting]
        tokens, self._guess = best[:, 0], None
        if self._guesses:
            raw = self._raw(logits)
            processed = self._processed(moving, raw)
            if self.decoding.settings.do_sample or self.decoding.processors:
                tokens = self._choose(moving, processed)
            self._guess = (raw, processed, tokens)
        # Token ids are exact in fp32 up to 16 million.
        seen = torch.stack([scores[:, 0].float(), to_llm[:, 0].float(), tokens.float()]).tolist()
        if settled:
            self.pace.note("slm", time.perf_counter() - began)
        if self._guess is not None:
            self._guess = (*self._guess, [int(token) for token in seen[2]])
        return logits, self._decided(moving, seen[0], [bool(flag) for flag in seen[1]])

    def _slm_pass(self, columns: torch.Tensor, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.text.gather(1, self.width + columns)
        with self._reading():
            logits, hidden = read_with_slm(self.model, self.work, ids, self.start + columns)
            return logits, self.model.router(hidden, logits)

    def read_with_llm(self) -> torch.Tensor:
        self._guess = None
        if self.cache.llm_length < self.start and not self._read_prompts_alone():
            self._flush()
            return self._read_prompts_with_llm()
        if self.llm_cache is None:
            self.llm_cache = self._room_for_rows(self.cache.llm)  # type: ignore[assignment]
        began = time.perf_counter()
        self._tell()
        unread = max(self.written[row] - self.seen_by_llm[row] for row in self.unfinished)
        with self._reading():
            logits, settled = catch_up(self.model, self.work, unread)
        self._note_call()
        self._call_began = (began, unread) if settled else None
        return logits

    def _decided(self, moving: list[int], scores: list[float], decisions: list[bool]) -> list[int]:
        if self.decoding.streamer is not None:
            # Who wrote a token is asked for while it is shown.
            self._note(torch.tensor([scores]), torch.tensor([decisions]), self.start + self.written[0])
        return super()._decided(moving, scores, decisions)

    def _note(self, scores: torch.Tensor, to_llm: torch.Tensor, place: int) -> None:
        record = (part.to(self.device) for part in (scores, to_llm, torch.ones_like(to_llm)))
        self.cache.routing.add(place, *record)

    def _record(self, length: int) -> None:
        if self.decoding.streamer is None:
            super()._record(length)

    # ---- writing ------------------------------------------------------------------------------------------------

    def write(self, writing: Any, logits: torch.Tensor) -> None:
        if writing and self._guess is not None:
            self._append(list(writing), *self._guess)
        else:
            super().write(writing, logits)

    def _processed(self, rows: list[int], raw: torch.Tensor) -> torch.Tensor:
        if self.batch == 1 and self.decoding.processors:
            return self.decoding.processors(self._text_of(0), raw)
        return super()._processed(rows, raw)

    def _append(self, rows: list[int], *chosen: Any) -> None:
        # The host has just waited for the tokens, and so for the pass of the LLM before them.
        if self._call_began is not None:
            began, unread = self._call_began
            self.pace.note("llm", time.perf_counter() - began, unread)
            self._call_began = None
        super()._append(rows, *chosen)

    def _put(self, rows: list[int], tokens: torch.Tensor, ids: list[int]) -> None:
        for row in rows:
            if self._text_of_host is not None:
                self._text_of_host[row, self.width + self.written[row]] = ids[row]
            self._new[row].append(ids[row])
        if self._text_is_read:
            super()._put(rows, tokens, ids)
        if self.decoding.streamer is not None:
            self.decoding.streamer.put(torch.tensor(ids))

    def _has_ended(self, row: int, token: int) -> bool:
        stops, length = self.decoding.stops, self.width + self.written[row]
        if stops.reached(length, token) or not stops.others:
            return stops.reached(length, token)
        text = self._text_of(row) if self._text_of_host is None else self._text_of_host[row : row + 1, :length]
        return self.decoding.meets_criteria(text) if self.batch == 1 else stops.met(text)

    def _flush(self) -> None:
        """Write to the device's text what the host alone knows."""
        if self._text_is_read:
            return
        for row, new in enumerate(self._new):
            self.text[row, self.width : self.width + len(new)] = torch.tensor(new, device=self.device)

    def finish(self) -> Any:
        self._flush()
        if self.decoding.streamer is not None:
            self.decoding.streamer.end()
        output = super().finish()
        for room in self.work.rooms.values():
            room.let_go(keep=self.cache_is_wanted)
        return output


def asks_for_static(cache: Any) -> bool:
    return getattr(cache, "max_cache_len", None) is not None


def decodes_statically(decoding: Decoding | None, model: Any) -> TypeGuard[Decoding]:
    """Say whether a text can be written with static caches, and warn, once per reason, where it cannot."""
    reason = why_no_static_cache(model) or why_not_static(model, decoding)
    if reason:
        warn_of_dynamic_cache(reason)
    return not reason


def warn_of_dynamic_cache(reason: str) -> None:
    """Say, once per reason, that a text is written with caches that grow though static ones were asked for."""
    logger.warning_once(
        f"cache_implementation='static': {reason}. The text is the same, written with a cache that grows and passes "
        "that are not compiled."
    )


def why_not_static(model: Any, decoding: Decoding | None) -> str:
    if decoding is None:
        return (
            "hidden states or attentions are to be returned, `forward` is observed or changed, or a keyword is given "
            "that only transformers' own loop knows"
        )
    if decoding.input_ids.shape[0] > 1:
        if decoding.streamer is not None:
            return "a streamer follows a batch"
        if not processors_part_rows(decoding):
            return "a logits processor of your own may look across the rows of the batch"
        if not criteria_part_rows(decoding):
            return "a stopping criterion of your own, or one without end tokens, may look across the rows of the batch"
    cache = decoding.cache
    if not (layers_can_part(cache.slm) and layers_can_part(cache.llm)):
        return "the layers of the given cache do not keep tokens by their place"
    return ""


def why_no_static_cache(model: Any) -> str:
    for part in (model.slm, model.llm):
        if reason := why_not_placed(part):
            return reason
        if not part._can_compile_fullgraph:
            return f"{part.config.model_type} cannot be compiled as a whole"
    return ""
