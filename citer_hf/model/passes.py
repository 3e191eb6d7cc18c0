"""How a model runs over sequences that stand at different places: alone, or several slots as a rectangle."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .compiled import Workspace
from .schedule import Pace
from .sequence import Sequence
from .slots import Masks
from .support import is_plain, why_not_placed

Part = tuple[Sequence, int, int]  # a sequence, and from which place to which its tokens are processed
# (part, column) whose logits are needed, and a token whose own probability is. A remote LLM is asked for nothing else.
Asked = dict[tuple[int, int], int | None]


class Passes:
    """Passes of both models over sequences in slots.

    Args:
        model: The pair.
        slots: Number of slots.
        caches: Of both models, by role.
        capacity: Places of a slot; `None`: the memory grows.
        pace: Measured times, which say what filling up a rectangle costs.
        work: Passes with fixed shapes, compiled.
    """

    def __init__(
        self, model: Any, slots: int, caches: dict[str, Any], capacity: int | None, pace: Pace, work: Workspace | None
    ):
        self.model, self.slots, self.caches, self.pace, self.work = model, slots, caches, pace, work
        self.device = model.slm.device
        self.calls = dict.fromkeys(caches, 0)
        self.timed = True  # whether the last run took as long as others like it
        self.rectangles = 1  # passes of the last run
        models = {role: getattr(model, role) for role in caches}
        self.together = {role: not why_not_placed(one) for role, one in models.items()}
        self.masks = {role: Masks.of(one, caches[role]) for role, one in models.items()}
        # One place more than the longest sequence has, for tokens that only fill up a rectangle.
        fixed = capacity + 1 if work is None and capacity is not None else work and work.capacity
        self.capacity = {role: fixed or cache.get_seq_length() for role, cache in caches.items()}
        self._plain = all(map(is_plain, models.values()))
        self.remote = getattr(model.llm, "is_remote", False)

    def run(
        self, role: str, parts: list[Part], columns: list[int], decides: bool = False, asked: Asked | None = None
    ) -> Any:
        """Run a model over tokens of some sequences, and keep columns, counted from the last.

        Returns:
            Logits `[parts, columns, vocabulary]`, and for the SLM where it decides the scores `[parts, columns]`; of a
            remote LLM logits `[1, asked, vocabulary]`, and all that it tells.
        """
        end = max(end for _, _, end in parts)
        if end >= self.capacity[role]:
            self.capacity[role] = end + end // 8 + 64
        width = max(end - start for _, start, end in parts)
        self.timed, self.rectangles = True, 1
        if self.work is not None and self.work.takes(role, width):
            inputs = self._lay_out(role, parts, self.work.width(role, width), range(self.slots))
            logits, scores, self.timed = self.work.run(self.model, role, inputs, columns)
            self.calls[role] += 1
            found = [(parts, *selected([one.slot for one, _, _ in parts], logits, scores))]
        else:
            groups = self._rectangles(role, parts)
            self.calls[role] += len(groups)
            self.rectangles = len(groups)
            found = []
            for group in groups:
                run = self._run_alone if len(group) == 1 else self._run_together
                found.append((group, *run(role, group, columns, decides, asked)))
        for one, start, place in parts:
            one.seen[role] = place
            one.passes[role].append((start, place))
        if len(found) == 1 and found[0][0] == parts:
            return found[0][1:]
        order = [part for group, _, _ in found for part in group]
        rows = [order.index(part) for part in parts]
        logits = torch.cat([logits for _, logits, _ in found])
        return selected(rows, logits, torch.cat([scores for *_, scores in found]) if decides else None)

    def _rectangles(self, role: str, parts: list[Part]) -> list[list[Part]]:
        """Return the parts in groups, each a rectangle of slots and tokens, so that few tokens fill up rectangles."""
        if not self.together[role]:
            return [[part] for part in parts]
        # What fills up a rectangle costs a remote LLM nothing.
        if len({end - start for _, start, end in parts}) == 1 or (role == "llm" and self.remote):
            return [parts]
        # The longest come first; what is cut off by the best cut is a group, and the rest is cut again.
        rest, groups, overhead = sorted(parts, key=lambda part: part[1] - part[2]), [], self.pace.overhead()
        while rest:
            cuts = range(1, len(rest) + 1)
            areas = [area(rest[:cut]) + (overhead if rest[cut:] else 0) + area(rest[cut:]) for cut in cuts]
            cut = areas.index(min(areas)) + 1
            groups.append(rest[:cut])
            rest = rest[cut:]
        return groups

    def _run_alone(self, role: str, parts: list[Part], columns: list[int], decides: bool, asked: Asked | None) -> Any:
        """Run a model over one sequence: its slot is all that the model sees, and the model makes its own masks."""
        at, (one, start, end) = self.caches[role].at, parts[0]
        at.slots, at.start, at.first, at.places = slice(one.slot, one.slot + 1), start, one.first, None
        ids = torch.tensor([one.tokens[start - one.origin : end - one.origin]], device=self.device)
        inputs: dict[str, Any] = {"position_ids": torch.tensor([one.position(start, end)], device=self.device)}
        if asked is not None:
            inputs["asked"] = asked
        if one.shown is not None:
            shown = (one.shown + [True] * (end - one.begin))[one.first : end]
            inputs["attention_mask"] = torch.tensor([shown], dtype=torch.long, device=self.device)
        return self._call(role, ids, inputs, columns, decides)

    def _run_together(
        self, role: str, parts: list[Part], columns: list[int], decides: bool, asked: Asked | None
    ) -> Any:
        """Run a model over several slots, as a rectangle whose last columns align."""
        slots, width = [one.slot for one, _, _ in parts], max(end - start for _, start, end in parts)
        low, high, visible = min(slots), max(slots) + 1, max(end for _, _, end in parts)
        # Slots next to each other are a view, in which few may idle; others are copied together.
        rows = list(range(low, high)) if 4 * (high - low) <= 5 * len(slots) else slots
        at = self.caches[role].at
        ids, places, last, positions, first = self._lay_out(role, parts, width, rows).to(self.device)
        at.slots, at.places, at.visible = slice(low, high), places, visible
        if rows is slots:
            at.slots = torch.tensor(slots, device=self.device)
        shown = None
        if any(one.shown for one, _, _ in parts):
            seen = {one.slot: ((one.shown or []) + [True] * visible)[:visible] for one, _, _ in parts}
            shown = torch.tensor([seen.get(slot, [True] * visible) for slot in rows], device=self.device)
        mask = self.masks[role](first[:, :1], last, visible, shown)
        inputs, own_rows = {"attention_mask": mask, "position_ids": positions}, [rows.index(slot) for slot in slots]
        if asked is not None:
            inputs["asked"] = {(own_rows[part], column): token for (part, column), token in asked.items()}
        output = self._call(role, ids, inputs, columns, decides)
        return output if asked is not None else selected(own_rows, *output)

    def _call(self, role: str, ids: torch.Tensor, inputs: dict[str, Any], columns: list[int], decides: bool) -> Any:
        cache, width = self.caches[role], ids.shape[1]
        cache.at.batch, cache.at.capacity = self.slots, self.capacity[role]
        kept: Any = 1
        if columns != [1]:
            kept = torch.tensor([max(width - column, 0) for column in columns], device=self.device)
        context: AbstractContextManager[Any] = torch.inference_mode() if self._plain else nullcontext()
        try:
            with context:
                if "asked" in inputs:
                    told = self.model._run("llm", ids, cache, kept, inputs)
                    return told.logits[..., : self.model.vocab_size], told
                if role == "llm":
                    return self.model.run_llm(ids, cache, kept, **inputs), None
                slm = self.model.run_slm(ids, cache, kept, **inputs)
                return slm.logits, self.model.router(slm.hidden, slm.logits) if decides else None
        finally:
            cache.at.slots = cache.at.places = None

    def _lay_out(self, role: str, parts: list[Part], width: int, slots: list[int] | range) -> torch.Tensor:
        """Return ids, places, last places seen, positions, first places seen: `[5, slots, width]`."""
        nowhere = self.capacity[role] - 1
        rows = {slot: [[0] * width, [nowhere] * width, [0] * width, [0] * width, [0] * width] for slot in slots}
        for one, start, end in parts:
            fill = width - (end - start)
            positions = one.position(start, end)
            # What only fills up the rectangle sees what the first token sees: a token that sees nothing gives NaN.
            rows[one.slot] = [
                [0] * fill + one.tokens[start - one.origin : end - one.origin],
                [nowhere] * fill + list(range(start, end)),
                [start] * fill + list(range(start, end)),
                positions[:1] * fill + positions,
                [one.first] * width,
            ]
        return torch.tensor(list(rows.values())).transpose(0, 1)


def area(parts: list[Part]) -> int:
    """Return how many tokens a rectangle has."""
    return len(parts) * max((end - start for _, start, end in parts), default=0)


def selected(rows: list[int], logits: torch.Tensor, scores: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Return these rows of logits and scores."""
    if rows == list(range(len(logits))):
        return logits, scores
    return logits[rows], None if scores is None else scores[rows]
