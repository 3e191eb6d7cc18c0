"""Which passes are compiled, and where compiled passes and the memory that they are bound to are kept."""

import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from .compat import not_compiled
from .routers import ROUTERS
from .static_memory import BUCKETS, Workspace, decide, llm_pass, slm_pass, slm_step

logger = logging.get_logger(__name__)

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


class CompiledSteps:
    """The workspaces of a model whose passes are compiled, by batch size and by what they were compiled for."""

    def __init__(self) -> None:
        self._kept: dict[Any, Workspace] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledSteps, ()

    @contextmanager
    def workspace(self, model: Any, settings: GenerationConfig, rows: int, length: int) -> Iterator[Workspace]:
        slm_options, llm_options = (compile_options(model, part, settings) for part in (model.slm, model.llm))
        if (slm_options is None and llm_options is None) or not _recording.acquire(blocking=False):
            yield new_workspace(model, rows, length, None, None)
            return
        try:
            prepare_thread(model.slm.device)
            key = (rows, compiled_for(model), repr(slm_options), repr(llm_options))
            # An error leaves caches that show parts of the workspace: then nobody gets it again.
            work = self._kept.pop(key, None)
            if work is None or work.capacity <= length:
                work = new_workspace(model, rows, length, slm_options, llm_options)
            yield work
            self._kept[key] = work
            while len(self._kept) > KEPT:
                self._kept.pop(next(iter(self._kept)))
        finally:
            _recording.release()


def new_workspace(
    model: Any, rows: int, length: int, slm_options: dict[str, Any] | None, llm_options: dict[str, Any] | None
) -> Workspace:
    compiled = slm_options is not None or llm_options is not None
    capacity = max(1 << (length - 1).bit_length(), 256) + 64 if compiled else -(-(length + 1) // 64) * 64
    # It outlives the generation that it is made for, which may run in inference mode.
    with torch.inference_mode(False):
        work = Workspace(rows, capacity, model.slm.device, compiled)
    work.steps = {
        "slm_step": Step(slm_step, slm_options),
        "slm_pass": Step(slm_pass, slm_options),
        **{tokens: Step(llm_pass, llm_options) for tokens in BUCKETS},
    }
    return work


def read_and_decide(model: Any, work: Workspace) -> tuple[tuple[torch.Tensor, ...], bool]:
    ours = type(model.router) in ROUTERS.values()
    step = work.steps["slm_step" if ours else "slm_pass"]
    settled = step.settled
    # What the graphs of the step before have returned is not needed any more.
    step.begin(work.device)
    if ours:
        return step(model, work), settled
    logits, hidden = step(model, work)
    return (logits, *decide(model, work, logits, hidden)), settled


def catch_up(model: Any, work: Workspace, unread: int) -> tuple[torch.Tensor, bool]:
    """Run one catch-up of the LLM, filled up to one of a few lengths; a very long one is not compiled."""
    tokens = next((size for size in BUCKETS if size >= unread), None)
    if tokens is None:
        return llm_pass(model, work, unread), False
    step = work.steps[tokens]
    settled = step.settled
    return step(model, work, tokens), settled


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
