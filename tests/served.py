"""A server of a tiny pair, over real sockets, in a thread of the test's process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import torch
import uvicorn
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from citer_hf.serving import ServeOptions
from citer_hf.serving.server import Server, build_app
from tests.chat_pairs import character_tokenizer

NAME = "tiny"


class Served:
    """A running server."""

    def __init__(self, server: Server, port: int):
        self.metrics, self.port = server.metrics, port
        self.url = f"http://127.0.0.1:{port}"

    def client(self) -> openai.OpenAI:
        """The real client, which does not try again by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

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


@contextmanager
def serving(model: Any, tokenizer: Any = None, **options: Any) -> Iterator[Served]:
    """Serve a pair on a free port."""
    server = Server(model, tokenizer or character_tokenizer(), NAME, ServeOptions(**options))
    runner = uvicorn.Server(uvicorn.Config(build_app(server), log_level="error", timeout_graceful_shutdown=1))
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
