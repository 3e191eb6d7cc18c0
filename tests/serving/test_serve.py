"""`citer serve`, asked by the real OpenAI client over real sockets: texts, probabilities, answers in a given form."""

import json
import signal
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from citer_hf.serving.grammar import Grammars
from citer_hf.serving.schema import ChatRequest
from citer_hf.serving.text import AnswerText, StopText
from tests.chat_pairs import PUBLISHED, character_tokenizer, chat_pair, save_demo_pair
from tests.conftest import make_pair
from tests.served import MARKUP, NAME, HeldRouter, Served, command, scripted, serving, told, wait_until

PROMPT = "hello, is 7 + 5 = 12?"
SHORT_CHAT: Any = [{"role": "user", "content": "1+1"}]
CHAT = [{"role": "system", "content": "be brief."}, {"role": "user", "content": PROMPT}]
TOKENIZER = character_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    pair = chat_pair()
    pair.generation_config.prefill_chunk_size = 4
    return pair


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Served]:
    with serving(model) as server:
        yield server


def written(model: Any, ids: list[int], length: int = 12, **options: Any) -> Any:
    """What the pair writes without a server: text and record."""
    options = {"do_sample": False, "max_new_tokens": length, "return_dict_in_generate": True, **options}
    output = model.generate(torch.tensor([ids]), **options)
    text = TOKENIZER.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)
    return text, output.past_key_values.routing


def chat_ids(messages: list[dict[str, str]] = CHAT) -> list[int]:
    return TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_a_completion_is_what_generate_writes_and_usage_says_who_wrote_it(served, model, threshold):
    ids = TOKENIZER(PROMPT).input_ids
    text, routing = written(model, ids, router_threshold=threshold)
    answer = served.complete(PROMPT, max_tokens=12, extra_body={"router_threshold": threshold})
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
    used, by_llm = answer.usage, int(routing.to_llm.sum())
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (len(ids), 12, len(ids) + 12)
    assert (used.slm_tokens, used.llm_tokens, used.llm_share) == (12 - by_llm, by_llm, routing.llm_share)
    assert bool(by_llm) <= used.llm_calls <= by_llm + len(ids) / 4


