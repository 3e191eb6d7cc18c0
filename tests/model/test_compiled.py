"""Passes of static decoding are traced as a whole, and once. That needs no accelerator: a compiler sees the same."""

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, set_seed
from transformers.utils import logging as transformers_logging

from citer_hf import CiterCache
from citer_hf.model.compiled import prepare_thread
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.model.test_modes import GREEDY, ROWS, SAMPLING, STATIC

GRAPHS: list[Any] = []
ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def note_graph(graph: Any, inputs: list[torch.Tensor]) -> Any:
    """A compiler that compiles nothing."""
    GRAPHS.append(graph)
    ALIVE.add(graph)
    return graph.forward


def kept() -> int:
    """How many of all compiled passes are still there."""
    GRAPHS.clear()
    # An error and the frames that it came through hold each other.
    gc.collect()
    gc.collect()
    return len(ALIVE)


def compiling(backend: Any = note_graph, mode: str = "default", **options: Any) -> dict[str, Any]:
    """What makes `generate` compile on a CPU too."""
    config = CompileConfig(backend=backend, mode=mode, **options)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    GRAPHS.clear()
    ALIVE.clear()
    transformers_logging.warning_once.cache_clear()
    yield
    torch._dynamo.reset()


LLM_ALONE = {**GREEDY, "router_threshold": 2.0, "eos_token_id": None, "max_drafts": 0}
SLM_ALONE = {**GREEDY, "router_threshold": 0.0, "eos_token_id": None}


@pytest.mark.parametrize(
    ("slm", "llm", "router"),
    [("gpt2", "gemma3", "confidence"), ("qwen3_moe", "mistral_sliding", {"type": "mlp", "batch_norm": True})],
)
def test_each_pass_with_the_router_in_it_is_traced_once_for_many_texts(slm, llm, router, warned):
    model = make_pair(slm, llm, router)
    wanted = {**GREEDY, "max_new_tokens": 30, "eos_token_id": [2, 9]}
    for lengths, mode in ((ROWS, GREEDY), (ROWS, SAMPLING), ((30, 2, 1, 9), GREEDY)):
        batch = left_padded(random_prompts(lengths))
        set_seed(0)
        plain = model.generate(**batch, **{**wanted, **mode})
        set_seed(0)
        # Whatever the compiler is told, every pass has one length.
        options = compiling(dynamic=mode is SAMPLING or None)
        assert torch.equal(plain, model.generate(**batch, **{**wanted, **mode}, **options))
    # An SLM step, and catch-ups of at most four lengths.
    assert 2 <= len(GRAPHS) <= 5 and not warned()
    GRAPHS.clear()
    model.generate(**batch, **wanted, **compiling())
    assert not GRAPHS


@pytest.mark.slow
def test_what_is_compiled_is_kept_by_batch_size_and_serves_shorter_texts(warned):
    model = make_pair(hidden_size=48, max_position_embeddings=600)
    counts = []
    # Prompts that are too long for a compiled catch-up.
    for rows, length in (((70,), 0), ((70,) * 4, 0), ((66,), 400), ((67,), 300), ((70,) * 4, 0)):
        options = compiling() | ({"max_cache_len": length} if length else {})
        model.generate(**left_padded(random_prompts(rows)), **LLM_ALONE, **options)
        counts.append(len(GRAPHS))
    assert counts == [2, 4, 6, 6, 6] and not warned()


def test_a_router_of_ones_own_runs_as_it_is(warned):
    model = make_pair(router=ScriptedRouter(torch.tensor([[0, 0, 1]])), hidden_size=48)
    prompt = torch.tensor(random_prompts((9,)))
    plain = model.generate(prompt, **GREEDY, max_drafts=0)
    calls, model.router.calls = model.router.calls, 0
    assert torch.equal(plain, model.generate(prompt, **GREEDY, max_drafts=0, **compiling()))
    assert model.router.calls == calls and GRAPHS and not warned()


def test_nothing_is_compiled_on_a_cpu_or_when_it_is_forbidden(pair):
    prompt = torch.tensor(random_prompts((9,)))
    config = CompileConfig(backend=note_graph, mode="default")
    for options in ({}, {"compile_config": config}, {**compiling(), "disable_compile": True}):
        pair.generate(prompt, **GREEDY, **{**STATIC, **options})
    assert not GRAPHS


@pytest.mark.parametrize("told", ["cannot be compiled", "Qwen2ForCausalLM is not compiled: its kind of quantization"])
def test_a_model_that_cannot_be_compiled_runs_as_it_is(told, warned, monkeypatch):
    model = make_pair("llama", "qwen2")
    batch = left_padded(random_prompts(ROWS))
    plain = model.generate(**batch, **GREEDY)
    forward = model.llm.model.layers[0].mlp.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    if "quantization" in told:
        monkeypatch.setattr(model.llm, "hf_quantizer", SimpleNamespace(is_compileable=False), raising=False)
    else:
        monkeypatch.setattr(model.llm.model.layers[0].mlp, "forward", broken)
    for _ in range(2):
        assert torch.equal(plain, model.generate(**batch, **GREEDY, **compiling()))
    assert len(GRAPHS) == 1, "the SLM's"
    assert len(warned()) == 1 and told in warned()[0]


