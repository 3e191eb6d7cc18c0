"""A chat with a pair in the terminal: `citer chat`."""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from .model.cache import CiterCache
from .model.modeling import CiterForCausalLM
from .model.routers import as_threshold
from .runs import CommandOptions, option
from .terminal import Paint, WriterStreamer, legend


@dataclass(frozen=True)
class ChatOptions(CommandOptions):
    router_threshold: float | None = option(
        None, "The SLM's token stands when its score reaches this. [default: the router's own]", metavar="X"
    )
    max_new_tokens: int = option(512, "Longest answer, in tokens.", metavar="N", min=1)
    system: str | None = option(None, "System message.", metavar="TEXT")


class Conversation:
    """The messages so far, and a cache of their text, for as long as the chat template leaves it as it was."""

    cache: CiterCache
    # The tokens that the cache holds.
    _cached: list[int]

    def __init__(self, model: CiterForCausalLM, tokenizer: Any, options: ChatOptions):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        threshold = options.router_threshold
        self.router_threshold = model.default_threshold if threshold is None else threshold
        self.reset()

    def reset(self) -> None:
        """Forget everything but the settings."""
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.stats = "no answer yet"
        self._drop_cache()

    def ask(self, text: str, paint: Paint) -> None:
        """Answer a message, painting the answer as it is written."""
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids, context = list(rendered["input_ids"]), self.model.config.max_position_embeddings
        room = self.options.max_new_tokens if context is None else context - len(ids)
        if room <= 0:
            raise ValueError(
                f"this chat with your message has {len(ids)} tokens, and the models read at most {context}. "
                "/reset starts a new chat."
            )
        if ids[: len(self._cached)] != self._cached or len(ids) == len(self._cached):
            self._drop_cache()
        cache = self.cache
        # An answer that is interrupted leaves its cache half-way.
        self._drop_cache()
        streamer = WriterStreamer(self.tokenizer, cache, paint)
        began = time.perf_counter()
        input_ids = torch.tensor([ids], device=self.model.device)
        try:
            self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=cache,
                router_threshold=self.router_threshold,
                streamer=streamer,
                max_new_tokens=min(room, self.options.max_new_tokens),
                # A published generation config may ask for another cache, for none, or for several sequences.
                cache_implementation=None,
                use_cache=True,
                prompt_lookup_num_tokens=None,
                num_beams=1,
                num_return_sequences=1,
                # Published stop strings need it.
                **({"tokenizer": self.tokenizer} if self.model.generation_config.stop_strings else {}),
            )
        finally:
            if streamer.tokens:
                answer = self.tokenizer.decode(streamer.tokens, skip_special_tokens=True)
                self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.cache, self._cached = cache, (ids + streamer.tokens)[: cache.get_seq_length()]
        routing, tokens, by_llm = cache.routing, len(streamer.tokens), int(cache.routing.to_llm.sum())
        self.stats = (
            f"{tokens} tokens: {tokens - by_llm} by the SLM, {by_llm} by the LLM ({routing.llm_share:.1%}); "
            f"{routing.llm_calls} LLM forward passes; {tokens / (time.perf_counter() - began):.1f} tokens/s"
        )

    def _drop_cache(self) -> None:
        self.cache, self._cached = CiterCache(self.model.config), []


HELP = """\
/threshold X  the SLM writes a token when its score reaches X: 0 is the SLM alone, above 1 the LLM alone
/stats        tokens of the last answer, by whom, and how fast
/reset        start a new chat
/help         this list
/exit         leave, as does Ctrl-D; Ctrl-C stops an answer"""


def chat(model: CiterForCausalLM, **options: Any) -> None:
    """Chat in the terminal until the user leaves; the options are the fields of `ChatOptions`."""
    chosen = ChatOptions(**options)
    tokenizer = model.load_tokenizer()
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(
            f"{model.name_or_path} has no tokenizer.json. Save one there: tokenizer.save_pretrained(...)."
        )
    conversation = Conversation(model, tokenizer, chosen)
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


def answer(conversation: Conversation, text: str) -> None:
    """Print the answer to a message, or why there is none."""
    try:
        conversation.ask(text, Paint(sys.stdout))
    except KeyboardInterrupt:
        print("\n(stopped; the next answer reads the whole chat again)")
    except torch.OutOfMemoryError:
        print("\nOut of memory; both caches were dropped. /reset starts a new chat.", file=sys.stderr)
    except (ValueError, TemplateError) as error:
        # The chat is too long, or the template wants other messages.
        print(f"Error: {error}", file=sys.stderr)


def obey(conversation: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/threshold":
        try:
            if argument.strip():
                conversation.router_threshold = as_threshold(float(argument))
            print(f"threshold {conversation.router_threshold:g}")
        except ValueError:
            print(f"Error: /threshold: expected a number from 0 to 2, got {argument.strip()}.", file=sys.stderr)
    elif name == "/stats":
        print(conversation.stats)
    elif name == "/reset":
        conversation.reset()
        print("new chat")
    elif name == "/help":
        print(HELP)
    else:
        print(f"Error: there is no command {name}; /help lists them.", file=sys.stderr)
