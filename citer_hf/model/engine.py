"""The decode loop: draft with the SLM, verify with the LLM, for any number of sequences that come and go.

A token is flagged where its score does not reach the threshold: the LLM must have the word. A token that is not
flagged is the SLM's, unless the LLM vetoes it. The text depends on prefixes alone, never on when the LLM is called, so
that the SLM may draft past tokens whose verdict is open (speculative cascades, arXiv 2405.19261, behind a router).
"""

import math
import time
from bisect import insort
from collections import deque
from itertools import islice
from typing import Any

import torch

from .cache import CiterCache
from .compat import is_out_of_memory
from .compiled import Workspace
from .passes import Asked, Part, Passes
from .routers import defer
from .sampling import InexactError, chosen, processed
from .schedule import Pace
from .sequence import MOST_DRAFTS, Draft, Sequence, Settled
from .slots import keeps_slots

# Most tokens of a prompt in one pass, so that other sequences go on in between.
CHUNK = 512
# A prompt that shares at least so many first tokens with what another slot holds takes them from there.
SHARED = 16
UNDECIDED = "the tokens of which its server tells do not decide the next one. Raise RemoteLM(logprobs=...)."
# With so many sequences, those that joined last, a prompt is compared.
MOST_COMPARED = 32


class Engine:
    """Slots of both models' caches, and the sequences in them.

    Args:
        model: The pair.
        slots: How many sequences are decoded at once.
        cache: Keeps the keys and values of both models, a slot for each sequence. Default: a new one.
        capacity: Most tokens of a sequence; the memory for it is fixed. Default: the memory grows.
        chunk: Most tokens of a prompt in one pass.
        pace: Measured times and acceptances, which may be known from earlier sequences.
        work: Passes with fixed shapes, compiled, over their own memory.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        cache: CiterCache | None = None,
        capacity: int | None = None,
        chunk: int = CHUNK,
        pace: Pace | None = None,
        work: Workspace | None = None,
    ):
        cache = CiterCache(model.config) if cache is None else cache
        self.most, self.chunk = capacity, chunk
        self.pace = Pace() if pace is None else pace
        self.device = model.slm.device
        self.caches = {"slm": cache.slm, "llm": cache.llm} if work is None else work.caches
        if not all(map(keeps_slots, self.caches.values())):
            raise ValueError("cache: expected the layers of a CiterCache(model.config), which can take tokens back.")
        self.free, self.waiting, self.active = list(range(slots)), deque[Sequence](), list[Sequence]()
        self.held: dict[int, Sequence] = {}  # the sequence that was last in each slot
        self.passes = Passes(model, slots, self.caches, capacity, self.pace, work)
        self._begin_cycle()
        self._read_prompt = False

    @property
    def calls(self) -> dict[str, int]:
        """Forward passes of each model, "slm" and "llm"."""
        return self.passes.calls

    @property
    def busy(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self.active or self.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; it gets the next slot that is free.

        Raises:
            ValueError: when the sequence may become longer than a slot, or has no token that is to be processed.
        """
        if sequence.unread("slm") < 1:
            raise ValueError("tokens: expected at least one that the cache does not hold. Pass the whole text.")
        longest = sequence.begin + sequence.stops.max_length - sequence.length
        if self.most is not None and longest > self.most:
            raise ValueError(
                f"tokens: this sequence may have {longest} tokens, prompt and output, but a slot holds {self.most}. "
                "Ask for fewer new tokens, or make an engine of a larger capacity."
            )
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; its slot is free at once. Nothing happens where it has ended already."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            sequence.finished = True
        elif not sequence.finished:
            self._finish(sequence)

    def run(self) -> None:
        """Decode until every sequence has ended."""
        while self.busy:
            self.step()

    def step(self) -> None:
        """Draft one token of every sequence that may, and call the LLM when it is due."""
        # 1. Sequences join where slots are free.
        self._admit()
        self._advance()

    def step_apart(self) -> None:
        """Step every sequence alone, after a step that failed: a sequence whose own step fails ends with its error."""
        together = self.active
        for one in together:
            self.active = [one]
            self._begin_cycle()
            try:
                self._advance()
            except Exception as error:
                if not one.finished:
                    self._finish(one, error)
        self.active = [one for one in together if not one.finished]
        self._begin_cycle()

    def _advance(self) -> None:
        # 2. The SLM processes a prompt, or the last token of every sequence, and drafts the next one.
        parts = self._to_draft()
        if parts:
            self._draft(parts)
        # 3. The LLM judges all drafts when that is worth more than another one.
        judged = [one for one in self.active if one.drafts]
        if judged and self._call_is_due(judged):
            self._verify(judged)

    # ---- the SLM ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self.free:
            one = self.waiting[0]
            # A prompt that begins like one that is still to be processed waits for it, and takes its first tokens.
            unread = [other for other in self._recent() if not other.finished and other.unread("slm") > 1]
            if any(one.shares(other, SHARED) > other.seen["slm"] - other.origin for other in unread):
                break
            self.waiting.popleft()
            one.slot = self._best_slot(one) if one.slot < 0 else one.slot
            self.free.remove(one.slot)
            self.active.append(one)
            for role in self.caches:
                self._take_shared(role, one)
            one.shared = one.seen["slm"] - one.origin
            # The sequences that joined last come last.
            self.held.pop(one.slot, None)
            self.held[one.slot] = one

    def _best_slot(self, one: Sequence) -> int:
        """Return the free slot that holds most of a prompt, of several the one that was given last long ago."""
        order = {slot: place for place, slot in enumerate(self.held)}
        shared = {slot: one.shares(self.held[slot], SHARED) for slot in self.free if slot in order}
        return min(self.free, key=lambda slot: (-shared.get(slot, 0), order.get(slot, -1)))

    def _recent(self) -> list[Sequence]:
        return list(islice(reversed(self.held.values()), MOST_COMPARED))

    def _take_shared(self, role: str, one: Sequence) -> None:
        """Take the first tokens of a prompt from the slot that holds most of them."""
        if one.seen[role] > one.origin:
            return
        others = [other for other in self._recent() if other is not one]
        shared = [min(one.shares(other, SHARED), other.seen[role] - other.origin) for other in others]
        most = max(shared, default=0)
        if most >= SHARED:
            one.seen[role], source = one.origin + most, others[shared.index(most)].slot
            for layer in self.caches[role].layers if source != one.slot else ():
                layer.copy(source, one.slot, one.seen[role])

    def _to_draft(self) -> list[Part]:
        """Return what the SLM processes next: chunks of prompts of like lengths, or the last token of the others."""
        able = [one for one in self.active if one.may_draft]
        prompts = [one for one in able if one.unread("slm") > 1]
        others = [one for one in able if one.unread("slm") == 1]
        # Prompts take turns with the others, whose streams flow on.
        self._read_prompt = bool(prompts) and not (self._read_prompt and others)
        if not self._read_prompt:
            return [(one, one.end - 1, one.end) for one in others]
        return self._of_like_lengths("slm", prompts)

    def _of_like_lengths(self, role: str, prompts: list[Sequence]) -> list[Part]:
        unread = [min(one.unread(role), self.chunk) for one in prompts]
        return [
            (one, one.seen[role], one.seen[role] + count)
            for one, count in zip(prompts, unread, strict=True)
            if 2 * count > max(unread)
        ]

    def _draft(self, parts: list[Part]) -> None:
        """Let the SLM process what it has not seen, and write a token of its own, flagged or not."""
        began = time.perf_counter()
        writing = [index for index, (one, _, end) in enumerate(parts) if end == one.end]
        try:
            logits, scores = self.passes.run("slm", parts, [1], bool(writing))
        except (RuntimeError, MemoryError, OSError) as error:
            # Others go on where a prompt is too large for the memory that is left.
            if not (self._read_prompt and is_out_of_memory(error)):
                raise
            for one, _, _ in parts:
                self._finish(one, error)
            return
        if not writing:
            return
        logits, scores = logits[:, 0], scores[:, -1]
        if len(writing) < len(parts):
            logits, scores = logits[writing], scores[writing]
        sequences = [parts[index][0] for index in writing]
        thresholds = torch.tensor([one.threshold for one in sequences], device=scores.device, dtype=torch.float64)
        flags = defer(scores, thresholds).tolist()
        kept, _, tokens = self._choose([(one, len(one.record) + len(one.drafts)) for one in sequences], logits)
        for one, score, flagged, token, own in zip(
            sequences, scores.tolist(), flags, tokens.tolist(), kept, strict=True
        ):
            if one.finished:
                continue
            one.tokens.append(token)
            if not flagged and one.veto == 0 and not one.drafts:
                self._expected += 1
                self._settle(one, Settled(score, kept=own))
                continue
            one.drafts.append(Draft(flagged, score, own))
            self._expected += one.survival
            if flagged or one.veto:
                one.survival *= self.pace.acceptance(flagged, score)
        seconds = time.perf_counter() - began
        self._steps += 1
        if not self._read_prompt:
            self._spent += seconds
            if self.passes.timed:
                self.pace.steps.add(seconds, len(parts))

    # ---- the LLM ------------------------------------------------------------------------------------------------

    def _begin_cycle(self) -> None:
        self._spent, self._expected, self._steps = 0.0, 0.0, 0

    def _call_is_due(self, judged: list[Sequence]) -> bool:
        # However fast others go on, nobody waits for the LLM longer than so many steps.
        if any(one.needs_verdict for one in judged) or self._steps >= MOST_DRAFTS:
            return True
        able = [one.survival for one in self.active if one.may_draft]
        tokens = sum(one.unread("llm") for one in judged)
        return not able or self.pace.call_is_due(able, self._steps, self._spent, tokens, self._expected)

    def _verify(self, sequences: list[Sequence]) -> None:
        """Let the LLM process what it has not seen and judge the drafts: accept, or replace one and drop the rest."""
        # 1. Prompts first where they are longer than a chunk, or begin like one that is processed now.
        sequences = sequences if self.passes.remote else self._without_prompts(sequences)
        if not sequences:
            return
        # 2. One pass, with logits where a verdict is needed: columns are counted from the last.
        began = time.perf_counter()
        parts = [(one, one.seen["llm"], one.end - 1) for one in sequences]
        judged = [
            (row, index)
            for row, one in enumerate(sequences)
            for index, draft in enumerate(one.drafts)
            if draft.flagged or one.veto
        ]
        distances = [len(sequences[row].drafts) - index for row, index in judged]
        columns = sorted(set(distances), reverse=True)
        column = {distance: index for index, distance in enumerate(columns)}
        places = [(row, column[distance]) for (row, _), distance in zip(judged, distances, strict=True)]
        positions = [(sequences[row], len(sequences[row].record) + index) for row, index in judged]
        tokens = [one.tokens[one.begin - one.origin + place] for one, place in positions]
        asked: Asked | None = None
        if self.passes.remote:
            # A veto between 0 and 1 looks at the drafted token's own probability.
            by_veto = [not sequences[row].drafts[at].flagged and sequences[row].veto < 1 for row, at in judged]
            asked = {at: token if veto else None for at, token, veto in zip(places, tokens, by_veto, strict=True)}
        logits, told = self.passes.run("llm", parts, columns, asked=asked)
        # 3. The LLM's own tokens, and whether the SLM's stand: [positions].
        logits = logits[0] if asked is not None else logits[tuple(torch.tensor(places).T.to(logits.device))]
        drafted = torch.tensor(tokens)
        kept, scores, best = self._choose(positions, logits)
        least = torch.tensor([math.log(one.veto) if one.veto else -math.inf for one, _ in positions])
        own = scores.gather(1, drafted.to(scores.device)[:, None])[:, 0]
        stands = (own >= scores.amax(dim=-1) + least.to(scores.device)).tolist()
        if self.passes.remote:
            self._end_undecided([one for one, _ in positions], logits, scores, told)
        verdicts: list[dict[int, tuple[int, bool, Any]]] = [{} for _ in sequences]
        for (row, index), token, stand, own_logits in zip(judged, best.tolist(), stands, kept, strict=True):
            verdicts[row][index] = token, stand, own_logits
        if self.passes.timed and not all(start < one.begin for one, start, _ in parts):
            seconds, size = time.perf_counter() - began, sum(end - start for _, start, end in parts)
            self.pace.calls.add(seconds / self.passes.rectangles, size / self.passes.rectangles)
        # 4. Walk along every sequence up to the first token that is replaced.
        for one, given in zip(sequences, verdicts, strict=True):
            self._walk(one, given)
        self._begin_cycle()

    def _without_prompts(self, sequences: list[Sequence]) -> list[Sequence]:
        """Let the LLM process prompts up to their last chunk; return the sequences that can be judged."""
        while True:
            for one in sequences:
                self._take_shared("llm", one)
            prompts = [one for one in sequences if one.seen["llm"] < one.begin - 1]
            leaders = [
                one
                for index, one in enumerate(prompts)
                if not any(one.shares(other, SHARED) for other in prompts[:index])
            ]
            if len(leaders) == len(prompts) and all(one.unread("llm") <= self.chunk for one in prompts):
                return sequences
            ends = [(one, min(one.seen["llm"] + self.chunk, one.begin - 1)) for one in leaders]
            self.passes.run("llm", [(one, one.seen["llm"], end) for one, end in ends], [1])
            # The streams of others flow on between two chunks.
            if any(one not in prompts for one in self.active):
                return [one for one in sequences if one not in prompts]

    def _end_undecided(self, sequences: list[Sequence], logits: torch.Tensor, scores: torch.Tensor, told: Any) -> None:
        """End sequences whose remote LLM fails, or tells of too few tokens for the next one to be known."""
        least = told.least.to(logits.device)
        known, best = (logits >= least[:, None]).sum(-1).tolist(), scores.argmax(-1).to(logits.device)
        decided = (logits.gather(1, best[:, None])[:, 0] >= least).tolist()
        for number, one in enumerate(sequences):
            error = told.errors.get(number)
            if error is None and not (decided[number] and known[number] >= self.passes.model.llm.needed(one.choice)):
                error = InexactError("llm", UNDECIDED)
            if error is not None and not one.finished:
                self._finish(one, error)

    def _walk(self, one: Sequence, verdicts: dict[int, tuple[int, bool, Any]]) -> None:
        place, one.survival = one.end - len(one.drafts), 1.0
        for index, draft in enumerate(list(one.drafts)):
            if one.finished:
                return
            settled, replaced, drafted = Settled(draft.score, kept=draft.kept), False, one.tokens[place - one.origin]
            if index in verdicts:
                token, stands, own = verdicts[index]
                # A veto of 1 leaves nothing but the LLM's own tokens.
                vetoed = not draft.flagged and (token != drafted if one.veto >= 1 else not stands)
                to_llm = draft.flagged or vetoed
                replaced = to_llm and token != drafted
                self.pace.judge(draft.flagged, draft.score, not replaced)
                agreed = draft.flagged and not replaced
                by_llm = to_llm or one.veto >= 1
                settled = Settled(draft.score, to_llm, vetoed, agreed, own if by_llm else draft.kept)
            if replaced:
                # The caches hold a dropped draft at this place, and more behind it.
                del one.tokens[place - one.origin :], one.drafts[1:]
                one.tokens.append(token)
                one.seen = {role: min(seen, place) for role, seen in one.seen.items()}
            self._settle(one, settled)
            place += 1
            if replaced:
                return

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _choose(
        self, positions: list[tuple[Sequence, int]], logits: torch.Tensor
    ) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
        """Return logits to be kept, processed logits, and the chosen tokens of positions (sequence, token number)."""
        choices = [one.choice for one, _ in positions]
        raw = scores = logits.to(
            dtype=torch.float32, device=self.device, copy=any(one.keeps_logits for one, _ in positions)
        )
        if any(choice.processors for choice in choices):
            prefixes = [one.prefix(0 if one.choice.reads_no_text else place) for one, place in positions]
            scores, errors = processed(choices, prefixes, raw)
            for row, error in errors.items():
                if not positions[row][0].finished:
                    self._finish(positions[row][0], error)
        tokens = chosen(choices, [place for _, place in positions], scores)
        kept = [(raw[row], scores[row]) if one.keeps_logits else () for row, (one, _) in enumerate(positions)]
        return kept, scores, tokens  # type: ignore[return-value]

    def _settle(self, one: Sequence, settled: Settled) -> None:
        """Make the first unsettled token final, and end the sequence there if it ends."""
        # A token that needs no verdict was never a draft.
        del one.drafts[:1]
        one.record.append(settled)
        count = len(one.record)
        one.choice.forget(count - 1)
        try:
            if one.on_settled is not None:
                one.on_settled(one)
            ends = one.stops.reached(one.length - len(one.drafts), one.last)
            if one.stops.others and not ends:
                kept = tuple(each.kept[1][None] for each in one.record if each.kept) if one.keeps_logits else None
                ends = bool(one.stops.others(one.prefix(count), kept).all())
        except Exception as error:
            self._finish(one, error)
            return
        if ends and not one.finished:
            self._finish(one)

    def _finish(self, one: Sequence, error: BaseException | None = None) -> None:
        """Drop what is drafted behind the end, and free the slot."""
        del one.tokens[len(one.tokens) - len(one.drafts) :]
        one.drafts, one.finished, one.error = [], True, error
        one.seen = {role: min(seen, one.end) for role, seen in one.seen.items()}
        one.choice.drop_noise()
        self.active.remove(one)
        insort(self.free, one.slot)
