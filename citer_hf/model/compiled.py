"""The engine's two steps with fixed shapes, compiled, and the memory that they are bound to."""

import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from .compat import not_compiled
from .routers import ROUTERS
from .sequence import MOST_DRAFTS
from .slots import Masks, Pass, SlotCache

logger = logging.get_logger(__name__)

# Tokens of a catch-up. What lies between two is filled up, since each is compiled on its own; on a GPU a pass over
# four tokens takes as long as one over two.
WIDTHS = (1, 4, 16, 64)
# Where `generate` of transformers compiles by itself.
ACCELERATORS = ("cuda", "xpu", "neuron", "tpu")
# A recorded graph: the first call compiles, the second warms up, the third records.
CALLS_UNTIL_SETTLED = 3
# Batch sizes whose compiled passes and memory are kept.
KEPT = 4
# Graphs are recorded and replayed by one thread of the process at a time. Another generation meanwhile does without.
_recording = threading.Lock()


class Step:
    """One pass: compiled if that is wanted and possible."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None):
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self._calls = 0
        if options is not None:
            own = own_code(function)
            self._compiled = torch.compile(own, **options)
            # The compiler keeps what it has made as long as there is the code.
            reset: Any = torch._dynamo.eval_frame.reset_code  # type: ignore[attr-defined]
            weakref.finalize(self, reset, own.__code__).atexit = False

    @property
    def settled(self) -> bool:
        """Whether the next call takes as long as all that follow."""
        return self._compiled is None or self._calls >= CALLS_UNTIL_SETTLED

    def begin(self, device: torch.device) -> None:
        """Say that a new step begins: what recorded graphs have returned may be overwritten."""
        if self._compiled is not None and device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            try:
                result = self._compiled(*args)
            except not_compiled() as error:
                self._compiled = None
                reason = str(error).strip().partition("\n")[0]
                logger.warning_once(
                    "cache_implementation='static': a pass of this pair cannot be compiled and runs as it is, which "
                    f"gives the same text, but not the speed. {type(error).__name__}: {reason}"
                )
            else:
                self._calls += 1
                return result
        return self._function(*args)


class PlacedLayer(DynamicLayer):
    """One layer's keys and values during one pass of fixed shape: new tokens go to given places."""

    def __init__(self, states: Any, places: torch.Tensor):
        super().__init__()
        self.keys, self.values = states
        self.places, self.is_initialized = places, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.places[:, None, :, None].to(key_states.device)
        self.keys.scatter_(-2, index.expand_as(key_states), key_states)
        self.values.scatter_(-2, index.expand_as(value_states), value_states)
        return self.keys, self.values


class Workspace:
    """The slots of both models, and passes over all of them with shapes and addresses that never change."""

    def __init__(self, model: Any, slots: int, capacity: int, options: dict[str, dict[str, Any] | None]):
        self.slots, self.capacity, self.device = slots, capacity, model.slm.device
        self.caches = {role: SlotCache(getattr(model, role).config, Pass(fixed=True)) for role in options}
        self.masks = {role: Masks.of(getattr(model, role), cache) for role, cache in self.caches.items()}
        # Ids, places, last places seen, positions and first places seen, for each width.
        self.inputs = {width: torch.zeros((5, slots, width), dtype=torch.long, device=self.device) for width in WIDTHS}
        for staged in self.inputs.values():
            torch._dynamo.mark_static_address(staged, guard=False)
        self.routed = type(model.router) in ROUTERS.values()
        self._compiled = {role for role, one in options.items() if one is not None}
        self._steps = {
            ("slm", 1): Step(slm_step if self.routed else slm_pass, options["slm"]),
            **{("llm", width): Step(llm_pass, options["llm"]) for width in WIDTHS},
        }

    def takes(self, role: str, width: int) -> bool:
        """Return True if a pass over so many tokens of a sequence has a compiled form, and memory to work on."""
        filled = all(layer.buffers is not None for layer in self.caches[role].layers)
        return role in self._compiled and filled and width <= (1 if role == "slm" else WIDTHS[-1])

    def width(self, role: str, width: int) -> int:
        """Return the width of the pass for so many tokens."""
        return next(one for one in WIDTHS if one >= width)

    def run(self, model: Any, role: str, inputs: torch.Tensor, columns: list[int]) -> Any:
        """Run one pass; return logits, for the SLM the scores, and whether it takes as long as all that follow."""
        width = inputs.shape[-1]
        step = self._steps[role, width]
        settled = step.settled
        # What the graphs of the step before have returned is not needed any more.
        step.begin(self.device)
        source = inputs.pin_memory() if self.device.type == "cuda" else inputs
        self.inputs[width].copy_(source, non_blocking=True)
        if role == "llm":
            logits = step(model, self, width)
            return logits[:, [logits.shape[1] - column for column in columns]], None, settled
        logits, scores = step(model, self)
        return logits, scores if self.routed else model.router(scores, logits), settled

    def at(self, role: str, width: int) -> tuple[torch.Tensor, Cache, dict[str, Any]]:
        """Return ids, cache, masks and positions of a pass, from what is staged."""
        ids, places, last, positions, first = self.inputs[width].unbind(0)
        cache = Cache(layers=[PlacedLayer(layer.buffers, places) for layer in self.caches[role].layers])
        mask = self.masks[role](first[:, :1], last, self.capacity)
        return ids, cache, {"attention_mask": mask, "position_ids": positions}

    def take(self, cache: Any) -> None:
        """Copy what a cache holds; the rest is zeros, since a mask does not hide a NaN of an earlier sequence."""
        for role, own in self.caches.items():
            for layer, source in zip(own.layers, getattr(cache, role).layers, strict=True):
                for buffer in layer.buffers or ():
                    buffer.zero_()
                if source.keys is not None and source.get_seq_length():
                    layer.reserve(source.keys, source.values, self.slots, self.capacity)
                    for buffer, states in zip(layer.buffers, (source.keys, source.values), strict=True):
                        buffer[:, :, : states.shape[-2]].copy_(states)

    def give_back(self, cache: Any) -> None:
        """Leave a copy of what is shown in a cache: the memory here is used again."""
        for role, own in self.caches.items():
            for layer, target in zip(own.layers, getattr(cache, role).layers, strict=True):
                if layer.buffers is not None:
                    target.hold(layer.keys.clone(), layer.values.clone())