def test_a_chat_is_answered_with_the_routers_own_threshold_whole_or_in_pieces(served: Served, model: Any) -> None:
    text, routing = written(model, chat_ids())
    answer = served.chat(CHAT, max_completion_tokens=12)
    assert told(answer)[::3] == (text, "length")
    assert 0 < answer.usage.llm_tokens < 12 and answer.usage.llm_tokens == int(routing.to_llm.sum())
    chunks = list(served.chat(CHAT, max_completion_tokens=12, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 6 and "".join(pieces) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    status, stream = served.post(b'{"prompt": "ab", "max_tokens": 2, "stream": true}')
    assert status == 200 and b"data: [DONE]\n\n" in stream


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(served: Served, model: Any, stream: bool) -> None:
    text, _ = written(model, chat_ids(), length=40)
    stop = text[9:12]
    answer = served.chat(CHAT, max_tokens=40, stop=["no such text", stop], stream=stream)
    assert told(answer, stream)[::3] == (text[: text.index(stop)], "stop")
    assert stream or answer.usage.completion_tokens == text.index(stop) + len(stop)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [("ab cd ef", "cde", "ab"), ("aa ab", "aab", "a"), ("x END y", "E END", "x"), ("ab cd xf", "cde", "abcdxf")],
)
def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(pieces: str, stops: str, shown: str) -> None:
    cut, given = StopText(tuple(stops.split())), ""
    for piece in pieces.split():
        given += cut.feed(piece)
        assert shown.startswith(given)
    assert given + cut.rest() == shown


def test_a_seed_gives_the_same_text_again_and_none_gives_others(served: Served, model: Any) -> None:
    def ask(**options: Any) -> str:
        return served.complete(PROMPT, max_tokens=20, **options).choices[0].text

    torch.manual_seed(11)
    text, _ = written(model, TOKENIZER(PROMPT).input_ids, length=20, do_sample=True, temperature=1.5, top_k=0)
    model_top_k = {"extra_body": {"top_k": 61}}
    assert ask(seed=11, temperature=1.5, **model_top_k) == text == ask(seed=11, temperature=1.5, **model_top_k)
    assert ask(seed=12, temperature=1.5) != text
    assert len({ask(temperature=1.5) for _ in range(4)}) == 4


def test_temperature_0_is_greedy_whatever_the_model_prefers(model: Any) -> None:
    text, _ = written(model, TOKENIZER(PROMPT).input_ids)
    samples = chat_pair()
    samples.generation_config.update(do_sample=True, temperature=1.7)
    with serving(samples) as server:
        for temperature in (0, 1e-300):
            answer = server.complete(PROMPT, max_tokens=12, top_p=0.9, temperature=temperature)
            assert answer.choices[0].text == text


def test_biases_and_penalties_change_what_is_written(served: Served) -> None:
    def ask(**options: Any) -> str:
        return served.complete("ab", max_tokens=30, **options).choices[0].text

    z = TOKENIZER("z").input_ids[0]
    assert ask(logit_bias={str(z): 100}) == "z" * 30
    plain = ask()
    assert len(set(ask(presence_penalty=2, frequency_penalty=2))) > len(set(plain))
    assert len(set(ask(extra_body={"repetition_penalty": 5}))) > len(set(plain))
    assert set(ask(logit_bias={str(TOKENIZER(one).input_ids[0]): -100 for one in set(plain)})).isdisjoint(plain)


def test_several_prompts_and_answers_come_in_order(served: Served, model: Any) -> None:
    prompts = ["ab", "cdef", PROMPT]
    answer = served.complete(prompts, n=2, max_tokens=8, seed=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    for prompt in prompts:
        alone = served.complete(TOKENIZER(prompt).input_ids, n=2, max_tokens=8, seed=3, temperature=1.0)
        assert [texts.pop(0), texts.pop(0)] == [choice.text for choice in alone.choices]
        assert len({choice.text for choice in alone.choices}) == 2
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (48, sum(map(len, prompts)))


def held(router: HeldRouter) -> Any:
    """A pair whose router decides when the test lets it."""
    model = make_pair(router=router, threshold=0.5)
    model.generation_config.update(pad_token_id=0, eos_token_id=2, suppress_tokens=[0, 1, 2], max_length=None)
    return model


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_waits_for_is_not_written_on(stream: bool) -> None:
    router = HeldRouter()
    with serving(held(router)) as server:
        router.permits.release(3)
        if stream:
            answer = server.complete("abc", max_tokens=200, stream=True)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                server.complete("abc", max_tokens=200, timeout=2)
        wait_until(lambda: server.metric("citer_requests_in_progress") == 0)
        router.permits.release(1000)
        server.complete("abc", max_tokens=5)
        # Three tokens, one that was under way, the five of the other request, and their first tokens.
        assert server.metric("citer_tokens_total", model="slm") < 15
        wait_until(lambda: server.metric("citer_requests_total", status="499") == 1)


def test_a_request_whose_client_leaves_before_its_turn_costs_nothing() -> None:
    router = HeldRouter()
    with serving(held(router), max_batch_size=1) as server, ThreadPoolExecutor(1) as other:
        first = other.submit(server.complete, "abc", max_tokens=9)
        wait_until(lambda: router.asked > 0)
        with pytest.raises(openai.APITimeoutError):
            server.complete("abcdefgh", max_tokens=50, timeout=2)
        router.permits.release(1000)
        assert first.result().usage.completion_tokens == 9
        wait_until(lambda: server.metric("citer_requests_in_progress") == 0)
        assert server.metric("citer_prompt_tokens_total") == 3
        assert server.metric("citer_tokens_total", model="slm") == 9


def test_models_and_health_answer(served: Served) -> None:
    assert [one.id for one in served.client().models.list()] == [NAME]
    assert served.client().models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="has 'tiny' only"):
        served.client().models.retrieve("someone/else")
    assert json.load(urllib.request.urlopen(f"{served.url}/health")) == {"status": "ok"}


def test_metrics_count_requests_and_the_tokens_of_each_model(model: Any) -> None:
    with serving(model) as server:
        used = [server.complete(PROMPT, max_tokens=length).usage for length in (5, 9)]
        for name in ("slm", "llm"):
            counted = server.metric("citer_tokens_total", model=name)
            assert counted == sum(getattr(one, f"{name}_tokens") for one in used) > 0
        wait_until(lambda: server.metric("citer_requests_total", status="200") == 2)
        for name in ("llm_share", "request_seconds", "first_token_seconds"):
            assert server.metric(f"citer_{name}_count") == 2
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain") and b"citer_llm_share" in answer.read()


@pytest.mark.parametrize("model_type", ["qwen2", "gemma4"])
def test_a_prompt_in_another_markup_is_no_part_of_the_answer(model_type: str) -> None:
    with serving(*scripted("hello", model_type)) as server:
        answer = server.chat(CHAT, extra_body={"chat_template_kwargs": {"begin": "answer:"}})
    # It ends with the end token.
    assert told(answer)[::3] == ("hello", "stop")


def test_the_command_serves_a_directory_at_this_machine_only_and_stops_at_ctrl_c(tmp_path: Path) -> None:
    directory = save_demo_pair(tmp_path)
    with command(directory, "--router-threshold", "2") as (process, client):
        assert client.base_url.host in ("127.0.0.1", "::1")
        for name in (str(directory), directory.name):
            answer = client.completions.create(model=name, prompt="Tom has 12 apples.", max_tokens=4)
            assert answer.usage.llm_tokens == 4 and answer.model == str(directory)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("published", PUBLISHED[:4], ids=str)
def test_a_published_generation_config_acts_as_in_generate(published: dict[str, Any]) -> None:
    pair = chat_pair()
    pair.generation_config.update(**published)
    text, _ = written(pair, chat_ids(), length=40, tokenizer=TOKENIZER, use_cache=True)
    with serving(pair) as server:
        answer = server.chat(CHAT, max_tokens=40)
    assert told(answer)[::3] == (text, "stop" if len(text) < 40 else "length")


# ---- probabilities, and answers in a given form ----

DIALS = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.3), (0.5, 1.0), (2.0, 0.0)]


