"""What `citer serve` does not do: every refusal is a 4xx or a 503 in OpenAI's form that says what to change."""

import json
import logging
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import hypothesis
import openai
import pytest
import schemathesis
import torch
from schemathesis.specs.openapi.checks import positive_data_acceptance

from citer_hf.runs import listen
from citer_hf.serving import planning
from citer_hf.serving import server as limits
from tests.chat_pairs import character_tokenizer, chat_pair, invoke
from tests.served import NAME, HeldRouter, Served, serving, wait_until
from tests.serving.test_serve import CHAT, held

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ASK = {"model": NAME, "prompt": "abc", "max_tokens": 2}
SAY = {"model": NAME, "messages": CHAT, "max_tokens": 2}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat_pair(), max_request_bytes=5000, max_new_tokens=50) as server:
        yield server


def refusal(server: Served, body: Any, path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
    status, answer = server.post(body if isinstance(body, bytes) else json.dumps(body).encode(), path)
    assert b"Traceback" not in answer
    return status, json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"router_threshold": -0.1}, "router_threshold", "greater than or equal to 0"),
        ({"router_threshold": 2.1}, "router_threshold", "less than or equal to 2"),
        ({"router_threshold": True}, "router_threshold", "valid number"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"logit_bias": {"61": 1}}, "logit_bias", "from 0 to 60"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "from 0 to 60"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"beams": 4}, "beams", "does not offer"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": [3, 61]}, "prompt", "below 61"),
        ({"prompt": "a" * 256}, "prompt", "read at most 256 tokens"),
        ({"prompt": "a\ud800b"}, "prompt", "unicode"),
        ({"model": "gpt-5"}, "model", "has 'tiny' only"),
    ],
)
def test_a_completion_request_that_cannot_be_met_is_refused(served, changes, param, message):
    status, error = refusal(served, ASK | changes)
    assert (status, error["param"]) == (404 if param == "model" else 400, param)
    assert error["type"] == "invalid_request_error" and message in error["message"], error


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "Input should be 'system'"),
        ({"messages": [{"role": "system", "content": "refuse"}]}, "messages", "no system messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages", "read at most 256"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"tool_choice": "required"}, "tool_choice", "among the tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "no place for tools"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs to be true"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "does not offer"),
        ({"continue_final_message": True}, "continue_final_message", "assistant"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}}, "chat_template_kwargs", "cannot be set"),
        ({"functions": [{"name": "f"}]}, "functions", "at most 0"),
    ],
)
def test_a_chat_request_that_cannot_be_met_is_refused(served, changes, param, message):
    status, error = refusal(served, SAY | changes, "/v1/chat/completions")
    assert status == 400 and error["param"] == param and message in error["message"], error


def test_a_model_without_chat_template_says_what_to_use_instead() -> None:
    with serving(chat_pair(template=None), character_tokenizer(None)) as server:
        status, error = refusal(server, SAY, "/v1/chat/completions")
    assert status == 400 and "Use /v1/completions" in error["message"]


BODIES = [b"", b"[1]", b"\xff\xfe", b"[" * 4000, b'{"prompt": ' + b"9" * 4900 + b"}", b'{"prompt": "\\ud800"}']


def test_what_is_no_request_is_refused_in_the_same_form(served: Served) -> None:
    for body in BODIES:
        status, error = refusal(served, body)
        assert status == 400 and set(error) == {"message", "type", "param", "code"}, body
    assert served.post(json.dumps(ASK).encode(), kind="text/plain")[0] == 400
    assert refusal(served, ASK, "/v1/embeddings")[0] == 404 and refusal(served, ASK, "/health")[0] == 405


def test_a_body_that_is_too_large_is_refused_however_it_comes(served: Served) -> None:
    body = json.dumps(ASK | {"user": "u" * 6000}).encode()
    status, error = refusal(served, body)
    assert status == 413 and "more than 5000 bytes" in error["message"]
    parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:3000], body[3000:], b"")]
    answer = served.raw(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts))
    assert b" 413 " in answer.partition(b"\r\n")[0] and b"more than 5000 bytes" in answer


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.Edge.__init__, "__defaults__", (0.2,))
    with serving(chat_pair()) as server:
        answer = server.raw(HEAD + b"Connection: close\r\nContent-Length: 100\r\n\r\n{")
    assert b" 408 " in answer and b"longer than 0.2 s" in answer


def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(served: Served) -> None:
    served.raw(HEAD + b"Content-Length: 100\r\n\r\n{", end=True)
    assert served.complete("abc", max_tokens=2).choices