# ---- the passes: functions of a model and a workspace alone, which a compiler can trace ---------------------------


def slm_pass(model: Any, work: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the SLM over the last token of every slot: logits and hidden states `[slots, 1, ...]`."""
    ids, cache, inputs = work.at("slm", 1)
    slm = model.run_slm(ids, cache, 1, **inputs)
    return slm.logits, slm.hidden


def slm_step(model: Any, work: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the SLM over the last token of every slot, and the router: logits and scores."""
    logits, hidden = slm_pass(model, work)
    return logits, model.router(hidden, logits)


def llm_pass(model: Any, work: Workspace, width: int) -> torch.Tensor:
    """Run the LLM over what it has not seen of every slot: logits of the last positions."""
    ids, cache, inputs = work.at("llm", width)
    # No more tokens are ever judged.
    return model.run_llm(ids, cache, min(width, MOST_DRAFTS), **inputs)


class CompiledSteps:
    """The workspaces of a model whose passes are compiled, by batch size and by what they were compiled for."""

    def __init__(self) -> None:
        self._kept: dict[Any, Workspace] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledSteps, ()

    @contextmanager
    def workspace(self, model: Any, settings: GenerationConfig, slots: int, length: int) -> Iterator[Workspace | None]:
        """Lend the workspace for so many slots of so many tokens, or `None` where nothing is compiled."""
        options = {role: compile_options(model, getattr(model, role), settings) for role in ("slm", "llm")}
        if not any(options.values()) or not _recording.acquire(blocking=False):
            yield None
            return
        try:
            prepare_thread(model.slm.device)
            key = (slots, compiled_for(model), repr(options))
            # An error leaves memory in an unknown state: then nobody gets it again.
            work = self._kept.pop(key, None)
            if work is None or work.capacity <= length:
                # It outlives the generation that it is made for, which may run in inference mode.
                with torch.inference_mode(False):
                    capacity = max(1 << (length - 1).bit_length(), 256) + 64
                    work = Workspace(model, slots, capacity, options)
            yield work
            self._kept[key] = work
            while len(self._kept) > KEPT:
                self._kept.pop(next(iter(self._kept)))
        finally:
            _recording.release()


def compile_options(model: Any, part: Any, settings: GenerationConfig) -> dict[str, Any] | None:
    """Return how to compile the passes of a model, or `None` where transformers would not compile it."""
    config = settings.compile_config
    if settings.disable_compile:
        return None
    everywhere = config is not None and bool(config._compile_all_devices)
    if part.device.type not in ACCELERATORS and not everywhere:
        return None
    reason = why_not_compiled(model, part)
    if reason:
        logger.warning_once(f"cache_implementation='static': {type(part).__name__} is not compiled: {reason}.")
        return None
    options = (config or part._default_compile_config()).to_dict()
    # A pass that breaks into several graphs costs what it costs uncompiled, and more time to compile; and every pass
    # has one length.
    return {**options, "fullgraph": True, "dynamic": False}


def why_not_compiled(model: Any, part: Any) -> str:
    if not part._can_compile_fullgraph:
        return "transformers does not compile it"
    quantizer = getattr(part, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its kind of quantization does not support it"
    if any(hasattr(module, "_hf_hook") for module in part.modules()) or part.device != model.slm.device:
        return "its weights are on several devices, or moved while it runs, or on another device than the SLM's"
    return ""


def compiled_for(model: Any) -> tuple[Any, ...]:
    """Return what compiled passes and their memory depend on, beside shapes."""
    kind = model.slm.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, *(
        (part.device, part.dtype, part.config.get_text_config()._attn_implementation)
        for part in (model.slm, model.llm)
    )


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with code of its own: the compiler counts recompilations by code, and gives up at 8."""
    code: Any = function.__code__
    return types.FunctionType(code.replace(), function.__globals__, function.__name__)


def prepare_thread(device: torch.device) -> None:
    """Let this thread record graphs: torch prepares only the thread that imports its graph trees."""
    if device.type != "cuda":
        return
    from torch._inductor import cudagraph_trees

    if not hasattr(cudagraph_trees.local, "tree_manager_containers"):
        cudagraph_trees._initialize_tls(cudagraph_trees.local)
