"""CiterCache: two KV caches, the tokens that the LLM has not seen yet, and the record of routing."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from .compat import reset_cache
from .slots import SlotCache


class CiterCache(Cache):
    """The state of one generation: the SLM's cache, the LLM's cache, and what the LLM still has to read.

    The LLM runs only when it has to write, over all that it has not seen, in one forward pass. Use it as
    `DynamicCache(config=...)`: in `forward` and `generate`, copied with `copy.deepcopy`, cropped, reordered.

    Args:
        config: The `CiterConfig` of the model.
        slm: A cache for the SLM. Default: a `DynamicCache` whose layers keep a slot for each sequence.
        llm: A cache for the LLM. Default: the same.
        max_cache_len: Tokens to allocate memory for at once, as `StaticCache` of transformers does: `generate` then
            compiles its passes on an accelerator, and raises the number where it needs more. Default: it grows.

    Attributes:
        routing: Who wrote each token since the last call of `generate` (or since the cache was made).
    """

    # A property of the base class up to transformers 5.17, which would refuse to be set.
    max_cache_len: int | None = None

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        slm: Cache | None = None,
        llm: Cache | None = None,
        max_cache_len: int | None = None,
    ):
        self.slm = slm if slm is not None else SlotCache(getattr(config, "slm_config", None))
        self.llm = llm if llm is not None else SlotCache(getattr(config, "llm_config", None))
        self.llm_length = 0
        self.max_cache_len = max_cache_len
        self.routing = Routing()
        self._length = 0
        self._batch_size = -1
        self._unseen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def add_tokens(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Note tokens that the SLM has processed and the LLM has not."""
        self._batch_size = input_ids.shape[0]
        self._length += input_ids.shape[1]
        self._unseen.append((input_ids, position_ids))

    def unseen_tokens(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the LLM has not seen: token ids `[batch, tokens]` and their positions `[batch, tokens]`."""
        input_ids = torch.cat([ids for ids, _ in self._unseen], dim=1)
        if all(positions is None for _, positions in self._unseen):
            return input_ids, None
        explicit, first = [], self.llm_length
        for ids, positions in self._unseen:
            implied = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
            explicit.append((implied if positions is None else positions).expand(ids.shape[0], -1))
            first += ids.shape[1]
        return input_ids, torch.cat(explicit, dim=1)

    def mark_seen(self) -> None:
        self.llm_length = self._length
        self._unseen = []

    def resume(
        self, batch: int, length: int, llm_length: int, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> None:
        """Set the lengths after an engine has decoded; the LLM has not seen these tokens of some sequences."""
        self._batch_size, self._length, self.llm_length = batch, length, llm_length
        self._unseen = [(input_ids, position_ids)] if input_ids.shape[1] else []

    # ---- what transformers expects of a cache -------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:
        """The layers of the SLM's cache, which always holds the whole text."""
        return self.slm.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens that it has memory for, or -1 where it grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: the two models write into their own caches."""
        raise TypeError("CiterCache belongs to a CiterForCausalLM. Pass its `slm` or `llm` to one of the two models.")

    def reset(self) -> None:
        reset_cache(self.slm)
        reset_cache(self.llm)
        self._length = self.llm_length = 0
        self._batch_size = -1
        self._unseen = []
        self.routing = Routing()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: a negative number."""
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a negative number of tokens, got {tokens_to_remove}.")
        self.slm.crop(tokens_to_remove)
        self._length += tokens_to_remove
        from_llm = max(self.llm_length - self._length, 0)
        if self.llm_length > 0:
            self.llm.crop(-from_llm)
        self.llm_length -= from_llm
        kept, keep = [], self._length - self.llm_length
        for ids, positions in self._unseen:
            if keep > 0:
                kept.append((ids[:, :keep], None if positions is None else positions[:, :keep]))
            keep -= ids.shape[1]
        self._unseen = kept
        self.routing.crop(self._length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for cache in self._filled():
            cache.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for cache in self._filled():
            cache.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for cache in self._filled():
            cache.batch_repeat_interleave(repeats)
        if self._batch_size > 0:
            self._select(torch.arange(self._batch_size).repeat_interleave(repeats))

    def _filled(self) -> list[Cache]:
        # A layer of the LLM that has not processed anything is not even made yet.
        return [self.slm, self.llm] if self.llm_length > 0 else [self.slm]

    def _select(self, sequences: torch.Tensor) -> None:
        """Keep these sequences of the unseen tokens and of the record, in this order."""
        self._batch_size = sequences.shape[0]
        unseen, self._unseen = self._unseen, []
        for ids, positions in unseen:
            index = sequences.to(ids.device)
            if positions is not None and positions.shape[0] > 1:
                positions = positions[index]
            self._unseen.append((ids[index], positions))
        if not self.routing.follows_beams:
            self.routing.select(sequences)

    def activate_past_recording(self) -> None:
        self.slm.activate_past_recording()
        self.llm.activate_past_recording()

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before the first token."""
        return self._batch_size

    @property
    def is_compileable(self) -> bool:
        """False: `generate` compiles the passes of the two models itself, where the cache is static."""
        return False

    @property
    def is_croppable(self) -> bool:
        return all(cache.is_croppable for cache in self._filled())


def check_cache(cache: Any, batch_size: int | None = None) -> None:
    """Raise if a cache has no place for the LLM's keys and values, or holds another number of sequences."""
    # By name: a repository's own copy of this file has a class of its own.
    if type(cache).__name__ != CiterCache.__name__:
        raise TypeError(
            f"past_key_values: expected a CiterCache, got {type(cache).__name__}. Make one with "
            "`from citer_hf import CiterCache; CiterCache(model.config)`."
        )
    if batch_size is not None and cache.batch_size not in (-1, batch_size):
        raise ValueError(
            f"past_key_values: this cache holds {cache.batch_size} sequences, but input_ids has {batch_size}. Pass as "
            "many, or a new CiterCache(model.config)."
        )


SCORES, TO_LLM, VETOED, AGREED, UNFINISHED = range(5)  # columns of a step's record


class Routing:
    """What was decided, token by token, since a cache was made or `generate` was last called.

    Everything stays as the steps left it, until it is asked for.
    """

    def __init__(self, start: int = 0, follows_beams: bool = False):
        # Index in the text of the first token to decide; earlier tokens need no decision and get no record.
        self.start = start
        # Sequences are running beams then, whose order is put right at the end.
        self.follows_beams = follows_beams
        self.llm_calls = self.slm_calls = 0
        # A step: index of its first token, then p_slm, whether the LLM decided, vetoed, and agreed with a flagged
        # draft, and which sequences are unfinished, each [batch, tokens].
        self._steps: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        # Records of sequences that an engine decodes: rows of (p_slm, LLM decided, vetoed, agreed).
        self._live: Sequence[list[Any]] = ()

    def add(self, first: int, *records: torch.Tensor) -> None:
        """Add what was decided from a token on, in the order of `SCORES, TO_LLM, ...`, each `[batch, tokens]`."""
        skip = self.start - first
        if skip > 0:
            first, records = self.start, tuple(record[:, skip:] for record in records)
        if records[0].shape[1] > 0:
            self._steps.append((first, records))

    def follow(self, records: Sequence[list[Any]]) -> None:
        """Show the records of sequences as they grow, until `settle`."""
        self._live = records

    def settle(self, device: torch.device) -> None:
        """Turn the records of sequences that have ended into tensors."""
        if self._live:
            step = tuple(record.to(device) for record in self._live_records())
            self._live = ()
            self.add(self.start, *step)

    def _live_records(self) -> tuple[torch.Tensor, ...]:
        longest, empty = max(map(len, self._live)), (0.0, False, False, False)
        rows = [[row[:4] for row in record] + [empty] * (longest - len(record)) for record in self._live]
        scores, *flags = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), longest, 4).unbind(-1)
        lengths = torch.tensor([[len(record)] for record in self._live])
        return scores.float(), *(flag.bool() for flag in flags), torch.arange(longest) < lengths

    @property
    def to_llm(self) -> torch.Tensor:
        """Whether the LLM decided each token (flagged or vetoed), bool `[batch, generated]`; False after the end."""
        return self._joined(TO_LLM) & self._joined(UNFINISHED)

    @property
    def vetoed(self) -> torch.Tensor:
        """Whether the LLM took the SLM's token back, though it was not flagged, bool `[batch, generated]`."""
        return self._joined(VETOED) & self._joined(UNFINISHED)

    @property
    def scores(self) -> torch.Tensor:
        """`p_slm` of each token, float `[batch, generated]`."""
        return self._joined(SCORES)

    @property
    def unfinished(self) -> torch.Tensor:
        """Whether each token is a real one and not padding after the end, bool `[batch, generated]`."""
        return self._joined(UNFINISHED)

    @property
    def llm_share(self) -> float:
        """Share of the real tokens that the LLM decided; 0.0 when there are none."""
        real = int(self.unfinished.sum())
        return int(self.to_llm.sum()) / real if real else 0.0

    @property
    def accepted(self) -> float:
        """Share of the flagged tokens at which the LLM agreed with the SLM's draft; 0.0 when there are none."""
        flagged = self.to_llm & ~self.vetoed
        return int((flagged & self._joined(AGREED)).sum()) / max(int(flagged.sum()), 1)

    def by_llm(self, index: int) -> bool:
        """Return whether the LLM decided a token of a single sequence, without joining the record: for streams."""
        return bool(self.decision(index)[TO_LLM])

    def decision(self, index: int) -> tuple[Any, ...]:
        """Return about a token, as `by_llm` does: its score, whether the LLM decided, vetoed, agreed with a draft."""
        if self._live and index < len(self._live[0]):
            return tuple(self._live[0][index][:UNFINISHED])
        place = self.start + index
        for first, records in reversed(self._steps):
            if first <= place < first + records[TO_LLM].shape[1]:
                return tuple(record[0, place - first].item() for record in records[:UNFINISHED])
        raise IndexError(f"index: no token number {index} has been decided yet.")

    def __len__(self) -> int:
        return sum(records[SCORES].shape[1] for _, records in self._steps) + max(map(len, self._live), default=0)

    def __repr__(self) -> str:
        return f"Routing(tokens={len(self)}, llm_share={self.llm_share:.3f}, llm_calls={self.llm_calls})"

    def crop(self, length: int) -> None:
        """Forget the decisions about tokens that were taken back."""
        self._steps = [
            (first, tuple(record[:, : length + 1 - first] for record in records))
            for first, records in self._steps
            if first <= length
        ]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        self._steps = [
            (first, tuple(record[rows.to(record.device)] for record in records)) for first, records in self._steps
        ]

    def follow_beams(self, beam_indices: torch.Tensor) -> None:
        """Turn the record of running beams, step by step, into that of the returned sequences."""
        if not self._steps:
            return
        first, records = self._steps[0]
        rows = beam_indices.long().to(records[SCORES].device)
        length = min(rows.shape[1], len(self))
        rows, ended = rows[:, :length].clamp_min(0), rows[:, :length] < 0
        *parts, unfinished = (self._joined(part)[:, :length].gather(0, rows) for part in range(5))
        self._steps = [(first, (*parts, unfinished & ~ended))]

    def _joined(self, part: int) -> torch.Tensor:
        records = [records[part] for _, records in self._steps]
        if self._live:
            records.append(self._live_records()[part])
        if not records:
            return torch.zeros((0, 0), dtype=torch.float32 if part == SCORES else torch.bool)
        return torch.cat(records, dim=1)
