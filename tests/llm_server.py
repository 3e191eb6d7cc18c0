"""A small server of one model on localhost, which speaks as vLLM or SGLang do, for remote LLMs."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class LLMServer:
    """What is served, and what becomes of requests. `fault` may answer in the place of the server: then it is True."""

    model: Any
    tokenizer: Any = None
    kind: str = "vllm"
    name: str = "large"
    most_logprobs: int = 20
    key: str | None = None
    delay: float = 0.0  # seconds of the way there and back
    step: float = 0.0  # seconds of each pass, which requests share that come together
    remembers: bool = False  # the answer to tokens that came before, so that the way alone is measured
    fault: Callable[[Any, dict[str, Any]], bool] | None = None
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities behind each token, `[tokens, vocabulary]`."""
        time.sleep(self.step)
        if (found := self.known.get(tuple(ids))) is None:
            with self.lock, torch.inference_mode():
                found = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            if self.remembers:
                self.known[tuple(ids)] = found
        return found

    def written(self, ids: list[int], length: int, ends: list[int], allowed: list[int]) -> list[tuple[int, Any]]:
        """Greedy tokens, and the log-probabilities that decided each."""
        made: list[tuple[int, Any]] = []
        while len(made) < length and not (made and made[-1][0] in ends):
            scores = self.logprobs([*ids, *(token for token, _ in made)])[-1]
            made.append((allowed[0] if allowed else int(scores.argmax()), scores))
        return made


def top(scores: torch.Tensor, count: int, *others: int) -> dict[int, float]:
    return {int(one): float(scores[one]) for one in [*scores.topk(min(count, len(scores))).indices, *others]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: LLMServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, value: Any) -> bool:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return True

    def do_GET(self) -> None:
        served = self.served
        if served.key and self.headers["Authorization"] != f"Bearer {served.key}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": served.name, "owned_by": served.kind}]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served.bodies.append(body)
        time.sleep(served.delay)
        if served.fault is not None and served.fault(self, body):
            return
        ids = body.get("prompt", body.get("input_ids"))
        size, asked = served.model.config.vocab_size, body.get("logprobs") or body.get("top_logprobs_num") or 0
        if served.key and self.headers["Authorization"] != f"Bearer {served.key}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/tokenize" and served.tokenizer is not None:
            self.answer(200, {"tokens": served.tokenizer(ids, add_special_tokens=False).input_ids})
        elif self.path not in ("/v1/completions", "/generate"):
            self.answer(404, {"detail": "Not Found"})
        elif max(ids) >= size or asked > served.most_logprobs:
            problem = f"{asked} logprobs" if max(ids) < size else f"Token id {max(ids)} is out of vocabulary"
            self.answer(400, {"error": {"message": problem}})
        else:
            (self.complete if self.path == "/v1/completions" else self.generate)(ids, body)

    def complete(self, ids: list[int], body: dict[str, Any]) -> None:
        made = self.served.written(
            ids, body["max_tokens"], body.get("stop_token_ids", []), body.get("allowed_token_ids", [])
        )
        told = [
            {f"token_id:{one}": value for one, value in top(scores, body.get("logprobs") or 0, token).items()}
            for token, scores in made
        ]
        choice: dict[str, Any] = {"text": "", "logprobs": {"tokens": [f"token_id:{token}" for token, _ in made]}}
        choice["logprobs"]["top_logprobs"] = told
        if (count := body.get("prompt_logprobs")) is not None:
            rows = zip(self.served.logprobs(ids), ids[1:], strict=False)
            choice["prompt_logprobs"] = [None] + [
                {str(one): {"logprob": value} for one, value in top(scores, count, token).items()}
                for scores, token in rows
            ]
        self.answer(200, {"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    def generate(self, ids: list[int], body: dict[str, Any]) -> None:
        count, sampling = body.get("top_logprobs_num", 0), body["sampling_params"]
        start = body.get("logprob_start_len", len(ids) - 1)
        ends = [] if sampling.get("ignore_eos") else sampling.get("stop_token_ids", [])
        made = self.served.written(ids, sampling["max_new_tokens"], ends, [])

        def told(scores: torch.Tensor, tokens: list[int]) -> list[list[Any]]:
            return [[float(scores[one]), one, None] for one in tokens]

        scores = self.served.logprobs(ids)
        meta: dict[str, Any] = {
            "input_token_logprobs": [[None, ids[start], None]]
            + [told(scores[place - 1], [ids[place]])[0] for place in range(start + 1, len(ids))],
            "input_top_logprobs": [None]
            + [told(scores[place - 1], list(top(scores[place - 1], count))) for place in range(start + 1, len(ids))],
            "output_token_logprobs": [told(one, [token])[0] for token, one in made],
            "output_top_logprobs": [told(one, list(top(one, count))) for _, one in made],
        }
        if "token_ids_logprob" in body:
            meta["output_token_ids_logprobs"] = [told(one, body["token_ids_logprob"]) for _, one in made]
        self.answer(200, {"output_ids": [token for token, _ in made], "meta_info": meta})


@contextmanager
def serving_llm(model: Any, tokenizer: Any = None, kind: str = "vllm", **options: Any) -> Iterator[LLMServer]:
    """Serve a model as its own process would, until the end of the block."""
    served = LLMServer(model, tokenizer, kind, **options)
    server = ThreadingHTTPServer(("127.0.0.1", served.port), type("Serving", (Handler,), {"served": served}))
    server.daemon_threads = True
    served.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