@pytest.mark.parametrize(("threshold", "veto"), DIALS)
def test_probabilities_are_those_of_the_model_that_decided(served: Served, model: Any, threshold: float, veto: float):
    dials = {"router_threshold": threshold, "llm_veto": veto}
    ids = TOKENIZER("hello").input_ids
    wanted = {"max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(torch.tensor([ids]), **wanted, **dials)
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
    whole = served.chat(SHORT_CHAT, **options).choices[0]
    pieces = [chunk.choices[0] for chunk in served.chat(SHORT_CHAT, stream=True, **options)]
    told = [one.token for piece in pieces if piece.logprobs for one in piece.logprobs.content]
    assert told == [one.token for one in whole.logprobs.content] == list(whole.message.content)
    for one in whole.logprobs.content:
        assert len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob
    assert served.chat(SHORT_CHAT, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert served.chat(SHORT_CHAT).choices[0].logprobs is None


@pytest.mark.parametrize(("threshold", "veto"), DIALS)
def test_an_echo_has_the_likelihood_that_forward_gives(served: Served, model: Any, threshold: float, veto: float):
    ids, dials = TOKENIZER("hello world").input_ids, {"router_threshold": threshold, "llm_veto": veto}
    expected = model(torch.tensor([ids]), **dials).logits[0].log_softmax(-1)
    answer = served.complete([ids, ids[:4]], max_tokens=1, echo=True, logprobs=1, extra_body=dials)
    told = answer.choices[0].logprobs
    own = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
    assert told.token_logprobs[0] is None and told.token_logprobs[1:-1] == pytest.approx(own, abs=1e-4)
    assert answer.choices[0].text[:-1] == "hello world" and answer.choices[1].text[:-1] == "hell"
    silent = served.complete("hello world", max_tokens=0, echo=True, stream=True, logprobs=2)
    assert "".join(chunk.choices[0].text for chunk in silent) == "hello world"


COUNTS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3}
PROPERTIES = {"kind": {"enum": ["x", "yy"]}, "sure": {"type": "boolean"}, "counts": COUNTS}
SCHEMA: dict[str, Any] = {"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES)}
SCHEMA["additionalProperties"] = False
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
    answer = wordy.chat(SHORT_CHAT, response_format=FORM, max_tokens=90, extra_body=body, **options)
    found = json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop" and set(found) == set(SCHEMA["properties"])
    assert found["kind"] in ("x", "yy") and type(found["sure"]) is bool
    assert len(found["counts"]) <= 3 and all(type(one) is int and 0 <= one <= 9 for one in found["counts"])
    pieces = list(wordy.chat(SHORT_CHAT, response_format=FORM, max_tokens=90, extra_body=body, stream=True, **options))
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_that_must_be_called_is_called(wordy: Served, choice: Any, stream: bool) -> None:
    options = {"tools": TOOLS if choice != "required" else TOOLS[:1], "tool_choice": choice, "stream": stream}
    answer = wordy.chat(SHORT_CHAT, max_tokens=120, **options)
    parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    (called,) = [one for part in parts for one in part.tool_calls or []]
    assert called.function.name == "add" and set(json.loads(called.function.arguments)) == set(SCHEMA["properties"])
    assert not any(part.content for part in parts)


def test_thoughts_come_before_the_form() -> None:
    template = MARKUP.replace("assistant\\n'", "assistant\\n<think>'")
    with serving(*scripted("so it is</think>", template=template, ends=False)) as server:
        message = server.chat(SHORT_CHAT, response_format=FORM, max_tokens=110).choices[0].message
    assert message.reasoning_content == "so it is" and set(json.loads(message.content)) == set(SCHEMA["properties"])


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "nonsense"}, "Unsupported type"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "array", "items": {"not": {"type": "null"}}}, "not is not followed"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "allOf"),
        ({"oneOf": [{"type": "string"}]}, "oneOf"),
        ({"minimum": 4}, "minimum without a type"),
        ({"type": "object", "required": ["a"]}, "required"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "beside pattern"),
        ({"type": "integer", "enum": [True]}, "another type in enum"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "looks around"),
        ({"type": "object", "properties": 5}, "no schema"),
    ],
    ids=str,
)
def test_a_schema_that_would_not_be_followed_is_refused(wordy: Served, schema: Any, fault: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=fault):
        wordy.chat(SHORT_CHAT, response_format=form)


