"""How `forward` sees the SLM's last hidden state: permanent hooks that act for the thread that asks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel


class Watched(NamedTuple):
    """What one `forward` in one thread wants of the SLM."""

    head_inputs: list[torch.Tensor]
    wants_states: bool


watched: ContextVar[Watched | None] = ContextVar("watched", default=None)
# A compiler cannot trace a context variable. What it traces happens in one thread only, and a list that is set and
# taken away again within one trace is never there when the model runs.
HEARD = "_citer_heard"


def capture_head_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Keep what the output embeddings read, for the `forward` that asks for it in this thread."""
    heard = module.__dict__.get(HEARD)
    if heard is not None:
        heard.append(args[0])
        return
    wanted = watched.get()
    if wanted is not None:
        wanted.head_inputs.append(args[0])


def track_states(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    """Let hidden states that are asked for have gradients, though the weights are frozen."""
    if torch.compiler.is_dynamo_compiling():
        return
    wanted = watched.get()
    if wanted is not None and wanted.wants_states and torch.is_grad_enabled() and output.is_leaf:
        output.requires_grad_()


def watch(model: PreTrainedModel) -> None:
    """Install the hooks above, once."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if capture_head_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(capture_head_input)
    if track_states not in embeddings._forward_hooks.values():
        embeddings.register_forward_hook(track_states)


def set_heard(head: nn.Module, heard: list[torch.Tensor] | None) -> None:
    """Collect what the output embeddings read in a list, while a compiler traces; `None` ends that."""
    setattr(head, HEARD, heard)


def mark_initialized(model: nn.Module) -> None:
    """Keep `post_init`, which initialises what is new, away from weights that somebody has made already."""
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def hidden_size_of(model: PreTrainedModel) -> int:
    """Width of what a model's output embeddings read, which is what a router sees."""
    head: Any = model.get_output_embeddings()
    return int(getattr(head, "in_features", None) or model.config.get_text_config().hidden_size)
