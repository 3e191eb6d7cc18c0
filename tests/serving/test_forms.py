"""Probabilities of tokens, and answers in a given form."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from citer_hf.serving.grammar import not_followed
from tests.chat_pairs import character_tokenizer, chat_pair
from tests.served import MARKUP, Served, scripted, serving
from tests.serving.test_clients import ASK

TOKENIZER = character_tokenizer()
DIALS = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.3), (0.5, 1.0), (2.0, 0.0)]


@pytest.fixture(scope="module")
def model() -> Any:
    return chat_pair()


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Served]:
    with serving(model) as server:
        yield server


@pytest.mark.parametrize(("threshold", "veto"), DIALS)
def test_probabilities_are_those_of_the_model_that_decided(served: Served, model: Any, threshold: float, veto: float):
    dials = {"router_threshold": threshold, "llm_veto": veto}
    ids = TOKENIZER("hello").input_ids
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=8, output_scores=True, return_dict_in_generate=True, **dials
    )
    expected = torch.stack(output.scores)[:, 0].log_softmax(-1)
    answer = served.complete("hello", max_tokens=8, logprobs=3, extra_body=dials).choices[0].logprobs
    new = output.sequences[0, len(ids) :]
    assert answer.token_logprobs == pytest.approx(expected.gather(1, new[:, None])[:, 0].tolist(), abs=1e-4)
    best = expected.topk(3)
    for top, values, tokens in zip(answer.top_logprobs, best.values.tolist(), best.indices.tolist(), strict=True):
        texts = [TOKENIZER.decode([token]) for token in tokens]
        assert all(top[text] == pytest.approx(value, abs=1e-4) for text, value in zip(texts, values, strict=True))
    assert answer.text_offset == list(range(8)) and "".join(answer.tokens) == TOKENIZER.decode(new)


def test_a_chat_tells_probabilities_whole_and_in_pieces(served: Served) -> None:
    options: Any = {"max_tokens": 6, "logprobs": True, "top_logprobs": 2, "temperature": 1.3, "seed": 3}
    whole = served.chat(ASK, **options).choices[0]
    pieces = [chunk.choices[0] for chunk in served.chat(ASK, stream=True, **options)]
    told = [one.token for piece in pieces if piece.logprobs for one in piece.logprobs.content]
    assert told == [one.token for one in whole.logprobs.content] == list(whole.message.content)
    assert all(
        len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob for one in whole.logprobs.content
    )
    assert served.chat(ASK, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert served.chat(ASK).choices[0].logprobs is None


@pytest.mark.parametrize(("threshold", "veto"), DIALS)
def test_an_echo_has_the_likelihood_that_forward_gives(served: Served, model: Any, threshold: float, veto: float):
    ids, dials = TOKENIZER("hello world").input_ids, {"router_threshold": threshold, "llm_veto": veto}
    with torch.no_grad():
        expected = model(torch.tensor([ids]), **dials).logits[0].log_softmax(-1)
    answer = served.complete([ids, ids[:4]], max_tokens=1, echo=True, logprobs=1, extra_body=dials)
    told = answer.choices[0].logprobs
    own = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
    assert told.token_logprobs[0] is None and told.token_logprobs[1:-1] == pytest.approx(own, abs=1e-4)
    assert answer.choices[0].text[:-1] == "hello world" and answer.choices[1].text[:-1] == "hell"
    silent = served.complete("hello world", max_tokens=0, echo=True, stream=True, logprobs=2)
    assert "".join(chunk.choices[0].text for chunk in silent) == "hello world"


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["x", "yy"]},
        "sure": {"type": "boolean"},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
    "required": ["kind", "sure", "counts"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "ask"}},
]


@pytest.fixture(scope="module")
def wordy() -> Iterator[Served]:
    """A pair with all the letters that JSON needs, and a chat template with tools."""
    with serving(*scripted("", ends=False)) as server:
        yield server


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 1}, {"temperature": 2.0, "seed": 5}], ids=str)
@pytest.mark.parametrize(("threshold", "veto"), DIALS)
def test_what_comes_is_valid_whoever_writes_it(wordy: Served, threshold: float, veto: float, options: Any) -> None:
    body = {"router_threshold": threshold, "llm_veto": veto}
    answer = wordy.chat(ASK, response_format=FORM, max_tokens=90, extra_body=body, **options)
    found = json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop" and set(found) == set(SCHEMA["properties"])
    assert found["kind"] in ("x", "yy") and type(found["sure"]) is bool
    assert len(found["counts"]) <= 3 and all(type(one) is int and 0 <= one <= 9 for one in found["counts"])
    pieces = list(wordy.chat(ASK, response_format=FORM, max_tokens=90, extra_body=body, stream=True, **options))
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=["required", "named"]
)
def test_a_tool_that_must_be_called_is_called(wordy: Served, choice: Any, stream: bool) -> None:
    options = {"tools": TOOLS if choice != "required" else TOOLS[:1], "tool_choice": choice, "stream": stream}
    answer = wordy.chat(ASK, max_tokens=120, **options)
    parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    (called,) = [one for part in parts for one in part.tool_calls or []]
    assert called.function.name == "add" and set(json.loads(called.function.arguments)) == set(SCHEMA["properties"])
    assert not any(part.content for part in parts)


def test_thoughts_come_before_the_form() -> None:
    template = MARKUP.replace("assistant\\n'", "assistant\\n<think>'")
    with serving(*scripted("so it is</think>", template=template, ends=False)) as server:
        message = server.chat(ASK, response_format=FORM, max_tokens=110).choices[0].message
    assert message.reasoning_content == "so it is" and set(json.loads(message.content)) == set(SCHEMA["properties"])


def test_a_json_object_is_an_object(wordy: Served) -> None:
    answer = wordy.complete("x", max_tokens=60, extra_body={"response_format": {"type": "json_object"}})
    assert answer.choices[0].text.startswith("{")


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "nonsense"}, "Unsupported type"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "array", "items": {"not": {"type": "null"}}}, "not is not followed"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "allOf"),
        ({"oneOf": [{"type": "string"}]}, "oneOf"),
        ({"minimum": 4}, "minimum without a type"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "beside pattern"),
        ({"type": "string", "enum": [1]}, "beside enum"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
    ],
    ids=str,
)
def test_a_schema_that_would_not_be_followed_is_refused(wordy: Served, schema: Any, fault: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=fault):
        wordy.chat(ASK, response_format=form)


def test_a_schema_of_pydantic_is_followed() -> None:
    import pydantic

    class Inner(pydantic.BaseModel):
        count: int = pydantic.Field(ge=0, le=5, description="how many")
        name: str | None = None
        of: dict[str, float]

    class Outer(pydantic.BaseModel):
        inner: Inner
        several: list[Inner]
        both: tuple[int, str]

    assert not not_followed(Outer.model_json_schema())


def test_without_the_library_the_extra_is_named(wordy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(openai.BadRequestError, match=r"citer-hf\[grammar\]"):
        wordy.chat(ASK, response_format=FORM)