@pytest.mark.parametrize("options", [dict, compiling], ids=["growing", "compiled"])
def test_threads_that_share_a_model_give_what_one_gives(options):
    model = make_pair("llama", "gemma2")
    prompts = [torch.tensor([row]) for row in random_prompts((4, 7, 9, 12))]

    def generate(prompt: torch.Tensor) -> Any:
        return model.generate(prompt, **GREEDY, **options(), return_dict_in_generate=True)

    alone = [model.generate(prompt, **GREEDY, return_dict_in_generate=True) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, prompts * 3))
    for index, output in enumerate(together):
        expected = alone[index % len(prompts)]
        assert torch.equal(output.sequences, expected.sequences)
        ours, theirs = output.past_key_values.routing, expected.past_key_values.routing
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)


def test_what_was_returned_is_not_overwritten_by_the_next_text():
    model = make_pair("llama", "gemma3")
    prompts = [torch.tensor([row]) for row in random_prompts((9, 9))]
    wanted = {**GREEDY, "eos_token_id": None}
    first = model.generate(prompts[0], **wanted, **compiling(), return_dict_in_generate=True, output_logits=True)
    kept = copy.deepcopy(first)
    model.generate(prompts[1], **wanted, **compiling())
    assert all(map(torch.equal, first.logits, kept.logits))
    for ours, theirs in zip(first.past_key_values.slm.layers, kept.past_key_values.slm.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    text = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    again = model.generate(text, past_key_values=first.past_key_values, **wanted)
    assert torch.equal(again, model.generate(text, **wanted))


def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if input_ids.shape[1] > 14:
        raise RuntimeError("the lights went out")
    return scores


@pytest.mark.slow
def test_compiled_passes_of_forgotten_batch_sizes_are_freed():
    model = make_pair(hidden_size=48)
    for rows in (1, 2, 3, 4, 5, 6, 1):
        model.generate(**left_padded(random_prompts((4,) * rows)), **SLM_ALONE, **compiling())
    assert kept() == 4


def test_compiled_passes_go_with_an_error_whose_cache_no_later_text_overwrites_and_with_their_model():
    model = make_pair(hidden_size=48)
    prompt, cache = torch.tensor(random_prompts((9,))), CiterCache(model.config, max_cache_len=64)
    config = {"compile_config": compiling()["compile_config"]}
    with pytest.raises(RuntimeError, match="the lights"):
        model.generate(prompt, **SLM_ALONE, **config, past_key_values=cache, logits_processor=[broken])
    assert kept() == 0
    model.generate(prompt.flip(1), **SLM_ALONE, **compiling())
    assert kept() == 1
    text = torch.cat([prompt, torch.tensor([[7, 8]])], dim=1)
    again = model.generate(text, past_key_values=cache, **GREEDY)
    assert torch.equal(again, model.generate(text, **GREEDY))
    del model, cache
    assert kept() == 0


@pytest.mark.slow
def test_a_text_written_in_inference_mode_leaves_room_for_others():
    model, prompt = make_pair(hidden_size=48), torch.tensor(random_prompts((9,)))
    plain = model.generate(prompt, **GREEDY)
    with torch.inference_mode():
        assert torch.equal(plain, model.generate(prompt, **GREEDY, **compiling()))
    assert torch.equal(plain, model.generate(prompt, **GREEDY, **compiling()))


@pytest.mark.slow
def test_a_pass_that_was_compiled_too_often_runs_as_it_is(warned):
    model, prompt = make_pair(), torch.tensor(random_prompts((9,)))
    # transformers 5.17 raises the limit of the process when it reads a prompt in chunks.
    with torch._dynamo.config.patch(cache_size_limit=2):
        for seed in range(4):
            model.router.seed = seed
            assert torch.equal(model.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY, **compiling()))
    assert len([one for one in warned() if one.startswith("cache_implementation")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("slm", "llm"), [("llama", "llama"), ("gpt2", "gemma3")])
def test_compiled_passes_give_the_same_text(slm, llm, warned):
    model = make_pair(slm, llm, {"type": "mlp"})
    for lengths in ((9,), ROWS):
        batch = left_padded(random_prompts(lengths))
        wanted = {**GREEDY, "max_new_tokens": 40, "router_threshold": 0.5}
        plain = model.generate(**batch, **wanted)
        for _ in range(2):
            assert torch.equal(plain, model.generate(**batch, **wanted, **compiling("inductor", "reduce-overhead")))
    assert not warned()


def test_any_thread_may_record_graphs():
    from torch._inductor import cudagraph_trees

    def recorded() -> Any:
        prepare_thread(torch.device("cuda"))
        return cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(recorded).result() == {}
