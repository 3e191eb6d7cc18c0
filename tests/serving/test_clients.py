"""What clients send by habit, and what models write that is not as it should be."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from citer_hf.serving import requests as conversion
from citer_hf.serving.schema import ChatRequest
from tests.chat_pairs import character_tokenizer, chat_pair
from tests.served import MARKUP, Served, scripted, serving, told

TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK: Any = [{"role": "user", "content": "1+1"}]
LETTERS = [*map(chr, range(32, 127)), "\n"]


def prompt(messages: list[Any], template: str = MARKUP, **fields: Any) -> str:
    """The text that a chat becomes."""
    tokenizer = character_tokenizer(template, LETTERS, "<|im_end|>")
    request = ChatRequest.model_validate({"messages": messages, **fields})
    return tokenizer.decode(conversion.chat_prompt(tokenizer, request))


def call(arguments: Any = "{}") -> dict[str, Any]:
    return {"role": "assistant", "content": "so:", "tool_calls": [
        {"id": "abc", "type": "function", "function": {"name": "add", "arguments": arguments}}
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant", "content": "hi", "tool_calls": []}, "assistant:hi"),
        (call('{"a": 1}'), 'assistant:so:{"name": "add", "arguments": {"a": 1}}'),
        *((call(empty), '"arguments": {}}') for empty in ("", " \n", None, "null", {}, "{}")),
        *((call(broken), '"arguments": "') for broken in ('{"a": 1', "1+1", "[" * 100_000)),
        ({"role": "assistant", "content": "2", "reasoning_content": "sum"}, "assistant:2(sum)"),
        ({"role": "assistant", "content": "2", "reasoning": "sum"}, "assistant:2(sum)"),
        ({"role": "tool", "content": "2", "tool_call_id": "abc", "name": "add"}, "tool:2add"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "user:ab"),
        ({"role": "developer", "content": "a"}, "system:a"),
        ({"role": "assistant", "content": "x", "refusal": None, "audio": None, "annotations": []}, "assistant:x"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_what_an_earlier_message_says_reaches_the_template(message: Any, shown: str) -> None:
    assert shown in prompt([*ASK, message, *ASK])


def test_arguments_that_are_left_out_are_empty() -> None:
    message = call()
    del message["tool_calls"][0]["function"]["arguments"]
    assert '"arguments": {}' in prompt([message])


def test_a_last_message_of_the_assistant_is_continued_when_that_is_asked_for() -> None:
    messages = [*ASK, {"role": "assistant", "content": "it is"}]
    assert prompt(messages, continue_final_message=True) == "user:1+1assistant:it is"
    assert prompt(messages, continue_final_message=True, add_generation_prompt=False) == "user:1+1assistant:it is"
    assert prompt(messages, add_generation_prompt=False) == "user:1+1assistant:it is"
    assert prompt(messages).endswith("it is<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat_pair(), max_new_tokens=12) as server:
        yield server


OFF: list[dict[str, Any]] = [
    *({name: None} for name in (
        "top_logprobs", "functions", "function_call", "modalities", "audio", "prediction", "reasoning_effort",
        "web_search_options", "response_format", "tools", "tool_choice", "logprobs", "stop", "n", "nobody_knows",
    )),
    {"top_k": 0}, {"top_k": -1}, {"max_tokens": -1}, {"max_completion_tokens": -1}, {"max_tokens": 32_000},
    {"logprobs": 0}, {"logprobs": False}, {"tools": []}, {"functions": []}, {"parallel_tool_calls": True},
    {"tools": [TOOL], "tool_choice": "none"}, {"prediction": {"type": "content", "content": "x"}}, {"store": True},
    {"response_format": {"type": "text"}},
]  # fmt: skip


@pytest.mark.parametrize("fields", OFF, ids=str)
def test_a_field_that_changes_nothing_is_accepted(served: Served, fields: dict[str, Any]) -> None:
    plain = served.chat(ASK)
    answer = served.chat(ASK, extra_body=fields)
    assert answer.choices[0].message.content == plain.choices[0].message.content
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 12


def test_a_top_p_of_0_is_greedy_and_a_long_answer_is_cut_to_the_room_that_is_left(served: Served) -> None:
    plain = served.complete("ab" * 121, max_tokens=32_000)
    assert plain.usage.completion_tokens == 12 and plain.choices[0].finish_reason == "length"
    assert served.complete("ab" * 126, max_tokens=32_000).usage.completion_tokens == 4
    greedy = served.complete("ab", temperature=1.5, top_p=0)
    assert greedy.choices[0].text == served.complete("ab", temperature=0).choices[0].text
    assert served.client().models.list().data[0].max_model_len == 256
    assert served.complete("ab", logprobs=0).choices[0].logprobs is None


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_tells_the_usage_once_and_only_when_asked(served: Served, asked: bool, n: int, chat: bool) -> None:
    options: Any = {"stream": True, "n": n, "stream_options": {"include_usage": asked}}
    chunks = list(served.chat(ASK, **options) if chat else served.complete("ab", **options))
    told = [chunk for chunk in chunks if chunk.usage is not None]
    assert [chunk.choices for chunk in told] == [[]] * asked
    assert not asked or (told[0].usage.completion_tokens == 12 * n and told == chunks[-1:])


def test_a_stream_tells_on_request_who_decided_each_token(served: Served) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True, "include_routing": True}}
    chunks = list(served.chat(ASK, **options))
    told = [token for chunk in chunks for choice in chunk.choices for token in getattr(choice, "routing", [])]
    answer = served.chat(ASK)
    assert "".join(token["token"] for token in told) == answer.choices[0].message.content
    assert sum(token["decided_by"] == "llm" for token in told) == answer.usage.llm_tokens > 0
    assert set(told[0]) == {"token", "decided_by", "vetoed", "accepted", "score"}


def test_a_page_of_another_origin_may_ask_where_it_is_let_in_and_a_proxy_passes_streams_on(served: Served) -> None:
    head = "/v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: http://page\r\n"
    asked = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n"
    preflight = f"OPTIONS {head}{asked}\r\n".encode()
    assert b" 405 " in served.raw(preflight).partition(b"\n")[0]
    with serving(chat_pair(), cors=["http://page"]) as server:
        answer = server.raw(preflight)
        assert b" 200 " in answer.partition(b"\n")[0] and b"access-control-allow-origin: http://page" in answer
        for body in (b'{"prompt": "a", "stream": true, "max_tokens": 2}', b"{", b'{"prompt": []}'):
            sizes = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            answer = server.raw(f"POST {head}{sizes}".encode() + body).partition(b"\r\n\r\n")[0].lower()
            assert b"access-control-allow-origin: http://page" in answer
            assert (b"x-accel-buffering: no" in answer and b"cache-control: no-cache" in answer) == (b"stream" in body)


def said(pair: Any, stream: bool, **options: Any) -> tuple[str, str, list[Any], str]:
    """What a pair answers."""
    with serving(*pair) as server:
        return told(server.chat(ASK, stream=stream, **options), stream)


GOOD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        f"so {GOOD[:-14]}\n</tool_call> it is",
        'x<tool_call>{"arguments": {}}</tool_call>',
        'x<tool_call>{"name": "add"}</tool_call>',
        "x<tool_call>add one and one</tool_call>",
        'x<tool_call>{"name": "add", "argu',
        'x<tool_call>["add"]</tool_call>',
    ],
)
def test_a_broken_call_is_text(text: str, stream: bool) -> None:
    assert said(scripted(text), stream, tools=[TOOL]) == (text, "", [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_has_an_id_that_every_template_takes_whatever_comes_after_it(stream: bool) -> None:
    broken = GOOD.replace("add", "").replace("}}", "}")
    text = f"<think>add</think>so {GOOD}\n{GOOD}{broken}"
    content, reasoning, calls, reason = said(scripted(text), stream, tools=[TOOL])
    assert (content, reasoning, reason) == (f"so{broken}", "add", "tool_calls")
    assert [(one.function.name, json.loads(one.function.arguments)) for one in calls] == [("add", {"a": 1})] * 2
    assert all(len(one.id) == 9 and one.id.isalnum() for one in calls)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize(
    ("opened", "text", "expected"),
    [
        ("", "<think>\nso\n</think>\n\nhi", ("hi", "so")),
        ("<think>\n", "so\nit is</think>hi", ("hi", "so\nit is")),
        ("<think>\n", "so it", ("", "so it")),
        ("", "<think>so it", ("", "so it")),
        ("<think>\n\n</think>\n\n", "hi", ("hi", "")),
    ],
)
def test_thoughts_are_no_content(opened: str, text: str, expected: Any, model_type: str, stream: bool) -> None:
    template = MARKUP.replace("assistant\\n'", f"assistant\\n{opened}'".replace("\n", "\\n"))
    assert said(scripted(text, model_type, template), stream)[:2] == expected


def test_a_tag_within_an_answer_is_content() -> None:
    assert said(scripted("use <think> and </think>", "llama"), False)[:2] == ("use <think> and </think>", "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_be_a_special_token(stream: bool) -> None:
    model, tokenizer = scripted("ab")
    # The end token is none for the model: only the stop string sees it.
    model.generation_config.eos_token_id = 1
    with serving(model, tokenizer) as server:
        options = {"stop": "<|im_end|>", "max_tokens": 3}
        answer = server.complete("x", stream=stream, **options)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "ab" and choices[-1].finish_reason == "stop"
