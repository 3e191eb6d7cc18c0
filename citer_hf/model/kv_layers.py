"""Layers of keys and values that are written in place: for one length, and for rows of different lengths."""

import weakref
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that appends in place, so that a step costs the same at any length of the text."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._own_keys: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        # Whoever crops or reorders the layer leaves other tensors here, and perhaps still reads the old ones.
        stale = self._room is None or self.keys is not self._own_keys or end > self._room[0].shape[-2]
        # A text may have begun under autocast, whose values have fewer bits.
        if stale or (length and any(map(has_more_bits, (key_states, value_states), self._room or ()))):
            self._make_room(key_states, value_states, length, end)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room.narrow(-2, length, end - length).copy_(states)
        self.keys, self.values = (room.narrow(-2, 0, end) for room in self._room)
        self._own_keys = self.keys
        return self.keys, self.values

    def _make_room(self, key_states: torch.Tensor, value_states: torch.Tensor, length: int, end: int) -> None:
        # A prompt is read at the peak of memory: it gets no room to spare until the first token needs it.
        capacity = end + end // 8 + 64 if length else end
        self._room = room_like(key_states, capacity), room_like(value_states, capacity)
        if length and self.keys is not None and self.values is not None:
            for room, filled in zip(self._room, (self.keys, self.values), strict=True):
                room.narrow(-2, 0, length).copy_(filled)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def show(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold other tensors from now on, and give the memory of its own back."""
        self.keys, self.values, self._room, self._own_keys = keys, values, None, None


def has_more_bits(states: torch.Tensor, room: torch.Tensor) -> bool:
    """Return True if values lose precision in the memory for them."""
    return states.dtype != room.dtype and torch.promote_types(states.dtype, room.dtype) != room.dtype


def show(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(layer, GrowingLayer):
        layer.show(keys, values)
    else:
        layer.keys, layer.values = keys, values


def room_like(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return room for keys or values; it is filled with zeros, since masks do not hide a NaN."""
    # A cache outlives `generate`, and so must not be made of tensors that only inference mode may change.
    with torch.inference_mode(False):
        return states.new_zeros((*states.shape[:-2], capacity, states.shape[-1]))


def all_grow(cache: Cache) -> bool:
    """Say whether nothing in a cache is made by another layer than `GrowingLayer`."""
    return bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)


def growing_cache(config: PreTrainedConfig | None) -> DynamicCache:
    """Return transformers' dynamic cache, with layers that append in place where they keep the whole text."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RowsLayer(DynamicLayer):
    """Keys and values of rows that move at their own pace: every row is written where its own text ends."""

    def __init__(self, layer: Any, rows: "RowsCache"):
        super().__init__()
        self.layer = layer
        # A cycle would keep the keys and values of many texts until Python happens to look for cycles.
        self._rows: Any = weakref.proxy(rows)
        self.window = getattr(layer, "sliding_window", None)
        self._room = tuple(room_like(states, rows.capacity) for states in (layer.keys, layer.values))
        held = layer.keys.shape[-2]
        for room, states in zip(self._room, (layer.keys, layer.values), strict=True):
            room.narrow(-2, rows.start - held, held).copy_(states)
        # The prompts stay readable in their layer, and are held once.
        show(layer, *(room.narrow(-2, rows.start - held, held) for room in self._room))
        self.keys, self.values = self._room
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each row's new keys and values to its own places, and return all that any row may see."""
        if self._room[0].shape[-2] < self._rows.capacity:
            self._room = tuple(self._moved(room) for room in self._room)
        places = self._rows.places[:, None, :, None]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room.scatter_(-2, places.to(room.device).expand_as(states), states)
        self.keys, self.values = (room.narrow(-2, 0, self._rows.visible) for room in self._room)
        return self.keys, self.values

    def _moved(self, room: torch.Tensor) -> torch.Tensor:
        larger = room_like(room, self._rows.capacity)
        # The last place is for what nobody reads; it moves to the new end.
        larger.narrow(-2, 0, room.shape[-2] - 1).copy_(room.narrow(-2, 0, room.shape[-2] - 1))
        return larger

    def get_seq_length(self) -> int:
        return self._rows.visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.visible, 0

    def hand_back(self, length: int) -> None:
        """Leave the first tokens of all rows in the layer that held the prompts, as it would hold them itself."""
        first = 0
        if self.window is not None:
            first = max(length - self.window + 1, 0)
            self.layer.cumulative_length = length
        show(self.layer, *(room.narrow(-2, first, length - first) for room in self._room))


class RowsCache(Cache):
    """The cache of one model while rows move at their own pace."""

    def __init__(self, cache: Cache, capacity: int):
        self.start = self.visible = cache.get_seq_length()
        self.capacity = max(capacity, self.start + 1)
        self.places = torch.empty(0)
        super().__init__(layers=[RowsLayer(layer, self) for layer in cache.layers])

    @property
    def nowhere(self) -> int:
        return self.capacity - 1

    def make_room(self, visible: int) -> None:
        self.visible = visible
        if visible >= self.capacity:
            self.capacity = visible + visible // 8 + 64

    def hand_back(self, length: int) -> None:
        for layer in self.layers:
            layer.hand_back(length)


def layers_can_part(cache: Cache) -> bool:
    """Say whether every layer of a cache keeps tokens by their place, so that rows may move at their own pace."""
    kinds = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
    offloads = getattr(cache, "offloading", False)
    return not offloads and bool(cache.layers) and all(type(layer) in kinds for layer in cache.layers)
