"""What `citer chat` does: read a line, answer it or obey it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import StoppingCriteria

from .conversation import Conversation
from .model.modeling import CiterForCausalLM
from .model.routers import as_threshold
from .terminal import Paint, legend

__all__ = ["chat", "load_pair"]

HELP = """\
/threshold X  the SLM writes a token when its score reaches X: 0 is the SLM alone, above 1 the LLM alone
/stats        tokens, by whom, and how fast: the last answer and the whole chat
/reset        start a new chat
/help         this list
/exit         leave, as does Ctrl-D; Ctrl-C stops an answer"""


def chat(
    path: str, router_threshold: float | None, max_new_tokens: int, system: str | None, options: dict[str, Any]
) -> None:
    """Chat in the terminal until the user leaves."""
    model, tokenizer = load_pair(path, options)
    conversation = Conversation(model, tokenizer, max_new_tokens, system, router_threshold)
    print(f"{legend(sys.stdout)} Threshold {conversation.router_threshold:g}. /help lists the commands.")
    prompt = ""
    if sys.stdin.isatty():
        # Importing it gives `input` a history and an editor.
        with suppress(ImportError):
            import readline  # noqa: F401
        prompt = "> "
    while True:
        try:
            line = input(prompt).strip()
            if line in ("/exit", "/quit"):
                return
            if line:
                obey(conversation, line) if line.startswith("/") else answer(conversation, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves.")


def load_pair(path: str, options: dict[str, Any]) -> tuple[CiterForCausalLM, Any]:
    """Load a pair and its tokenizer."""
    try:
        model = CiterForCausalLM.from_pretrained(path, **options)
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        # This is what torch says of a precision or a device that there is not.
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    tokenizer = model.load_tokenizer()
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer. Save one there: tokenizer.save_pretrained({path!r}).")
    return model, tokenizer


def answer(conversation: Conversation, text: str) -> None:
    """Print the answer to a message, or why there is none."""
    try:
        with StopOnInterrupt() as stop:
            turn = conversation.ask(text, Paint(sys.stdout), stop)
    except KeyboardInterrupt:
        print("\n(stopped; the next answer reads the whole chat again)")
    except torch.OutOfMemoryError:
        print("\nOut of memory; both caches were dropped. /reset starts a new chat.", file=sys.stderr)
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
    else:
        if stop.requested:
            print("(stopped)")
        elif turn.cut:
            print(f"(the models read at most {conversation.context} tokens, and this chat has that many: try /reset)")


def obey(conversation: Conversation, line: str) -> None:
    """Carry out a command."""
    name, _, argument = line[1:].partition(" ")
    if name in COMMANDS:
        COMMANDS[name](conversation, argument.strip())
    else:
        print(f"Error: there is no command /{name}; /help lists them.", file=sys.stderr)


def set_threshold(conversation: Conversation, argument: str) -> None:
    """Change the threshold, or say what it is."""
    if argument:
        try:
            conversation.router_threshold = as_threshold(float(argument))
        except ValueError:
            print(f"Error: {argument} is no threshold: give a number from 0 to 2, such as 0.7.", file=sys.stderr)
            return
    print(f"threshold {conversation.router_threshold:g}")


def print_stats(conversation: Conversation, argument: str) -> None:
    """Say what the last answer and the whole chat took."""
    print(f"last answer  {conversation.last}\nwhole chat   {conversation.total}")


def reset(conversation: Conversation, argument: str) -> None:
    """Start a new chat."""
    conversation.reset()
    print("new chat")


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "threshold": set_threshold,
    "stats": print_stats,
    "reset": reset,
    "help": lambda conversation, argument: print(HELP),
}


class StopOnInterrupt(StoppingCriteria):
    """Ends an answer after the token during which the user pressed Ctrl-C; a second Ctrl-C does not wait for it."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device)

    def __enter__(self) -> StopOnInterrupt:
        # Python lets only the main thread listen to signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
