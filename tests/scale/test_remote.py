"""A pair whose LLM is on a server decides as the same pair with the LLM in the process."""

import copy
import gc
import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from citer_hf import DEMO_PAIR, CiterForCausalLM, RemoteLM
from citer_hf.demo.problems import problems
from citer_hf.evaluation.decode import decode
from citer_hf.model.engine import Engine
from citer_hf.model.sampling import Stops
from citer_hf.model.sequence import Sequence as Text
from citer_hf.training.labels import Labels
from tests.chat_pairs import QUICK_BENCH, character_tokenizer, invoke
from tests.conftest import left_padded, random_prompts
from tests.families import EOS, PAD, tiny_model
from tests.llm_server import LLMServer, serving_llm
from tests.served import command, serving, wait_until

KINDS = ("vllm", "sglang")
SETTINGS: list[dict[str, Any]] = [
    {"router_threshold": 0.0},
    {"router_threshold": 0.5},
    {"router_threshold": 0.5, "max_drafts": 0},
    {"router_threshold": 2.0},
    {"router_threshold": 0.4, "llm_veto": 0.3},
    {"router_threshold": 0.3, "llm_veto": 1.0},
    {"router_threshold": 0.5, "llm_veto": 0.2, "do_sample": True, "top_k": 10, "temperature": 1.3},
    {"router_threshold": 2.0, "do_sample": True, "top_k": 20, "top_p": 0.8},
    {"router_threshold": 0.5, "llm_veto": 0.3, "min_new_tokens": 12, "no_repeat_ngram_size": 2},
]


Reached = tuple[LLMServer, Path]  # a server, and the folder of what it serves


