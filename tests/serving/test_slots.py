"""Many requests at once: each answer is what the same request gets alone, whatever becomes of the others."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.chat_pairs import character_tokenizer, chat_pair, save_demo_pair
from tests.served import Served, command, serving, wait_until

TOKENIZER = character_tokenizer()
START = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat_pair("llama", "gemma3"), max_batch_size=4) as server:
        yield server


def ask(server: Served, number: int, veto: bool = True) -> Any:
    """A request with settings of its own, and what there is to compare of its answer."""
    options: dict[str, Any] = {"max_tokens": 5 + 3 * (number % 7)}
    options["extra_body"] = {"router_threshold": (number % 4) / 2, "llm_veto": (0.0, 0.3, 1.0)[number % 3] * veto}
    if number % 2:
        options |= {"temperature": 1.2, "seed": number, "frequency_penalty": number % 5 / 4}
    if number % 5 == 0:
        options["stop"] = ["a", "th"]
    if number % 6 == 0:
        options |= {"logprobs": 2, "echo": True}
    prompt = (START * (number % 4))[: 7 * number] + f"{number} is"
    if number % 4 == 2:
        *chunks, last = server.complete(prompt, stream=True, stream_options={"include_usage": True}, **options)
        return "".join(one.choices[0].text for one in chunks), last.usage.slm_tokens, last.usage.llm_tokens
    answer = server.complete(prompt, n=1 + number % 2, **options)
    used = answer.usage
    return [(one.text, one.finish_reason) for one in answer.choices], used.slm_tokens, used.llm_tokens


def test_every_answer_is_the_one_that_the_request_gets_alone(served: Served) -> None:
    alone = [ask(served, number) for number in range(20)]
    for order in (range(20), range(19, -1, -1)):
        with ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(lambda number: ask(served, number), order))
        assert answers == [alone[number] for number in order]


def test_what_a_finished_slot_holds_of_a_prompt_is_told_and_changes_no_text(served: Served) -> None:
    model = served.server.model
    with serving(model, TOKENIZER) as server:
        first = server.complete(START, max_tokens=9, extra_body={"llm_veto": 0.3})
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        # Another request in between takes another slot.
        server.complete("x" * 40, max_tokens=3)
        longer = START + first.choices[0].text + "yes?"
        again = server.complete(longer, max_tokens=1, extra_body={"llm_veto": 0.3})
        assert again.usage.prompt_tokens_details.cached_tokens == len(START) + 8
        fresh = served.complete(longer, max_tokens=1, extra_body={"llm_veto": 0.3})
        assert fresh.choices[0].text == again.choices[0].text
        assert server.metric("citer_cached_tokens_total") == len(START) + 8


def test_a_request_that_the_models_fail_at_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # No answer has a begin token.
    model, bad = chat_pair(), TOKENIZER.bos_token_id
    with serving(model) as server:
        expected = [ask(server, number) for number in range(6)]
        for role in ("slm", "llm"):
            forward = getattr(model, role).forward

            def fails(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                if (kwargs["input_ids"] == bad).any():
                    raise RuntimeError("secret")
                return forward(*args, **kwargs)

            with monkeypatch.context() as patch, ThreadPoolExecutor(8) as clients:
                patch.setattr(getattr(model, role), "forward", fails)
                failing = clients.submit(server.complete, [5, bad], max_tokens=9, extra_body={"router_threshold": 2})
                answers = list(clients.map(lambda number: ask(server, number), range(6)))
                with pytest.raises(openai.InternalServerError, match="its log says why"):
                    failing.result()
            assert answers == expected


def test_prompts_are_processed_in_the_chunks_of_the_generation_config(count_calls: Any) -> None:
    model = chat_pair()
    model.generation_config.prefill_chunk_size = 8
    passes = count_calls(model.slm), count_calls(model.llm)
    with serving(model) as server:
        server.complete("x" * 200, max_tokens=2, extra_body={"router_threshold": 2})
    assert all(len(lengths) >= 200 / 8 and max(lengths) <= 40 for lengths in passes)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_models_that_cannot_take_tokens_back_write_one_answer_after_the_other(kind: str) -> None:
    model = chat_pair(kind, "llama")
    with serving(model) as server, ThreadPoolExecutor(4) as clients:
        alone = [ask(server, number, veto=False) for number in (1, 2, 5, 7)]
        assert list(clients.map(lambda number: ask(server, number, veto=False), (1, 2, 5, 7))) == alone
        with pytest.raises(openai.BadRequestError, match="llm_veto: not offered here"):
            ask(server, 1)
        with pytest.raises(openai.BadRequestError, match="logprobs: not offered here"):
            server.complete("ab", logprobs=1)


def test_a_static_cache_gives_the_same_answers() -> None:
    model = chat_pair()
    with serving(model) as growing, serving(model, cache_implementation="static", max_model_len=120) as static:
        assert static.client().models.list().data[0].max_model_len == 120
        numbers = (0, 1, 2, 3, 8)
        with ThreadPoolExecutor(5) as clients:
            answers = list(clients.map(lambda number: ask(static, number), numbers))
        assert answers == [ask(growing, number) for number in numbers]


def test_a_server_that_is_told_to_stop_ends_what_is_in_flight_and_refuses_the_rest(tmp_path: Path) -> None:
    directory = save_demo_pair(tmp_path)
    with command(directory, "--max-batch-size", "1", "--grace", "2") as (process, client):
        options: Any = {"model": directory.name, "prompt": "Tom has", "extra_body": {"logit_bias": {"0": -100}}}
        stream = iter(client.completions.create(**options, max_tokens=4000, stream=True))
        next(stream)
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(client.completions.create, **options, max_tokens=4)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.InternalServerError, match="being stopped"):
                waiting.result()
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_mixed_load_loses_nothing_and_leaves_no_memory(served: Served) -> None:
    alone = [ask(served, number) for number in range(20)]
    until, memory = time.monotonic() + float(os.environ.get("CITER_SOAK_SECONDS", "60")), list[int]()

    def client(number: int) -> None:
        if number % 7 == 3:
            stream = served.complete("leave " * number, max_tokens=50, stream=True)
            next(iter(stream))
            stream.close()
        elif number % 7 == 5:
            with pytest.raises(openai.BadRequestError):
                served.complete("x" * 300)
        else:
            assert ask(served, number) == alone[number]

    with ThreadPoolExecutor(8) as clients:
        while time.monotonic() < until:
            list(clients.map(client, [*range(20)] * 4))
            memory.append(psutil.Process().memory_info().rss >> 10)
    wait_until(lambda: served.metric("citer_requests_in_progress") == 0)
    print(f"{80 * len(memory)} requests; KiB: {memory}")
    assert memory[-1] < memory[len(memory) // 2] * 1.02
