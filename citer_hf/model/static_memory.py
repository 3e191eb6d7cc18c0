"""What the static path reads and writes: keys, values and the state of every row, at addresses that never change."""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .kv_layers import room_like, show
from .masks import MaskKinds, attention_masks, mask_kinds
from .routers import defer

# Lengths of the LLM's catch-ups. What lies between two is filled up, since each is compiled on its own; on a GPU a
# pass over four tokens costs what one over two does.
BUCKETS = (1, 4, 16, 64)
# Columns of what the host tells the device before each pass: the place of a row's last token, the first place that the
# LLM has not read, and the last token itself.
LAST, UNREAD, TOKEN = range(3)


class PlacedLayer(DynamicLayer):
    """One layer's keys and values during one forward pass, whose new tokens go to given places."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.places = keys, values, places
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.places[:, None, :, None].to(key_states.device)
        self.keys.scatter_(-2, places.expand_as(key_states), key_states)
        self.values.scatter_(-2, places.expand_as(value_states), value_states)
        return self.keys, self.values


class Room:
    """The keys and values of one model, for a number of tokens that does not change."""

    def __init__(self, model: Any, cache: Cache, capacity: int, compiled: bool):
        self.windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        self.kinds: MaskKinds = mask_kinds(model, self.windows)
        self.states = [
            tuple(kept_in_place(room_like(states, capacity), compiled) for states in (layer.keys, layer.values))
            for layer in cache.layers
        ]
        self._layers: list[Any] = []

    def at(self, places: torch.Tensor) -> Cache:
        return Cache(layers=[PlacedLayer(keys, values, places) for keys, values in self.states])

    def take(self, cache: Cache) -> None:
        """Copy what a cache holds to the same places here; its layers show it from now on, so that it is held once."""
        self._layers, end = list(cache.layers), cache.get_seq_length()
        for layer, states in zip(self._layers, self.states, strict=True):
            held = layer.keys.shape[-2]
            for room, own in zip(states, (layer.keys, layer.values), strict=True):
                # Masks do not hide a NaN that an earlier text may have left.
                room.zero_().narrow(-2, end - held, held).copy_(own)
        self.hand_back(end)

    def hand_back(self, length: int) -> None:
        """Let the model's own cache show the first tokens of all rows, as it would hold them itself."""
        for layer, window, states in zip(self._layers, self.windows, self.states, strict=True):
            first = 0
            if window is not None:
                first = max(length - window + 1, 0)
                layer.cumulative_length = length
            show(layer, *(room.narrow(-2, first, length - first) for room in states))

    def let_go(self, keep: bool) -> None:
        """Part from the model's own cache: the room is used again."""
        for layer in self._layers if keep else ():
            show(layer, layer.keys.clone(), layer.values.clone())
        self._layers = []


class Workspace:
    """The state of the rows of one generation, on the SLM's device."""

    def __init__(self, rows: int, capacity: int, device: torch.device, compiled: bool = False):
        self.rows, self.capacity, self.device, self.compiled = rows, capacity, device, compiled

        def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return kept_in_place(torch.zeros((rows, columns), dtype=dtype, device=device), compiled)

        self.tokens = zeros(capacity, torch.long)
        self.readable = zeros(capacity, torch.bool)
        self.control = zeros(3, torch.long)
        self.offset = zeros(1, torch.long)
        self.threshold = zeros(1, torch.float64 if device.type in ("cpu", "cuda") else torch.float32)
        self._from_host = torch.zeros((rows, 3), dtype=torch.long, pin_memory=device.type == "cuda")
        self.rooms: dict[str, Room] = {}
        self.steps: dict[Any, Any] = {}

    @property
    def nowhere(self) -> int:
        """The place for tokens that only fill up a rectangle."""
        return self.capacity - 1

    def tell(self, control: list[list[int]]) -> None:
        """Tell the device where the rows are: one copy, which nothing waits for."""
        self._from_host.copy_(torch.tensor(control))
        self.control.copy_(self._from_host, non_blocking=True)

    def take(self, name: str, model: Any, cache: Cache) -> Room:
        if name not in self.rooms:
            self.rooms[name] = Room(model, cache, self.capacity, self.compiled)
        self.rooms[name].take(cache)
        return self.rooms[name]


def kept_in_place(tensor: torch.Tensor, compiled: bool) -> torch.Tensor:
    """Promise that a tensor stays where it is, so that a recorded graph may read and write it there."""
    if compiled:
        torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


# ---- the passes: functions of a model and a workspace alone, which a compiler can trace ---------------------------


def slm_pass(model: Any, work: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the SLM read the last token of every row."""
    places = work.control[:, LAST : LAST + 1]
    ids = work.control[:, TOKEN : TOKEN + 1]
    work.tokens.scatter_(1, places, ids)
    work.readable.scatter_(1, places, True)
    return read_with_slm(model, work, ids, places)


def read_with_slm(
    model: Any, work: Workspace, ids: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    room = work.rooms["slm"]
    mask, positions = attention_masks(room.kinds, work.readable, places), places + work.offset
    slm = model.run_slm(ids, room.at(places), ids.shape[1], attention_mask=mask, position_ids=positions)
    return slm.logits, slm.hidden


def decide(
    model: Any, work: Workspace, logits: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = model.router(hidden, logits)
    return scores, defer(scores, work.threshold), logits.argmax(-1)


def slm_step(model: Any, work: Workspace) -> tuple[torch.Tensor, ...]:
    """Let the SLM read the last token of every row, and the router decide about the next."""
    logits, hidden = slm_pass(model, work)
    return logits, *decide(model, work, logits, hidden)


def llm_pass(model: Any, work: Workspace, tokens: int) -> torch.Tensor:
    """Let the LLM read what it has not read of every row."""
    room = work.rooms["llm"]
    last, unread = work.control[:, LAST : LAST + 1], work.control[:, UNREAD : UNREAD + 1]
    places = last - tokens + 1 + torch.arange(tokens, device=last.device)
    real = places >= unread
    sees = torch.where(real, places, last)
    mask = attention_masks(room.kinds, work.readable, sees)
    places = places.clamp(min=0)
    ids, positions = work.tokens.gather(1, places), (places + work.offset).clamp(min=0)
    cache = room.at(torch.where(real, places, work.nowhere))
    return model.run_llm(ids, cache, 1, attention_mask=mask, position_ids=positions)[:, -1]
