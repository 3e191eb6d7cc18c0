"""Keys and values of many sequences: a slot for each, whose places are written where the sequence stands."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

States = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Pass:
    """Where the tokens of the next pass stand. Without slots: behind the last token of a batch in lock-step."""

    slots: slice | torch.Tensor | None = None  # the slots that take part: next to each other, or anywhere
    start: int = 0  # place of the first new token, where one slot takes part
    first: int = 0  # first place that is shown, where one slot takes part
    places: torch.Tensor | None = None  # place of each new token, [slots, tokens], where several take part
    visible: int = 0  # places that are shown, where several take part
    batch: int = 0  # slots in memory
    capacity: int = 0  # places in memory
    fixed: bool = False  # whether the memory stays where it is, for recorded graphs


class SlotLayer(DynamicLayer):
    """A layer's keys and values `[slots, heads, places, width]`, written in place; the memory grows now and then."""

    def __init__(self, at: Pass, window: int | None = None):
        super().__init__()
        self.at, self.window = at, window
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.buffers: States | None = None
        self._own_keys: torch.Tensor | None = None
        self._slots: tuple[slice | None, Any] = (None, None)
        self._reserved: tuple[Any, ...] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.at
        if at.slots is None:
            if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
                return super().update(key_states, value_states, *args, **kwargs)
            return self._append(key_states, value_states)
        self.reserve(key_states, value_states, at.batch, at.capacity)
        assert self.buffers is not None
        if isinstance(at.slots, torch.Tensor):
            return self._gather(at.slots.to(key_states.device), (key_states, value_states))
        if self._slots[0] != at.slots:
            self._slots = at.slots, tuple(buffer[at.slots] for buffer in self.buffers)
        if at.places is None:
            shown = (write(*both, at.start, at.first) for both in zip(self._slots[1], (key_states, value_states)))  # noqa: B905
        else:
            index = at.places[:, None, :, None].to(key_states.device)
            for slots, states in zip(self._slots[1], (key_states, value_states), strict=True):
                slots.scatter_(-2, index.expand_as(states), states.to(slots.dtype))
            shown = (slots.narrow(-2, 0, at.visible) for slots in self._slots[1])
        return tuple(shown)  # type: ignore[return-value]

    def _gather(self, slots: torch.Tensor, states: States) -> States:
        """Write the new keys and values of slots anywhere; return copies of what these slots show."""
        assert self.at.places is not None and self.buffers is not None
        places = self.at.places.to(slots.device)
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[slots[:, None], :, places] = new.transpose(1, 2).to(buffer.dtype)
        keys, values = (buffer.narrow(-2, 0, self.at.visible).index_select(0, slots) for buffer in self.buffers)
        return keys, values

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = super().get_seq_length()
        end = length + key_states.shape[-2]
        fits = self.buffers is not None and end <= self.buffers[0].shape[-2]
        # A prompt is processed at the peak of memory: it gets no memory to spare until the first token needs it.
        capacity = self.buffers[0].shape[-2] if fits and self.buffers else end + end // 8 + 64 if length else end
        self.reserve(key_states, value_states, len(key_states), capacity)
        assert self.buffers is not None
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            write(buffer, states, length)
        self.show(end)
        return self.keys, self.values  # type: ignore[return-value]

    def reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, batch: int, capacity: int) -> None:
        """Allocate memory for so many slots and places, unless there is enough, and keep what it holds."""
        wanted = batch, capacity, key_states.dtype
        if self._reserved == wanted and self.keys is self._own_keys:
            return
        old = self.buffers
        # Whoever crops or reorders a layer leaves other tensors in it.
        if self.keys is not self._own_keys:
            old = None if self.keys is None or self.values is None or self.keys.dim() < 4 else (self.keys, self.values)
        # A sequence may have begun under autocast, whose values have fewer bits.
        new = (key_states, value_states)
        types = [
            states.dtype if held is None else torch.promote_types(states.dtype, held.dtype)
            for states, held in zip(new, old or (None, None), strict=True)
        ]
        self._reserved = None
        fits = old is not None and old[0].shape[0] >= batch and old[0].shape[-2] >= capacity
        if fits and old is self.buffers and types == [held.dtype for held in old or ()]:
            self._reserved = wanted
            return
        self.is_initialized, self._slots = True, (None, None)
        self.dtype, self.device = key_states.dtype, key_states.device
        length = super().get_seq_length() if self.keys is not None else 0
        self.buffers = tuple(  # type: ignore[assignment]
            enlarged(held, states, batch, capacity, dtype)
            for states, held, dtype in zip(new, old or (None, None), types, strict=True)
        )
        if self.at.fixed:
            for buffer in self.buffers or ():
                torch._dynamo.mark_static_address(buffer, guard=False)
        self.show(length)
        self._reserved = wanted

    def show(self, length: int) -> None:
        """Hold so many places of all slots, as a batch in lock-step does."""
        if self.buffers is not None:
            self.keys, self.values = (buffer.narrow(-2, 0, length) for buffer in self.buffers)
            self._own_keys = self.keys

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold other tensors from now on, and give the memory back."""
        self.keys, self.values, self.buffers, self._own_keys, self._reserved = keys, values, None, None, None
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def copy(self, source: int, target: int, end: int) -> None:
        """Copy the first places of a slot to another."""
        for buffer in self.buffers or ():
            buffer[target, :, :end].copy_(buffer[source, :, :end])

    def get_seq_length(self) -> int:
        at = self.at
        if at.slots is None:
            return super().get_seq_length()
        return at.start - at.first if at.places is None else at.visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        new = 0 if self.at.slots is not None and self.at.places is not None else query_length
        return self.get_seq_length() + new, 0


def write(buffer: torch.Tensor, states: torch.Tensor, start: int, first: int = 0) -> torch.Tensor:
    """Write new keys or values from a place on; return all from the first place that is shown."""
    new = states.shape[-2]
    buffer.narrow(-2, start, new).copy_(states)
    return buffer.narrow(-2, first, start + new - first)


def enlarged(
    held: torch.Tensor | None, states: torch.Tensor, batch: int, capacity: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return memory of zeros, since a mask does not hide a NaN, with what was held before."""
    slots, places = (0, 0) if held is None else (held.shape[0], held.shape[-2])
    shape = (max(batch, slots), states.shape[1], max(capacity, places), states.shape[-1])
    # A cache outlives `generate`, and so must not be made of tensors that only inference mode may change.
    with torch.inference_mode(False):
        new = states.new_zeros(shape, dtype=dtype)
        if held is not None:
            new[:slots, :, :places].copy_(held)
    return new


