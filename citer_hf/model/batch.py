"""Decoding of a batch whose rows do not wait for each other: those that need the LLM wait, the others go on."""

import time
from typing import Any

import torch
from transformers import Cache
from transformers.generation import LogitsProcessorList

from .batch_support import processor_of_row, reads_no_text
from .decoding import Decoding
from .kv_layers import RowsCache
from .masks import attention_masks, mask_kinds
from .routers import defer
from .sampling import Draws
from .schedule import Pace, WaitingPolicy, pressure, rows_to_wait_for


def decode_rows(model: Any, decoding: Decoding, logits: torch.Tensor, policy: WaitingPolicy | None = None) -> Any:
    return write_rows(Rows(model, decoding), logits, policy)


def write_rows(rows: "Rows", logits: torch.Tensor, policy: WaitingPolicy | None = None) -> Any:
    rows.write(range(rows.batch), logits[:, -1])
    while rows.unfinished:
        writing: list[int] = []
        if rows.moving:
            logits, writing = rows.read_with_slm()
        if rows.waiting and rows.enough_wait(policy):
            by_llm = rows.read_with_llm()
            logits = by_llm if not writing else torch.where(rows.mark(rows.waiting), by_llm, logits)
            writing, rows.waiting = writing + rows.waiting, []
        rows.write(writing, logits)
    return rows.finish()