def test_an_answer_that_takes_too_long_ends_where_it_is() -> None:
    router = HeldRouter()
    router.permits.release(4)
    with serving(held(router), timeout=3.0) as server, ThreadPoolExecutor(1) as other:
        answer = other.submit(server.complete, "abc", max_tokens=200)
        wait_until(lambda: router.asked == 5)
        time.sleep(3)
        router.permits.release(1000)
        found = answer.result()
    assert found.choices[0].finish_reason == "length" and len(found.choices[0].text) < 10


def test_a_request_whose_turn_does_not_come_in_time_may_try_again_later() -> None:
    router = HeldRouter()
    with serving(held(router), timeout=1.0, max_batch_size=1) as server, ThreadPoolExecutor(1) as other:
        first = other.submit(server.complete, "abc", max_tokens=5)
        wait_until(lambda: router.asked > 0)
        for stream in (True, False):
            with pytest.raises(openai.InternalServerError, match="did not come within 1 s") as caught:
                server.complete("abc", stream=stream)
            assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"]
        router.permits.release(1000)
        assert first.result().choices


def test_more_requests_than_may_wait_are_told_to_come_back() -> None:
    router = HeldRouter()
    with serving(held(router), max_waiting=1, max_batch_size=1) as server, ThreadPoolExecutor(2) as others:
        asked = [others.submit(server.complete, "abc", max_tokens=3) for _ in range(2)]
        wait_until(lambda: server.metric("citer_requests_in_progress") == 2)
        with pytest.raises(openai.InternalServerError, match="max-waiting") as caught:
            server.complete("abc")
        assert caught.value.status_code == 503
        router.permits.release(1000)
        assert all(one.result().choices for one in asked)
        assert server.complete("abc", max_tokens=2).choices


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("secret of the operator"), b"its log says why"),
        (torch.OutOfMemoryError("secret"), b"Shorten the prompt"),
    ],
)
def test_a_failure_is_told_without_secrets_and_the_server_goes_on(monkeypatch, caplog, error, message, stream, passes):
    model = chat_pair()
    forward, calls = model.llm.forward, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > passes:
            raise error
        return forward(*args, **kwargs)

    with serving(model) as server:
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(model.llm, "forward", fail)
            asked = {**ASK, "max_tokens": 8, "router_threshold": 2, "stream": stream}
            status, answer = server.post(json.dumps(asked).encode())
        # A stream that has begun ends with the error.
        assert status == (200 if stream and passes else 500)
        assert message in answer and b"secret" not in answer and b"DONE" not in answer
        assert str(error) in caplog.text
        assert server.complete("abc", max_tokens=2).choices


def test_a_fault_of_the_server_is_told_without_its_secrets(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    monkeypatch.setattr(planning, "prompts_of", Mock(side_effect=RuntimeError("secret")))
    status, error = refusal(served, ASK)
    assert status == 500 and "its log says why" in error["message"] and "secret" not in str(error)


def test_an_empty_prompt_begins_with_the_first_token_where_there_is_one() -> None:
    tokenizer = character_tokenizer()
    with serving(chat_pair(), tokenizer) as server:
        empty, first = (server.complete(prompt, max_tokens=4) for prompt in ("", [tokenizer.bos_token_id]))
        assert empty.choices[0].text == first.choices[0].text
        tokenizer.bos_token = None
        assert "has no tokens" in refusal(server, ASK | {"prompt": ""})[1]["message"]


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke("serve", "demo", "--host", "127.0.0.1", "--port", port)
    assert result.exit_code == 1 and "--port 0 takes a free one" in result.stderr and "Loading" not in result.stderr
    with pytest.raises(OSError, match="--host no-such-host-invalid"):
        listen("no-such-host-invalid", 0)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("citer_hf.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = invoke("serve", "demo")
    assert result.exit_code == 1
    assert result.stderr == "Error: fastapi is not installed: pip install 'citer-hf[serve]'\n"


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_requests_made_from_the_schema_are_answered_or_refused_as_it_says(path, mode, examples):
    unhurried: dict[str, Any] = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
    with serving(chat_pair(), max_new_tokens=1) as server:
        operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]

        @hypothesis.given(case=operation.as_strategy(mode))
        @hypothesis.settings(max_examples=examples, database=None, **unhurried)
        def check(case: Any) -> None:
            # A schema cannot say how long a prompt may be in tokens, nor what the model is called.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
