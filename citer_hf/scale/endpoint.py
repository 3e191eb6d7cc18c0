"""The server of a remote LLM: its address, and the protocols of vLLM and SGLang."""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..model.compat import http_library

API_KEY = "CITER_LLM_API_KEY"
# Seconds between the tries of a request.
BACKOFF = (0.2, 0.4, 0.8)
# The server may be busy, or restarted.
TRIED_AGAIN = (408, 429, 500, 502, 503, 504)

Found = dict[int, float]  # log-probabilities of the likeliest tokens, and of one that was asked about


class Ask(NamedTuple):
    """A question about the token behind the first `length` ones of a text: `token` is to be among the answers."""

    length: int
    token: int | None = None


Asks = tuple[list[int], list[Ask]]  # a text and the questions about it


Verdict = Found | BaseException  # or why there are none


class RemoteError(ConnectionError):
    """The LLM's server cannot be reached, or does not do what it is asked for."""


def checked(answers: Sequence[Any]) -> list[Any]:
    """Return answers, or raise the first error among them."""
    for one in answers:
        if isinstance(one, BaseException):
            raise one
    return list(answers)


def or_error(found: Callable[..., Found]) -> Callable[..., Verdict]:
    """Return a function that hands on the error in the place of an answer, and its own."""

    @wraps(found)
    def run(protocol: Any, answer: Any, *rest: Any) -> Verdict:
        try:
            with understood(protocol.endpoint):
                return answer if isinstance(answer, BaseException) else found(protocol, answer, *rest)
        except RemoteError as error:
            return error

    return run


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run requests until the endpoint is gone."""
    loop.run_forever()
    loop.close()


class Request(NamedTuple):
    """A request: GET without a body. An answer of so many tokens may take a second longer for each."""

    path: str
    body: dict[str, Any] | None = None
    at_root: bool = False
    tokens: int = 0


class Endpoint:
    """An address, and requests to it: many at once over kept connections, repeated where that may help."""

    def __init__(self, url: str, api_key: str | None, timeout: float, connections: int):
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except (ValueError, AttributeError, TypeError):
            is_address = False
        if not is_address or parts.query or parts.fragment:
            raise ValueError(
                f"url: expected an address such as http://host:8000/v1, got {url!r}. Name a model by model=."
            )
        if parts.username is not None:
            raise ValueError("url: expected an address without a user and a password. Pass the key as api_key=.")
        api_key = (api_key or "").strip()
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key: expected printable ASCII characters.")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.root = self.url.removesuffix("/v1")
        # What it has cost so far: requests, bytes there and back, seconds until the last of several was answered.
        self.requests, self.sent, self.received, self.waited = 0, 0, 0, 0.0
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connections, self._process = connections, 0
        self._lock = threading.Lock()

    def _start(self) -> None:
        """Begin a thread for the requests of this process, which may be a fork of another one."""
        http, count = http_library(), self._connections
        limits = http.Limits(max_connections=count, max_keepalive_connections=count)
        self._client = http.AsyncClient(headers=self._headers, limits=limits, timeout=None)
        self._errors = (http.TransportError, http.DecodingError)
        self._slots, self._process = asyncio.Semaphore(count), os.getpid()
        self._loop = loop = asyncio.new_event_loop()
        threading.Thread(target=run_loop, args=(loop,), name="remote-llm", daemon=True).start()
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)

    def ask(self, request: Request) -> Any:
        (answer,) = checked(self.ask_all([request]))
        return answer

    def try_asking(self, request: Request) -> Any:
        """Return the answer to a request that not every server knows, or `None`."""
        try:
            return self.ask(request)
        except (ValueError, RemoteError):
            return None

    def ask_all(self, requests: Sequence[Request]) -> list[Any]:
        """Send requests at once, and return in order the answers, or the errors of those that failed."""
        began = time.monotonic()
        with self._lock:
            if self._process != os.getpid():
                self._start()
        future = asyncio.run_coroutine_threadsafe(self._gather(requests), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()
            self.waited += time.monotonic() - began

    async def _gather(self, requests: Sequence[Request]) -> list[Any]:
        tasks = [asyncio.ensure_future(self._in_time(one)) for one in requests]
        try:
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for one in tasks:
                one.cancel()

    async def _in_time(self, request: Request) -> Any:
        async with self._slots:
            try:
                return await asyncio.wait_for(self._tried(request), limit := self.timeout + request.tokens)
            except (TimeoutError, asyncio.TimeoutError):
                raise self._failed(request, f"no answer within {limit:g} s", "Raise timeout=...") from None

    async def _tried(self, request: Request) -> Any:
        for pause in (*BACKOFF, None):
            problem, answer = "", None
            try:
                answer = await self._send(request)
            except self._errors as error:
                problem = str(error) or type(error).__name__
            if answer is not None and answer.status_code not in TRIED_AGAIN:
                return self._read(request, answer)
            if pause is not None:
                told = "" if answer is None else answer.headers.get("Retry-After", "")
                await asyncio.sleep(float(told) if told.isdigit() else pause)
        if answer is not None:
            problem = f"status {answer.status_code}: {answer.text[:200]}"
        raise self._failed(request, problem, "Is it running? It is asked again by the next call.")

    async def _send(self, request: Request) -> Any:
        url = f"{self.root if request.at_root else self.url}/{request.path}"
        self.requests += 1
        if request.body is None:
            return await self._client.get(url)
        answer = await self._client.post(url, json=request.body)
        self.sent += len(answer.request.content)
        self.received += len(answer.content)
        return answer

    def _read(self, request: Request, answer: Any) -> Any:
        if answer.status_code in (401, 403):
            raise self._failed(request, "the key was refused", f"Pass api_key=..., or set {API_KEY}.")
        if 300 <= answer.status_code < 400:
            place = answer.headers.get("Location", "another address")
            raise self._failed(request, f"it redirects to {place}", "Pass that address.")
        try:
            value = answer.json()
        except ValueError:
            value = answer.text
        if answer.status_code >= 400:
            told = value.get("error", value) if isinstance(value, dict) else value
            told = told.get("message", told) if isinstance(told, dict) else told
            raise ValueError(f"llm: {self.url}/{request.path} refuses the request: {str(told)[:300]}")
        if not isinstance(value, dict | list):
            raise self._failed(request, f"expected JSON, got {answer.text[:60]!r}", "Does the address end in /v1?")
        return value

    def _failed(self, request: Request, problem: str, advice: str) -> RemoteError:
        return RemoteError(f"llm: {self.url}, request {request.path}: {problem}. {advice}")


class VLLM:
    """vLLM's completions: a request for each position, whose prefix its cache holds."""

    def __init__(self, endpoint: Endpoint, model: str, logprobs: int):
        self.endpoint, self.model, self.logprobs = endpoint, model, logprobs

    def _request(self, prompt: Any, **options: Any) -> Request:
        # The server's own default settings are not ours.
        plain = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "return_tokens_as_token_ids": True}
        return Request("completions", {**body, **plain, **options}, tokens=options.get("max_tokens", 0))

    def judge(self, texts: Sequence[Asks]) -> list[list[Verdict]]:
        """Return log-probabilities for each question about each text."""
        requests = [
            # The chosen token's own log-probability is always told: that of the one which is asked about.
            self._request(
                ids[: ask.length],
                logprobs=self.logprobs,
                **({} if ask.token is None else {"allowed_token_ids": [ask.token]}),
            )
            for ids, asks in texts
            for ask in asks
        ]
        answers = iter(self.endpoint.ask_all(requests))
        return [[self._found(next(answers)) for _ in asks] for _, asks in texts]

    @or_error
    def _found(self, answer: Any) -> Found:
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return enough(self, {number(token): one for token, one in top.items()})

    def read(self, texts: Sequence[tuple[list[int], int]]) -> list[list[Found]]:
        """Return log-probabilities at the last places of each text, in one pass beside the prefix cache."""
        answers = checked(
            self.endpoint.ask_all([self._request(ids, prompt_logprobs=self.logprobs) for ids, _ in texts])
        )
        with understood(self.endpoint):
            places = [
                answer["choices"][0]["prompt_logprobs"][-count:]
                for answer, (_, count) in zip(answers, texts, strict=True)
            ]
            return [[{int(token): at[token]["logprob"] for token in at} for at in one] for one in places]

    def complete(self, texts: Sequence[list[int]], lengths: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
        """Return greedy continuations, end tokens included."""
        stops = {"ignore_eos": True, "stop_token_ids": list(ends), "logprobs": 0, "skip_special_tokens": False}
        answers = checked(
            self.endpoint.ask_all(
                [self._request(ids, **stops, max_tokens=length) for ids, length in zip(texts, lengths, strict=True)]
            )
        )
        with understood(self.endpoint):
            return [list(map(number, one["choices"][0]["logprobs"]["tokens"])) for one in answers]

    def takes(self, token: int) -> bool:
        """Return True if the server's model has this token."""
        return self.endpoint.try_asking(self._request([token])) is not None

    def count(self, text: str) -> Any:
        """Return how many tokens a text has for the server, or `None` where it does not tell."""
        with suppress(KeyError, TypeError):
            return self.endpoint.try_asking(self._request(text))["usage"]["prompt_tokens"]


class SGLang:
    """SGLang's native API: one request for all positions of a text."""

    def __init__(self, endpoint: Endpoint, model: str, logprobs: int):
        self.endpoint, self.model, self.logprobs = endpoint, model, logprobs

    def _request(self, ids: list[int], length: int = 1, **options: Any) -> Request:
        sampling = {"temperature": 0, "max_new_tokens": length, **options.pop("sampling", {})}
        body = {"input_ids": ids, "sampling_params": sampling, **options}
        return Request("generate", body, at_root=True, tokens=length - 1)

    def judge(self, texts: Sequence[Asks]) -> list[list[Verdict]]:
        """Return log-probabilities for each question about each text."""
        requests = []
        for ids, asks in texts:
            # The first entry has no log-probabilities; those of a token are found at its own place.
            options: dict[str, Any] = {
                "return_logprob": True,
                "top_logprobs_num": self.logprobs,
                "logprob_start_len": asks[0].length - 1,
            }
            if asks[-1].token is not None:
                options["token_ids_logprob"] = [asks[-1].token]
            requests.append(self._request(ids, **options))
        answers = self.endpoint.ask_all(requests)
        return [
            [self._found(answer, ids, ask) for ask in asks] for (ids, asks), answer in zip(texts, answers, strict=True)
        ]

    @or_error
    def _found(self, answer: Any, ids: list[int], ask: Ask) -> Found:
        told = answer["meta_info"]
        if ask.length == len(ids):
            more = (told.get("output_token_ids_logprobs") or [None])[0] or []
            return enough(self, {one[1]: one[0] for one in [*told["output_top_logprobs"][0], *more]})
        # Entries end with the last token of the text.
        place = ask.length - len(ids)
        own = told["input_token_logprobs"][place]
        return enough(self, {one[1]: one[0] for one in [*told["input_top_logprobs"][place], own]})

    def read(self, texts: Sequence[tuple[list[int], int]]) -> list[list[Found]]:
        """Return log-probabilities at the last places of each text."""
        asked = [(ids, [Ask(at) for at in range(len(ids) - count, len(ids))]) for ids, count in texts]
        return [checked(one) for one in self.judge(asked)]

    def complete(self, texts: Sequence[list[int]], lengths: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
        """Return greedy continuations, end tokens included."""
        # There, `ignore_eos` ignores the stop tokens too.
        sampling: dict[str, Any] = {"stop_token_ids": list(ends)} if ends else {"ignore_eos": True}
        requests = [
            self._request(ids, length, sampling=sampling, return_logprob=True)
            for ids, length in zip(texts, lengths, strict=True)
        ]
        answers = checked(self.endpoint.ask_all(requests))
        with understood(self.endpoint):
            return [[one[1] for one in answer["meta_info"]["output_token_logprobs"]] for answer in answers]

    def takes(self, token: int) -> bool:
        """Return False: SGLang may use an id before it is checked."""
        return False

    def count(self, text: str) -> Any:
        """Return how many tokens a text has for the server, or `None` where it does not tell."""
        body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        with suppress(KeyError, TypeError):
            return self.endpoint.try_asking(Request("generate", body, at_root=True))["meta_info"]["prompt_tokens"]


def server_of(endpoint: Endpoint, model: str | None) -> tuple[dict[str, Any], type[VLLM] | type[SGLang]]:
    """Return the server's entry of a model, and the protocol that the server speaks."""
    try:
        answer = endpoint.ask(Request("models"))
    except ValueError as error:
        answer = error
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not (isinstance(entries, list) and entries and all(isinstance(one, dict) and "id" in one for one in entries)):
        raise RemoteError(
            f"url: expected an OpenAI API at {endpoint.url}, got {str(answer)[:100]!r}. Does it end in /v1?"
        )
    chosen = [one for one in entries if model in (None, one["id"])]
    if len(chosen) != 1:
        names = ", ".join(str(one["id"]) for one in entries)
        raise ValueError(f"model: expected one that {endpoint.url} has ({names}), got {model!r}.")
    owner = chosen[0].get("owned_by")
    if owner != "vllm" and (owner == "sglang" or endpoint.try_asking(Request("get_model_info", at_root=True))):
        return chosen[0], SGLang
    return chosen[0], VLLM


# ---- answers -------------------------------------------------------------------------------------------------------


def enough(protocol: VLLM | SGLang, found: Found) -> Found:
    """Return the log-probabilities of a position if they are that, and as many as were asked for."""
    if not all(isinstance(one, (int, float)) and one <= 0.01 and one == one for one in found.values()):
        raise ValueError(f"log-probabilities {str(list(found.values()))[:80]}")
    if len(found) < protocol.logprobs:
        raise RemoteError(
            f"llm: {protocol.endpoint.url} gives {len(found)} log-probabilities of a position, expected "
            f"{protocol.logprobs}. Pass logprobs={len(found)}, or raise the server's limit."
        )
    return found


def number(token: str) -> int:
    """Return the id in `token_id:5`."""
    return int(token.removeprefix("token_id:"))


@contextmanager
def understood(endpoint: Endpoint) -> Iterator[None]:
    """Raise an error that names the server where an answer is not of the expected form."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise RemoteError(
            f"llm: {endpoint.url} answers in an unknown form ({type(error).__name__}: {error}). Is it vLLM or SGLang?"
        ) from error