def saved(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A tiny LLM on disk with a tokenizer, from which a remote one takes its configuration."""
    model = tiny_model(family, 1, **options)
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reached]:
    folder = saved(tmp_path_factory.mktemp("llm"))
    with serving_llm(tiny_model("llama", 1), character_tokenizer(), request.param) as server:
        yield server, folder


def pairs(served: Reached, slm: str = "gemma3", router: str = "random", **options: Any) -> tuple[Any, Any]:
    """The same pair twice: with its LLM here, and on a server."""
    server, folder = served
    local = CiterForCausalLM.from_pair(tiny_model(slm), copy.deepcopy(server.model), router=router)
    remote = RemoteLM(server.url, config=folder, **options)
    return local, CiterForCausalLM.from_pair(tiny_model(slm), remote, router=router)


def written(model: Any, batch: Any, **settings: Any) -> tuple[Any, ...]:
    torch.manual_seed(3)
    options = {"max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": PAD, "return_dict_in_generate": True}
    output = model.generate(**batch, **{**options, **settings})
    routing = output.past_key_values.routing
    return output.sequences.tolist(), routing.to_llm.tolist(), routing.vetoed.tolist()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_text_and_every_decision_are_those_of_the_local_pair(served: Reached, settings: dict[str, Any]) -> None:
    local, remote = pairs(served)
    batch = left_padded(random_prompts((11, 7, 4)))
    assert written(remote, batch, **settings) == written(local, batch, **settings)


def test_a_cache_goes_on_and_the_loop_of_transformers_gives_the_same_text(served: Reached) -> None:
    local, remote = pairs(served)
    texts = []
    for model in (local, remote):
        options = {"max_new_tokens": 6, "router_threshold": 0.5, "pad_token_id": PAD, "return_dict_in_generate": True}
        first = model.generate(torch.tensor([[5, 6, 7]]), **options)
        second = model.generate(
            torch.cat([first.sequences, torch.tensor([[8, 9]])], 1), past_key_values=first.past_key_values, **options
        )
        handle = model.register_forward_hook(lambda *_: None)
        plain = model.generate(torch.tensor([[5, 6, 7]]), **{**options, "max_new_tokens": 12})
        handle.remove()
        texts.append((second.sequences.tolist(), plain.sequences.tolist()))
    assert texts[0] == texts[1]


def test_a_large_model_of_another_kind_needs_no_layers_here(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3_next")
    with serving_llm(tiny_model("qwen3_next", 1), character_tokenizer()) as server:
        local, remote = pairs((server, folder), "llama")
        batch = left_padded(random_prompts((9,)))
        assert written(remote, batch, router_threshold=0.5) == written(local, batch, router_threshold=0.5)
        assert written(remote, batch, router_threshold=0.3, llm_veto=0.9)[2] != written(remote, batch)[2]


def test_the_llm_alone_is_written_by_its_server_and_completions_come_at_once(served: Reached) -> None:
    local, remote = pairs(served)
    for model in (local, remote):
        model.generation_config.eos_token_id = EOS
    prompts, before = [[5, 6, 7], [9, 8], [11] * 9], len(served[0].bodies)
    outputs = [decode(model, prompts, max_new_tokens=[20, 9, 12], alone="llm") for model in (local, remote)]
    assert [one.tokens for one in outputs[0]] == [one.tokens for one in outputs[1]]
    assert [one.passes for one in outputs[0]] == [one.passes for one in outputs[1]]
    assert len(served[0].bodies) - before == len(prompts)


def test_a_verdict_costs_a_request_for_a_position_or_for_a_text(served: Reached) -> None:
    _, remote = pairs(served)
    before = len(served[0].bodies)
    output = remote.generate(
        **left_padded(random_prompts((9,))),
        max_new_tokens=20,
        router_threshold=2.0,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    asked, calls = len(served[0].bodies) - before, output.past_key_values.routing.llm_calls
    assert asked == calls if served[0].kind == "sglang" else asked > calls


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_sample": True, "top_k": 21}, "top_k: a draw from 21"),
        ({"do_sample": True, "top_k": 0}, "top_k"),
        ({"do_sample": True, "top_k": 20, "no_repeat_ngram_size": 2}, "others are taken away"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: it needs logits"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"num_beams": 2}, "num_beams"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(
    served: Reached, settings: dict[str, Any], named: str
) -> None:
    _, remote = pairs(served)
    with pytest.raises(ValueError, match=named):
        remote.generate(**left_padded(random_prompts((5,))), max_new_tokens=3, **settings)
    with pytest.raises(ValueError, match="likelihood"):
        remote(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]), router_threshold=2.0)


def test_with_all_log_probabilities_everything_is_exact(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with serving_llm(tiny_model("llama", 1), most_logprobs=61) as server:
        local, remote = pairs((server, folder), logprobs=61)
        batch = left_padded(random_prompts((8, 3)))
        settings = {"do_sample": True, "top_k": 0, "temperature": 1.5, "router_threshold": 0.5, "llm_veto": 0.3}
        assert written(remote, batch, **settings) == written(local, batch, **settings)
        ids = torch.tensor([[5, 6, 7, 8]])
        losses = [model(ids, labels=ids, router_threshold=2.0).loss for model in (local, remote)]
        assert torch.allclose(*losses, atol=1e-5)


def test_a_saved_router_names_the_llm_and_no_address(served: Reached, tmp_path: Path) -> None:
    server, folder = served
    save = CiterForCausalLM.from_pair(
        saved(tmp_path / "slm"), RemoteLM(server.url, config=folder, api_key="secret-key")
    )
    with pytest.raises(ValueError, match="on a server"):
        save.save_pretrained(tmp_path / "whole", save_base_models=True)
    save.save_pretrained(tmp_path / "router")
    texts = [path.read_bytes() for path in (tmp_path / "router").rglob("*") if path.is_file()]
    assert not any(word in text for text in texts for word in (b"127.0.0.1", b"secret-key", b'"is_remote":'))
    here = CiterForCausalLM.from_pretrained(tmp_path / "router", local_files_only=True)
    there = CiterForCausalLM.from_pretrained(tmp_path / "router", llm_name_or_path=RemoteLM(server.url, config=folder))
    batch = left_padded(random_prompts((6,)))
    assert written(here, batch, router_threshold=2.0) == written(there, batch, router_threshold=2.0)
    assert copy.deepcopy(there).llm is there.llm


# ---- bad servers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Reached]:
    with serving_llm(tiny_model("llama", 1), character_tokenizer(), key="right") as server:
        yield server, saved(tmp_path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"url": "host:8000"}, "url: expected an address such as"),
        ({"model": "larger"}, r"model: expected one that .* has \(large\), got 'larger'"),
        ({"api_key": "wrong"}, "the key was refused.*CITER_LLM_API_KEY"),
        ({"config": "nowhere/nothing", "local_files_only": True}, "config: no configuration .* from nowhere/nothing"),
        ({"logprobs": 21}, "refuses the request: 21 logprobs"),
        ({"logprobs": 0}, "logprobs, timeout, max_connections: expected at least 1"),
        ({"device_map": "auto"}, "device_map: expected none of these"),
        ({"timeout": "soon"}, "logprobs, timeout, max_connections"),
        ({"api_key": "k\u00e9y"}, "api_key: expected printable ASCII"),
        ({"url": "http://me:secret@127.0.0.1/v1"}, "url: expected an address without a user"),
        ({"url": "http://127.0.0.1:99999/v1"}, "url: expected an address such as"),
    ],
)
def test_a_wrong_argument_is_named(vllm: Reached, options: dict[str, Any], error: str) -> None:
    server, folder = vllm
    with pytest.raises((ValueError, OSError), match=error):
        RemoteLM(**{"url": server.url, "api_key": "right", "config": folder, **options})


def test_another_model_or_tokenizer_behind_the_name_is_found(vllm: Reached, tmp_path: Path) -> None:
    server, folder = vllm
    with pytest.raises(ValueError, match=r"refuses the token id 69.*another model"):
        RemoteLM(server.url, api_key="right", config=saved(tmp_path / "larger", vocab_size=70))
    with pytest.raises(ValueError, match=r"answers with the token id|beyond the table of 50 rows"):
        RemoteLM(server.url, api_key="right", config=saved(tmp_path / "smaller", vocab_size=50))
    server.tokenizer = character_tokenizer(characters="zyxwvutsrqponmlkjihgfedcba0123456789 \n.,?!:;'-+*=/()[]<>_&")
    with pytest.raises(ValueError, match="divides a text into other tokens"):
        RemoteLM(server.url, api_key="right", config=folder)


def telling(logprobs: dict[str, float]) -> Any:
    return lambda handler, body: handler.answer(200, {"choices": [{"logprobs": {"top_logprobs": [logprobs]}}]})


def cut(handler: Any, body: dict[str, Any]) -> bool:
    handler.close_connection = True
    handler.connection.close()
    return True


FAULTS: list[tuple[Any, str]] = [
    (telling({"token_id:5": -0.1, "token_id:6": -3.0}), "gives 2 log-probabilities .* expected 20. Pass logprobs=2"),
    (telling({f"token_id:{55 + number}": -number for number in range(20)}), "token id 61, but .* has 61 tokens"),
    (cut, "request completions: .*Is it running"),
    (lambda handler, body: handler.answer(503, {"error": "busy"}), "status 503.*busy"),
    (lambda handler, body: handler.answer(200, b"<html>"), "expected JSON, got '<html>'"),
    (lambda handler, body: handler.answer(200, {"choices": []}), "answers in an unknown form"),
    (lambda handler, body: time.sleep(5) or True, "no answer within 1 s"),
]


@pytest.mark.parametrize(("fault", "error"), FAULTS, ids=[error for _, error in FAULTS])
def test_a_server_that_fails_ends_the_call_in_time_and_is_used_again(vllm: Reached, fault: Any, error: str) -> None:
    server, folder = vllm
    remote = RemoteLM(server.url, api_key="right", config=folder, timeout=1 if "within" in error else 20)
    pair = CiterForCausalLM.from_pair(tiny_model("llama"), remote, router="random")
    settings: dict[str, Any] = {"max_new_tokens": 5, "router_threshold": 2.0, "pad_token_id": PAD}
    expected = pair.generate(**left_padded(random_prompts((6,))), **settings)
    server.fault, began = fault, time.monotonic()
    with pytest.raises((ConnectionError, ValueError), match=error) as raised:
        pair.generate(**left_padded(random_prompts((6,))), **settings)
    assert server.url in str(raised.value) and time.monotonic() - began < 5
    server.fault = None
    time.sleep(0.6)
    assert torch.equal(pair.generate(**left_padded(random_prompts((6,))), **settings), expected)


def test_one_failing_request_ends_its_own_sequence_alone(vllm: Reached) -> None:
    server, folder = vllm
    remote = RemoteLM(server.url, api_key="right", config=folder)
    pair = CiterForCausalLM.from_pair(tiny_model("llama"), remote, router="random", router_threshold=2.0)
    sequences = [Text([5, 6, number], Stops(12), 2.0) for number in range(7, 11)]
    server.fault = lambda handler, body: body.get("prompt", [])[:3] == [5, 6, 8] and handler.answer(500, {})
    engine = Engine(pair, 4)
    for one in sequences:
        engine.submit(one)
    engine.run()
    assert [isinstance(one.error, ConnectionError) for one in sequences] == [False, True, False, False]
    assert [len(one.record) for one in sequences] == [9, 0, 9, 9]


def test_what_the_server_tells_must_decide_the_token(tmp_path: Path) -> None:
    folder = saved(tmp_path, vocab_size=90)
    with serving_llm(tiny_model("llama", 1, vocab_size=90)) as server:
        remote = CiterForCausalLM.from_pair(tiny_model("llama"), RemoteLM(server.url, config=folder), router="random")
        local = CiterForCausalLM.from_pair(tiny_model("llama"), server.model, router="random")
        found = []
        for seed in range(12):
            texts = []
            for model in (local, remote):
                torch.manual_seed(seed)
                settings = {
                    "do_sample": True,
                    "top_k": 20 if seed % 2 else 8,
                    "max_new_tokens": 8,
                    "pad_token_id": PAD,
                }
                try:
                    texts.append(model.generate(torch.tensor([[5, 6]]), router_threshold=2.0, **settings).tolist())
                except ValueError as error:
                    texts.append(str(error))
            found.append(texts[0] == texts[1] or "do not decide" in texts[1])
        assert all(found)
        few = RemoteLM(server.url, config=folder, logprobs=5)
        few_pair = CiterForCausalLM.from_pair(tiny_model("llama"), few, router="random", router_threshold=0.3)
        with pytest.raises(ValueError, match="do not decide"):
            few_pair.generate(torch.tensor([[5, 6]]), llm_veto=0.5, suppress_tokens=list(range(40)), max_new_tokens=20)


def test_a_fork_and_a_copy_ask_for_themselves_and_nothing_is_left_of_one_that_is_gone(vllm: Reached) -> None:
    server, folder = vllm
    remote = RemoteLM(server.url, api_key=" right\n", config=folder)
    before, expected = threading.active_count(), remote.complete([[5, 6]], [4], [])
    assert pickle.loads(pickle.dumps(remote)).complete([[5, 6]], [4], []) == expected
    gc.collect()
    wait_until(lambda: threading.active_count() <= before + 1)
    child = os.fork()
    if child == 0:
        os._exit(remote.complete([[5, 6]], [4], []) != expected)
    assert os.waitpid(child, 0)[1] == 0


def test_a_short_failure_is_not_seen(vllm: Reached) -> None:
    server, folder = vllm
    pair = CiterForCausalLM.from_pair(tiny_model("llama"), RemoteLM(server.url, api_key="right", config=folder))
    settings: dict[str, Any] = {"max_new_tokens": 5, "router_threshold": 2.0, "pad_token_id": PAD}
    expected, failed = pair.generate(**left_padded(random_prompts((6,))), **settings), []

    def first_fails(handler: Any, body: dict[str, Any]) -> bool:
        failed.append(body)
        return len(failed) in (1, 3) and handler.answer(502, {})

    server.fault = first_fails
    assert torch.equal(pair.generate(**left_padded(random_prompts((6,))), **settings), expected)
    assert len(failed) > 3


# ---- commands ------------------------------------------------------------------------------------------------------


def test_a_server_of_the_pair_answers_many_and_tells_when_the_llm_is_gone(served: Reached) -> None:
    local, remote = pairs(served)
    for model in (local, remote):
        model._tokenizer = character_tokenizer()
        model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)

    def ask(server: Any, number: int) -> str:
        dials = {"router_threshold": number % 3 / 2, "llm_veto": number % 2 / 2}
        return server.complete(f"{number} is it", max_tokens=12, temperature=0, extra_body=dials).choices[0].text

    with serving(local) as server:
        expected = [ask(server, number) for number in range(8)]
    with serving(remote) as server, ThreadPoolExecutor(8) as clients:
        assert list(clients.map(lambda number: ask(server, number), range(8))) == expected
        assert server.complete("a", temperature=1, seed=3).choices[0].text
        with pytest.raises(Exception, match=r"400.*top_k"):
            server.complete("a", temperature=1, extra_body={"top_k": 30})
        served[0].fault = lambda handler, body: handler.answer(503, {})
        try:
            with pytest.raises(Exception, match=r"503.*server of the LLM does not answer"):
                ask(server, 2)
            assert ask(server, 0) == expected[0]
        finally:
            served[0].fault = None


def test_commands_take_an_address_and_labels_are_those_of_the_local_pair(tmp_path: Path) -> None:
    model, data = CiterForCausalLM.from_pretrained(DEMO_PAIR), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(vars(one)) + "\n" for one in problems("train", 3, 5)))
    shared = ["--data", data, "--checker", "math", "--max-new-tokens", 16]
    with serving_llm(model.llm, model.load_tokenizer(), name="big") as server:
        there = ["--llm", f"{server.url}#big", "--llm", f"config={DEMO_PAIR / 'llm'}", "--llm", "timeout=9"]
        for name, llm in (("here", []), ("there", there)):
            result = invoke("label", "demo", *llm, *shared, "--out", tmp_path / name, "--router-threshold", 2)
            assert result.exit_code == 0, result.output
            result = invoke("evaluate", "demo", *llm, *shared, "--out", tmp_path / f"{name}-results")
            assert result.exit_code == 0, result.output
        result = invoke("bench", "demo", *there, *QUICK_BENCH)
        assert result.exit_code == 0, result.output
        result = invoke("chat", "demo", *there[:2], text="/exit\n")
        assert result.exit_code == 1 and "config=" in result.output
    here, there_too = (Labels.load(tmp_path / name) for name in ("here", "there"))
    for column in ("case", "label", "rollout", "llm_token"):
        assert torch.equal(getattr(here, column), getattr(there_too, column)), column
    assert torch.allclose(here.llm_logprob, there_too.llm_logprob, atol=1e-4)
    assert torch.equal(here.llm_correct, there_too.llm_correct)
    there_too.check_pair(model)
    results = [json.loads((tmp_path / f"{name}-results" / "results.json").read_text()) for name in ("here", "there")]
    assert results[0]["ends"]["llm"]["accuracy"] == results[1]["ends"]["llm"]["accuracy"]
    assert server.url not in json.dumps(results)


def test_two_servers_of_the_command_share_one_remote_llm(tmp_path: Path) -> None:
    model = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    prompts = [one.prompt for one in problems("test", 3, 4)]
    with serving_llm(model.llm, model.load_tokenizer(), name="big") as server, ExitStack() as stack:
        options = ("--llm", f"{server.url}#big", "--llm", f"config={DEMO_PAIR / 'llm'}", "--router-threshold", "2")
        clients = [stack.enter_context(command("demo", *options))[1] for _ in range(2)]

        def ask(client: Any, prompt: str) -> str:
            return client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0).choices[0].text

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, clients * 4, [prompt for prompt in prompts for _ in range(2)]))
    tokenizer = model.load_tokenizer()
    for number, text in enumerate(found):
        inputs = tokenizer(prompts[number // 2], return_tensors="pt")
        ids = model.generate(**inputs, router_threshold=2, max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert server.bodies


@pytest.mark.slow
def test_a_real_vllm_decides_as_the_llm_in_this_process() -> None:
    """`vllm serve citer_hf/demo/pair/llm --tokenizer citer_hf/demo/pair --dtype float32`."""
    url = os.environ.get("CITER_VLLM_URL")
    if url is None:
        pytest.skip("CITER_VLLM_URL is not set")
    local = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    llm = RemoteLM(url, config=DEMO_PAIR / "llm")
    remote = CiterForCausalLM.from_pretrained(DEMO_PAIR, llm_name_or_path=llm)
    tokenizer = local.load_tokenizer()
    tokenizer.padding_side = "left"
    prompts = [one.prompt for one in problems("test", 11, 16)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to("cpu")
    for settings in SETTINGS:
        outputs = [written(model, batch, **{"max_new_tokens": 64, **settings}) for model in (local, remote)]
        assert outputs[0] == outputs[1], settings