class Part(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=4, description="control characters would be no JSON")
    count: int | None = pydantic.Field(ge=0, le=5)


class Whole(pydantic.BaseModel):
    parts: list[Part] = pydantic.Field(max_length=2)


def of_bytes() -> Any:
    """Return a tokenizer with a token for each byte."""
    names = ["<pad>", "<bos>", "<eos>"]
    own = Tokenizer(models.BPE({one: n for n, one in enumerate([*names, *sorted(ByteLevel.alphabet())])}, []))
    own.pre_tokenizer, own.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=MARKUP, **special)


def test_a_special_token_that_is_not_shown_does_not_divide_a_character() -> None:
    tokenizer = of_bytes()
    first, second = tokenizer("\u00e9").input_ids
    text = AnswerText(tokenizer, {0: "<pad>"}, stops=(), parser=None)
    parts = [part for token in (first, 0, second) for part in text.feed(token)]
    assert "".join(parts + text.rest()) == "\u00e9"


def test_strings_of_a_form_are_utf_8() -> None:
    pytest.importorskip("xgrammar")
    grammars = Grammars(of_bytes(), vocabulary=259, end_tokens=[2])
    form: Any = {"type": "json_schema", "json_schema": {"name": "f", "schema": {"type": "string", "maxLength": 4}}}
    request = ChatRequest(messages=SHORT_CHAT, response_format=form)
    (mask,) = grammars.mask(request, prompt_tokens=0, thinks="")
    opened = grammars.tokenizer('"', add_special_tokens=False).input_ids

    def texts(tokens: list[int]) -> list[list[int]]:
        allowed = mask(torch.tensor([tokens]), torch.zeros(1, 259))[0].isfinite().nonzero().flatten()
        return [[*tokens, token] for token in allowed.tolist()]

    def can_end(begun: bytes) -> bool:
        ends = (bytes([one]) * n for one in (0x80, 0x90, 0xA0) for n in range(4))
        return any("\ufffd" not in (begun + end).decode(errors="replace") for end in ends)

    begun = [b"".join(grammars.texts[t] for t in two) for one in texts(opened) for two in texts(one)]
    assert len(begun) > 9000 and not [one for one in begun if not can_end(one)]


def test_a_tokenizer_of_bytes_writes_valid_forms_and_loses_no_part_of_a_character() -> None:
    tokenizer = of_bytes()
    pair, _ = scripted("", ends=False, of=tokenizer)
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": Whole.model_json_schema()}}
    with serving(pair, tokenizer) as server:
        for seed in range(6):
            options: Any = {"temperature": 2.0, "seed": seed, "max_tokens": 200}
            answer = server.chat(SHORT_CHAT, tools=[tool], tool_choice="required", **options)
            Whole.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)
            torch.manual_seed(seed)
            output = pair.generate(torch.tensor([[5, 6]]), max_new_tokens=20, do_sample=True, temperature=2.0)
            text = server.complete([5, 6], **options | {"max_tokens": 20}).choices[0].text
            assert text == tokenizer.decode(output[0, 2:], skip_special_tokens=True)
        told = server.complete("a\u65e5b", max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert told.text_offset == [0, 1, 1, 1, 2] and told.tokens[1] == "bytes:\\xe6"


def test_without_the_library_the_extra_is_named(wordy: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(openai.BadRequestError, match=r"citer-hf\[grammar\]"):
        wordy.chat(SHORT_CHAT, response_format=FORM)