class Rows:
    """Where each row of the batch is, and what was decided about its tokens."""

    def __init__(self, model: Any, decoding: Decoding):
        self.model, self.decoding, self.cache = model, decoding, decoding.cache
        prompt = decoding.input_ids
        self.device = prompt.device
        self.batch, self.width = prompt.shape
        self.columns = decoding.stops.max_length - self.width
        pad = decoding.settings._pad_token_tensor
        # One column more, for tokens that nobody gets.
        padding = prompt.new_zeros((self.batch, self.columns + 1)) + (0 if pad is None else pad.to(prompt))
        self.text = torch.cat([prompt, padding], dim=1)
        self.start = self.cache.get_seq_length()
        self.first_position = decoding.next_positions()
        self.readable = self._readable_places()
        self.slm_cache = self._room_for_rows(self.cache.slm)
        self.llm_cache: RowsCache | None = None
        self.draws: Draws | None = None
        self.pace = Pace()
        self.written = [0] * self.batch
        self.seen_by_llm = [0] * self.batch
        self.waiting: list[int] = []
        self.unfinished = list(range(self.batch))
        # p_slm and the writer of every token but the first, which the forward pass over the prompt has recorded.
        self.scores: list[list[float]] = [[] for _ in range(self.batch)]
        self.to_llm: list[list[bool]] = [[] for _ in range(self.batch)]
        self._tokens_decided = self._tokens_deferred = 0

    def _readable_places(self) -> torch.Tensor:
        """Which places of each row hold text that the SLM has read, bool `[batch, start + columns]`."""
        readable = torch.zeros((self.batch, self.start + self.columns), dtype=torch.bool, device=self.device)
        mask = self.decoding.attention_mask
        readable[:, : self.start] = True if mask is None else mask[:, : self.start].bool()
        return readable

    @property
    def moving(self) -> bool:
        return len(self.waiting) < len(self.unfinished)

    @property
    def llm_share(self) -> float:
        """Share of the tokens that the LLM writes, as seen so far; a fifth before anything was seen."""
        return (self._tokens_deferred + 1) / (self._tokens_decided + 5)

    def enough_wait(self, policy: WaitingPolicy | None) -> bool:
        """Whether the LLM should be called now: when enough rows wait, or no row can go on without it."""
        if not self.moving:
            return True
        seen = len(self.unfinished), self.llm_share, self.pace.ratio
        enough = rows_to_wait_for(*seen, self.pace.growth, self.columns) if policy is None else policy(*seen)
        return pressure(self._written_of(self.waiting), self._written_of(self.unfinished)) >= enough

    def _written_of(self, rows: list[int]) -> list[int]:
        return [self.written[row] for row in rows]

    def mark(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor([[row in rows] for row in range(self.batch)]).to(self.device, non_blocking=True)

    # ---- reading ------------------------------------------------------------------------------------------------

    def read_with_slm(self) -> tuple[torch.Tensor, list[int]]:
        """Let the SLM read the last token of every row, and decide about the next of those that move."""
        began = time.perf_counter()
        last = torch.tensor(self.written, device=self.device)[:, None] - 1
        self.readable.scatter_(1, self.start + last, True)
        logits, scores = self._slm_pass(last, max(self.written))
        decisions = defer(scores, self.decoding.threshold).squeeze(1).tolist()
        kept_scores = scores.squeeze(1).tolist()
        self.pace.note("slm", time.perf_counter() - began)
        moving = [row for row in self.unfinished if row not in self.waiting]
        return logits[:, -1], self._decided(moving, kept_scores, decisions)

    def _decided(self, moving: list[int], scores: list[float], decisions: list[bool]) -> list[int]:
        """Note what was decided about the rows that move, and return those whose next token the SLM writes."""
        for row in moving:
            self.scores[row].append(scores[row])
            self.to_llm[row].append(decisions[row])
        joining = [row for row in moving if decisions[row]]
        self._tokens_decided += len(moving)
        self._tokens_deferred += len(joining)
        self.waiting = self.waiting + joining
        return [row for row in moving if not decisions[row]]

    def _slm_pass(self, columns: torch.Tensor, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the tokens in these columns `[batch, tokens]`; return logits and `p_slm` at all of them."""
        self.slm_cache.make_room(self.start + filled)
        self.slm_cache.places = self.start + columns
        mask = self._mask("slm", self.slm_cache, self.slm_cache.places)
        ids, positions = self.text.gather(1, self.width + columns), self.first_position + columns
        inputs = {"attention_mask": mask, "position_ids": positions}
        with self.decoding.reading():
            slm = self.model.run_slm(ids, self.slm_cache, columns.shape[1], **inputs)
            return slm.logits, self.model.router(slm.hidden, slm.logits)

    def read_with_llm(self) -> torch.Tensor:
        """Let the LLM read what it has not seen of every unfinished row."""
        if self.cache.llm_length < self.start and not self._read_prompts_alone():
            return self._read_prompts_with_llm()
        if self.llm_cache is None:
            self.llm_cache = self._room_for_rows(self.cache.llm)
        began = time.perf_counter()
        written = torch.tensor(self.written, device=self.device)[:, None]
        seen = torch.tensor(self.seen_by_llm, device=self.device)[:, None]
        unseen = max(self.written[row] - self.seen_by_llm[row] for row in self.unfinished)
        # The last tokens of all rows stand in one column, so that one column of logits is enough.
        columns = written - unseen + torch.arange(unseen, device=self.device)
        unread = columns >= seen
        # What only fills up the rectangle sees what the last token sees: anything but nothing, which would be NaN.
        sees = torch.where(unread, columns, written - 1)
        self.llm_cache.make_room(self.start + max(self.written))
        self.llm_cache.places = torch.where(unread, self.start + columns, self.llm_cache.nowhere)
        mask = self._mask("llm", self.llm_cache, self.start + sees)
        columns = columns.clamp(min=0)
        ids, positions = self.text.gather(1, self.width + columns), self.first_position + columns
        with self.decoding.reading():
            logits = self.model.run_llm(ids, self.llm_cache, 1, attention_mask=mask, position_ids=positions)[:, -1]
        self._note_call()
        if logits.device.type != "cpu":
            torch.accelerator.synchronize(logits.device)
        self.pace.note("llm", time.perf_counter() - began, unseen)
        return logits

    def _read_prompts_alone(self) -> bool:
        """Let the LLM read the prompts by a pass of their own, where it has to, and say whether it did."""
        cache = self.cache
        windows = any(getattr(layer, "sliding_window", None) is not None for layer in cache.llm.layers)
        together = len(set(self.written)) == 1 and len(self.unfinished) == self.batch
        if not windows or together:
            return False
        ids, positions = cache.unseen_tokens()
        mask = self.readable[:, : self.start].to(ids.dtype)
        self.model.run_llm(ids, cache.llm, 1, attention_mask=mask, position_ids=positions)
        cache.mark_seen()
        cache.routing.llm_calls += 1
        return True

    def _read_prompts_with_llm(self) -> torch.Tensor:
        """The same, when it has not seen the prompts yet, which all end at one place."""
        cache, written = self.cache, max(self.written)
        ids, positions = cache.unseen_tokens()
        if positions is None:
            positions = torch.arange(cache.llm_length, self.start, device=self.device)[None]
        positions = positions.expand(self.batch, -1)
        later = (self.first_position + torch.arange(written, device=self.device)).expand(self.batch, -1)
        columns = sorted({self.written[row] for row in self.unfinished})
        kept = torch.tensor(columns, device=self.device) - 1 + ids.shape[1]
        logits = self.model.run_llm(
            torch.cat([ids, self.text[:, self.width : self.width + written]], dim=1),
            cache.llm,
            kept,
            attention_mask=self.readable[:, : self.start + written].to(ids.dtype),
            position_ids=torch.cat([positions, later], dim=1),
        )
        cache.mark_seen()
        self._note_call()
        self.llm_cache = self._room_for_rows(cache.llm)
        self.llm_cache.hand_back(self.start)
        chosen = [columns.index(self.written[row]) if row in self.unfinished else 0 for row in range(self.batch)]
        return logits[torch.arange(self.batch, device=self.device), torch.tensor(chosen, device=self.device)]

    def _note_call(self) -> None:
        self.cache.routing.llm_calls += 1
        for row in self.unfinished:
            self.seen_by_llm[row] = self.written[row]

    def _room_for_rows(self, cache: Cache) -> RowsCache:
        return RowsCache(cache, cache.get_seq_length() + min(self.columns, 64) + 1)

    def _mask(self, model: str, cache: RowsCache, last: torch.Tensor) -> Any:
        kinds = mask_kinds(getattr(self.model, model), [layer.window for layer in cache.layers])
        return attention_masks(kinds, self.readable[:, : cache.visible], last)

    # ---- writing ------------------------------------------------------------------------------------------------

    def write(self, writing: Any, logits: torch.Tensor) -> None:
        if not writing:
            return
        began = time.perf_counter()
        chosen = list(writing)
        raw = self._raw(logits)
        processed = self._processed(chosen, raw)
        tokens = self._choose(chosen, processed)
        self._append(chosen, raw, processed, tokens, tokens.tolist())
        self.pace.note_writing(time.perf_counter() - began)

    def _raw(self, logits: torch.Tensor) -> torch.Tensor:
        # A copy where processors may change it.
        return logits.to(dtype=torch.float32, device=self.device, copy=bool(self.decoding.processors))

    def _append(
        self, rows: list[int], raw: torch.Tensor, processed: torch.Tensor, tokens: torch.Tensor, ids: list[int]
    ) -> None:
        """Add a token to each of some rows: `tokens`, or `ids` as the host knows them, of all rows."""
        self._keep(rows, raw, processed)
        self._put(rows, tokens, ids)
        for row in rows:
            self.written[row] += 1
            if self._has_ended(row, ids[row]):
                self.unfinished.remove(row)

    def _put(self, rows: list[int], tokens: torch.Tensor, ids: list[int]) -> None:
        places = [self.columns] * self.batch
        for row in rows:
            places[row] = self.written[row]
        columns = self.width + torch.tensor(places).to(self.device, non_blocking=True)
        self.text.scatter_(1, columns[:, None], tokens[:, None])

    def _has_ended(self, row: int, token: int) -> bool:
        stops = self.decoding.stops
        return stops.reached(self.width + self.written[row], token) or (
            bool(stops.others) and stops.met(self._text_of(row))
        )

    def _text_of(self, row: int) -> torch.Tensor:
        return self.text[row : row + 1, : self.width + self.written[row]]

    def _processed(self, rows: list[int], raw: torch.Tensor) -> torch.Tensor:
        """Let the processors see each row with its own text, which differs in length."""
        processors = self.decoding.processors
        if not processors:
            return raw
        if all(map(reads_no_text, processors)):
            if len(rows) == self.batch:
                return processors(self.text[:, : self.width], raw)
            index = self._index(rows)
            return raw.index_copy(0, index, processors(self.text[index, : self.width], raw[index]))
        processed = raw.clone()
        for row in rows:
            of_row = LogitsProcessorList([processor_of_row(one, row) for one in processors])
            processed[row] = of_row(self._text_of(row), raw[row : row + 1])[0]
        return processed

    def _choose(self, rows: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Return the likeliest token of each row, or one drawn, `[batch]`; those of other rows mean nothing."""
        if not self.decoding.settings.do_sample:
            return scores.argmax(dim=-1)
        if self.draws is None:
            self.draws = Draws(self.batch, scores.device)
        if len(rows) == self.batch:
            return self.draws.choose(scores.softmax(dim=-1), dict(enumerate(self.written)))
        # Going through the whole vocabulary again for rows that get no token takes as long as a small model's step.
        index = self._index(rows)
        drawn = self.draws.choose(scores[index].softmax(dim=-1), {row: self.written[row] for row in rows})
        return drawn.new_zeros(self.batch).index_copy(0, index, drawn)

    def _index(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows).to(self.device, non_blocking=True)

    def _keep(self, rows: list[int], raw: torch.Tensor, processed: torch.Tensor) -> None:
        decoding = self.decoding
        for kept, values, wanted in (
            (decoding.logits, raw, decoding.keeps_logits),
            (decoding.scores, processed, decoding.keeps_scores),
        ):
            for row in rows if wanted else ():
                if self.written[row] == len(kept):
                    kept.append(torch.zeros_like(values))
                kept[self.written[row]][row] = values[row]

    # ---- the end ------------------------------------------------------------------------------------------------

    @property
    def cache_is_wanted(self) -> bool:
        return bool(self.decoding.settings.return_dict_in_generate or getattr(self.cache, "_is_user_defined", False))

    def finish(self) -> Any:
        """Hand back texts, cache and record. What follows the end of a row is empty in the cache: mask it."""
        length = max(self.written)
        text = self.text[:, : self.width + length].clone()
        if self.cache_is_wanted:
            self._hand_back_caches(length - 1)
            self._record(length)
        return self.decoding.result(text)

    def _hand_back_caches(self, columns: int) -> None:
        """Leave in the cache what all rows have read, and what the LLM has not seen of some as unseen by it."""
        cache = self.cache
        self.slm_cache.hand_back(self.start + columns)
        seen, llm_length = 0, cache.llm_length
        if self.llm_cache is not None:
            seen = min(*self.seen_by_llm, columns)
            llm_length = self.start + seen
            self.llm_cache.hand_back(llm_length)
        ids = self.text[:, self.width + seen : self.width + columns].clone()
        positions = self.first_position + torch.arange(seen, columns, device=self.device)
        cache.resume(self.start + columns, llm_length, ids, positions)

    def _record(self, length: int) -> None:
        if length > 1:
            scores, to_llm = torch.zeros(self.batch, length - 1), torch.zeros(self.batch, length - 1, dtype=torch.bool)
            for row, written in enumerate(self.written):
                scores[row, : written - 1] = torch.tensor(self.scores[row])
                to_llm[row, : written - 1] = torch.tensor(self.to_llm[row])
            unfinished = torch.arange(1, length) < torch.tensor(self.written)[:, None]
            record = (part.to(self.device) for part in (scores, to_llm, unfinished))
            self.cache.routing.add(self.start + 1, *record)
