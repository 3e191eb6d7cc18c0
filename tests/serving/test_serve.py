"""`citer serve`, asked by the real OpenAI client over real sockets."""

import json
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from citer_hf.serving.text import StopText
from tests.chat_pairs import PUBLISHED, character_tokenizer, chat_pair, save_demo_pair
from tests.conftest import make_pair
from tests.served import NAME, HeldRouter, Served, command, scripted, serving, told, wait_until

PROMPT = "hello, is 7 + 5 = 12?"
CHAT = [{"role": "system", "content": "be brief."}, {"role": "user", "content": PROMPT}]
TOKENIZER = character_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return chat_pair()


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Served]:
    with serving(model) as server:
        yield server


def written(model: Any, ids: list[int], length: int = 12, **options: Any) -> Any:
    """What the pair writes without a server: text and record."""
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=length, return_dict_in_generate=True, **{"do_sample": False, **options}
    )
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
    assert bool(by_llm) <= used.llm_calls <= by_llm


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
