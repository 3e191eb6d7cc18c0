"""A server of a tiny pair, over real sockets, in a thread of the test's process."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from transformers import LogitsProcessor

from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.serving import ServeOptions
from citer_hf.serving.server import Server, build_app, runner_of
from tests.chat_pairs import character_tokenizer
from tests.families import EOS, tiny_model

NAME = "tiny"


class Served:
    """A running server."""

    def __init__(self, server: Server, port: int):
        self.server, self.metrics, self.port = server, server.metrics, port
        self.url = f"http://127.0.0.1:{port}"
        self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def client(self) -> openai.OpenAI:
        """The real client, which does not try again by itself."""
        return self._client

    def complete(self, prompt: Any, **options: Any) -> Any:
        """What the client gets for a text or token ids."""
        return self.client().completions.create(model=NAME, prompt=prompt, **options)

    def chat(self, messages: Any, **options: Any) -> Any:
        """What the client gets for a chat."""
        return self.client().chat.completions.create(model=NAME, messages=messages, **options)

    def metric(self, name: str, **labels: str) -> float:
        """What a counter says."""
        for family in text_string_to_metric_families(generate_latest(self.metrics.registry).decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0

    def raw(self, data: bytes, end: bool = False) -> bytes:
        """What the server answers to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return answer

    def post(self, body: bytes, path: str = "/v1/completions", kind: str = "application/json") -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\n"
        answer = self.raw(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


MARKUP = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}"
    "{{ m.role + ':' + m.content + (m.name or '') }}{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ begin or '<|im_start|>assistant\\n' }}{% endif %}"
)


class Script(LogitsProcessor):
    """Leaves one token at each place of the answer, as long as there are some."""

    def __init__(self, tokens: list[int], begin: int):
        self.tokens, self.begin = tokens, begin

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.begin
        if place >= len(self.tokens):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(self.tokens[place]), 0)


def scripted(text: str, model_type: str = "qwen2", template: str = MARKUP, ends: bool = True, of: Any = None) -> Any:
    """A pair, with its tokenizer, that writes a text in a markup that transformers knows for a type of model."""
    tokenizer = of or character_tokenizer(template, [*map(chr, range(32, 127)), "\n"], "<|im_end|>")
    small, large = (tiny_model("llama", seed, vocab_size=len(tokenizer)) for seed in (1, 2))
    large.config.model_type = model_type
    tokens = [*tokenizer(text).input_ids, *[EOS] * ends]

    class Scripted(CiterForCausalLM):
        def as_sequence(self, input_ids: Any, logits_processor: Any = None, **options: Any) -> Any:
            logits_processor.append(Script(tokens, input_ids.shape[1]))
            return super().as_sequence(input_ids, logits_processor=logits_processor, **options)

    config = CiterConfig(small.config, large.config, "random", router_threshold=0.5)
    model = Scripted(config, slm=small, llm=large).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=EOS, max_length=None)
    return model, tokenizer


@contextmanager
def serving(model: Any, tokenizer: Any = None, **options: Any) -> Iterator[Served]:
    """Serve a pair on a free port."""
    server = Server(model, tokenizer or character_tokenizer(), NAME, ServeOptions(**options))
    runner = runner_of(server, build_app(server))
    runner.config.timeout_graceful_shutdown = 1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: runner.started)
        try:
            yield Served(server, listener.getsockname()[1])
        finally:
            runner.should_exit = True
            thread.join(timeout=30)
            server.close()


@contextmanager
def command(directory: Path | str, *options: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """`citer serve` of a directory in a process of its own, and a client of it."""
    arguments = [sys.executable, "-m", "citer_hf.cli", "serve", str(directory), "--port", "0", *options]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=here) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("Serving"))
            yield process, openai.OpenAI(base_url=line.split(" at ")[1].split()[0], api_key="none", max_retries=0)
        finally:
            process.kill()


def told(answer: Any, stream: bool = False) -> tuple[str, str, list[Any], str]:
    """Content, reasoning, calls and reason of the end of a chat's answer."""
    choices = [chunk.choices[0] for chunk in answer if chunk.choices] if stream else answer.choices
    parts = [choice.delta if stream else choice.message for choice in choices]
    content = "".join(part.content or "" for part in parts)
    reasoning = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
    return content, reasoning, [one for part in parts for one in part.tool_calls or []], choices[-1].finish_reason


def wait_until(condition: Any, seconds: float = 60) -> None:
    """Wait for something that happens on another thread."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


class HeldRouter(nn.Module):
    """Decides nothing until it may: `permits` is how many tokens may still be decided."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = threading.Semaphore(0)
        self.asked = 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        assert self.permits.acquire(timeout=60)
        return hidden.new_ones(hidden.shape[:-1])