class SlotCache(DynamicCache):
    """transformers' dynamic cache, whose layers keep every sequence in a slot, where they keep tokens at all."""

    def __init__(self, config: PreTrainedConfig | None = None, at: Pass | None = None):
        super().__init__(config=config)
        self.at = Pass() if at is None else at
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        self.layers: list[Any] = [
            SlotLayer(self.at, getattr(layer, "sliding_window", None)) if type(layer) in kinds else layer
            for layer in self.layers
        ]
        if getattr(config, "is_remote", False):
            # A remote model keeps the text alone.
            self.layers = [SlotLayer(self.at)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._kept_here(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._kept_here(layer_idx))

    def _kept_here(self, layer: int) -> int:
        """Return a layer that keeps tokens: a process of a pipeline has none of some layers."""
        if not keeps_slots(self) or layer >= len(self.layers) or self.layers[layer].is_initialized:
            return layer
        return next((place for place, one in enumerate(self.layers) if one.is_initialized), layer)


def keeps_slots(cache: Any) -> bool:
    """Return True if every layer keeps its tokens in slots."""
    return bool(cache.layers) and all(type(layer) is SlotLayer for layer in cache.layers)


def takes_back(cache: Any) -> bool:
    """Return True if a pair can take tokens of both models back, which drafts and vetoes need."""
    return keeps_slots(cache.slm) and keeps_slots(cache.llm)


@dataclass(frozen=True)
class Masks:
    """Makes the attention masks that a model wants."""

    windows: tuple[int | None, ...]
    by_kind: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, cache: Any) -> "Masks":
        windows = tuple(sorted({layer.window for layer in cache.layers}, key=lambda window: window or 0))
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        return cls(windows, len(windows) > 1 or (None not in windows and bool(kinds)), model.dtype)

    def __call__(
        self, first: torch.Tensor, last: torch.Tensor, visible: int, shown: torch.Tensor | None = None
    ) -> Any:
        """Return masks `[slots, 1, tokens, visible]` of tokens at places `last` `[slots, tokens]`.

        They are added to attention scores: made once per pass, where a bool would be made into one at every layer.
        A token sees what is from `first` `[slots, 1]` on, and of that what is `shown` `[slots, visible]`.
        """
        places = torch.arange(visible, device=last.device)
        distance = last[:, :, None] - places
        seen = (distance >= 0) & (places >= first[:, :, None])
        if shown is not None:
            seen &= shown[:, None]
        masks = {}
        for window in self.windows:
            within = seen if window is None else seen & (distance < window)
            mask = torch.zeros(within.shape, dtype=self.dtype, device=last.device)
            masks["full_attention" if window is None else "sliding_attention"] = mask.masked_fill_(
                ~within, torch.finfo(self.dtype).min
            )[:, None]
        return masks if self.by_kind else next(iter(masks.values()))
