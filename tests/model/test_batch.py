"""Sequences of a batch move at their own pace and get the texts that they get alone, in fewer calls of the LLM."""

import copy
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation import MaxTimeCriteria

from citer_hf import CiterCache, CiterForCausalLM
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import VOCAB
from tests.reference import assert_sequences, naive_texts

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
ENDLESS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
LENGTHS = (3, 11, 7, 9)
STATIC = {"cache_implementation": "static"}
MODEL = make_pair("llama", "qwen2", hidden_size=48)
token = st.integers(3, VOCAB - 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    thresholds=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.6, 0.9, 2.0]), min_size=4, max_size=4),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=20, unique=True),
    cache=st.sampled_from([None, "static"]),
    # `max_length` counts the padding, in transformers too.
    limit=st.sampled_from(["max_new_tokens", "max_length"]),
    count=st.sampled_from([1, 9]),
    drafts=st.sampled_from([None, 0, 1, 2, 99]),
    vetoes=st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.6, 1.0]), min_size=4, max_size=4),
)
def test_any_dial_cache_and_length_gives_every_sequence_its_own_text(
    rows, seed, thresholds, eos, cache, limit, count, drafts, vetoes
):
    MODEL.router.seed = seed
    wanted = {**ENDLESS, "eos_token_id": eos or None, "max_drafts": drafts, "cache_implementation": cache}
    wanted["router_threshold"] = torch.tensor(thresholds[: len(rows)])
    wanted["llm_veto"] = torch.tensor(vetoes[: len(rows)])
    wanted[limit] = count + (limit == "max_length") * max(map(len, rows))
    output = MODEL.generate(**left_padded(rows), **wanted)
    assert_sequences(output, rows, naive_texts(MODEL, rows, count, eos, thresholds, vetoes))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    row=st.lists(token, min_size=2, max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.1]),
)
def test_any_cut_into_chunks_gives_the_same_logits_and_record(pair, row, cuts, threshold):
    text, cache, parts = torch.tensor([row]), CiterCache(pair.config), []
    whole = pair(input_ids=text, use_cache=False, router_threshold=threshold)
    while (start := cache.get_seq_length()) < len(row):
        chunk = text[:, start : start + cuts[len(parts) % len(cuts)]]
        parts.append(pair(input_ids=chunk, past_key_values=cache, router_threshold=threshold).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.routing.to_llm, whole.routed_to_llm)


class Independent(nn.Module):
    """Flags each token with the same probability, by its place."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return ((hidden.float().sum(-1) * 1e4).remainder(1.0) >= self.share).float()


@pytest.mark.parametrize(("step", "call", "token"), [(0.1, 1.0, 0.0), (0.1, 1.0, 0.02), (5.0, 1.0, 0.0)])
def test_the_llm_is_called_as_often_as_saves_time(step, call, token, count_calls, monkeypatch):
    model = make_pair(router=Independent(0.2), hidden_size=48)
    steps, calls = count_calls(model.slm), count_calls(model.llm)
    # On this clock an SLM step and an LLM call take so long, and every token of a call a little more.
    clock = lambda: step * len(steps) + call * len(calls) + token * sum(calls)  # noqa: E731
    monkeypatch.setattr(time, "perf_counter", clock)
    model.generate(torch.tensor(random_prompts((6,) * 8)), **{**GREEDY, "max_new_tokens": 120, "eos_token_id": None})
    # In lock-step there are 1 - 0.8^8 = 0.83 calls for each position of eight sequences.
    lock_step = 120 * (step + 0.83 * call + 8 * token)
    assert clock() < (0.65 if step < call else 1.3) * lock_step


@pytest.mark.parametrize("ratio", [2.0, 5.0, 10.0, 30.0])
@pytest.mark.parametrize("accepted", [True, False])
def test_drafting_past_flagged_tokens_saves_calls_and_costs_two_percent_where_none_holds(
    accepted, ratio, count_calls, monkeypatch
):
    model = make_pair(router=Independent(0.2))
    if accepted:
        model.llm = copy.deepcopy(model.slm)
    steps, calls = count_calls(model.slm), count_calls(model.llm)
    monkeypatch.setattr(time, "perf_counter", lambda: len(steps) + ratio * len(calls))
    output = model.generate(torch.tensor(random_prompts((6,))), **ENDLESS, max_new_tokens=240)
    undrafted = 240 * output.cache.routing.llm_share
    assert time.perf_counter() <= (1.0 if accepted else 1.02) * (240 + ratio * undrafted)
    assert not accepted or len(calls) < 0.35 * undrafted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.3, "min_new_tokens": 6, "bad_words_ids": [[5], [7, 8]]},
    ],
)
def test_sampling_is_reproducible_and_does_not_depend_on_when_the_llm_is_called(pair, options):
    batch = left_padded(random_prompts(LENGTHS))
    sampling = {**GREEDY, "do_sample": True, "eos_token_id": [2, 9, 14], **options}
    drawn = []
    for drafts, cache in ((None, None), (2, None), (0, None), (0, "static")):
        set_seed(3)
        drawn.append(pair.generate(**batch, **sampling, max_drafts=drafts, llm_veto=0.3, cache_implementation=cache))
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert not torch.equal(drawn[0], pair.generate(**batch, **sampling))


def test_what_a_sequence_draws_does_not_depend_on_its_neighbours(pair):
    rows, texts = random_prompts((9, 9, 9, 9)), []
    for others in (rows[2:], rows[1:3]):
        set_seed(3)
        batch = torch.tensor([*rows[:2], *others])
        texts.append(pair.generate(batch, **GREEDY | {"do_sample": True, "eos_token_id": None})[:2])
    assert torch.equal(*texts)


def test_sampled_tokens_have_the_distribution_of_the_writing_model():
    model = make_pair(hidden_size=48)
    prompt = torch.tensor(random_prompts((6,)))
    set_seed(0)
    sampling = {"do_sample": True, "max_new_tokens": 2, "num_return_sequences": 4000, "eos_token_id": None}
    drawn = model.generate(prompt, **sampling)[:, 6:]
    first = int(drawn[:, 0].mode().values)
    text = torch.cat([prompt, torch.tensor([[first]])], dim=1)
    expected = model(input_ids=text, use_cache=False, logits_to_keep=1).logits[0, -1].softmax(-1)
    seconds = drawn[drawn[:, 0] == first, 1]
    seen = torch.bincount(seconds, minlength=VOCAB) / len(seconds)
    # Six standard errors.
    assert (seen - expected).abs().max() < 6 * (0.25 / len(seconds)) ** 0.5


@pytest.mark.parametrize("way", [{}, {"max_drafts": 0, "llm_veto": 0.3}, STATIC])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("eos", [[-1], [2, 9, 14, 21]])
def test_the_returned_cache_goes_on_where_what_follows_an_end_is_masked(name, eos, way, count_calls):
    """Without ends that is a mask of ones, as `test_generate_continue_from_past_key_values` of transformers has it."""
    model, batch = make_pair(name, name, threshold=0.4), left_padded(random_prompts(LENGTHS))
    wanted = {**GREEDY, "eos_token_id": eos, "return_dict_in_generate": True}
    first = model.generate(**batch, **wanted, **way)
    width = first.sequences.shape[1]
    assert first.cache.get_seq_length() == first.cache.slm.get_seq_length() == width - 1
    assert first.cache.llm.get_seq_length() == first.cache.llm_length <= width - 1
    text = torch.cat([first.sequences, torch.full((4, 2), 7)], dim=1)
    mask = torch.cat([batch["attention_mask"], first.cache.routing.unfinished.long(), torch.ones(4, 2).long()], dim=1)
    steps = count_calls(model.slm)
    # Above 1, the LLM reads all that it has not read.
    options = {**GREEDY, "eos_token_id": None, "router_threshold": 2.0}
    second = model.generate(text, attention_mask=mask, past_key_values=first.cache, **options)
    assert steps[0] == 3, "what the cache holds is not read again"
    assert torch.equal(second, model.generate(text, attention_mask=mask, **options))


@pytest.mark.parametrize("length", [None, 64])
def test_an_error_in_the_middle_leaves_the_users_cache_as_it_was(pair, length, monkeypatch):
    batch, cache, calls = left_padded(random_prompts(LENGTHS)), CiterCache(pair.config, max_cache_len=length), []

    def broken(self: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("the lights went out")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    monkeypatch.setattr(MaxTimeCriteria, "__call__", broken)
    with pytest.raises(RuntimeError, match="the lights"):
        pair.generate(**batch, **GREEDY, eos_token_id=2, past_key_values=cache, max_time=1000.0)
    assert cache.get_seq_length() == cache.slm.get_seq_length() == cache.llm_length == 0
    text = torch.cat([batch["input_ids"], torch.full((4, 1), 5)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    again = pair.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY, eos_token_id=None)
    assert torch.equal(again, pair.generate(text, attention_mask=mask, **GREEDY, eos_token_id=None))


def test_a_hook_on_the_pair_or_a_changed_forward_sees_every_step(pair):
    class Counting(CiterForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["input_ids"].shape[0])
            return super().forward(*args, **kwargs)

    seen: list[int] = []
    prompts, wanted = torch.tensor(random_prompts((5, 5, 5))), {**GREEDY, "eos_token_id": None}
    handle = pair.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[0]))
    pair.generate(prompts, **wanted)
    handle.remove()
    Counting(pair.config, slm=pair.slm, llm=pair.llm, router=pair.router).eval().generate(prompts, **wanted)
    assert seen == [3] * 40


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_drafts", value) for value in (-1, True, 1.5, "all")),
        *(("llm_veto", value) for value in (-0.1, 1.1, math.nan, "much", torch.tensor([0.1]), torch.tensor(0.1))),
    ],
)
def test_a_dial_that_means_nothing_is_refused(pair, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        pair.generate(**left_padded(random_prompts()), **GREEDY, **{name: value})


# ---- limits and ends ----


@pytest.mark.parametrize(("lengths", "drafts", "eos"), [((6,), 0, None), (LENGTHS, 0, [2]), (LENGTHS, None, [2])])
def test_when_the_time_is_up_every_sequence_stops_soon(pair, lengths, drafts, eos, count_calls, monkeypatch):
    passes = count_calls(pair.slm), count_calls(pair.llm)
    # Each forward pass takes a second on the clock that `max_time` reads.
    clock = SimpleNamespace(time=lambda: float(sum(map(len, passes))))
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", clock)
    rows, width = random_prompts(lengths), max(lengths)
    wanted = {**ENDLESS, "eos_token_id": eos, "max_drafts": drafts, "max_new_tokens": 100}
    full = pair.generate(**left_padded(rows), **wanted)
    began = clock.time()
    output = pair.generate(**left_padded(rows), **wanted, max_time=40.0)
    # Every sequence is looked at where a token of it is settled: at most one cycle later.
    assert 40 < clock.time() - began <= 40 + 33
    for row, unfinished in enumerate(output.cache.routing.unfinished):
        length = int(unfinished.sum())
        assert 0 < length < 100
        assert torch.equal(output.sequences[row, : width + length], full.sequences[row, : width + length])
        assert not output.sequences[row, width + length :].any()


class StopsRows(StoppingCriteria):
    """Ends chosen rows after so many tokens."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


class FirstRow(nn.Module):
    """Sends every token of the first row to the LLM."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (torch.arange(len(hidden)) > 0)[:, None].float().expand(hidden.shape[:2])


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_a_custom_criterion_stops_never_count_and_never_call_the_llm(count_calls, use_cache):
    model = make_pair(router=FirstRow(), hidden_size=48)
    calls = count_calls(model.llm)
    wanted = {**ENDLESS, "max_new_tokens": 10, "stopping_criteria": StoppingCriteriaList([StopsRows([15, 16, 99])])}
    output = model.generate(**left_padded(random_prompts()), **wanted, use_cache=use_cache)
    assert len(calls) == 3, "the first row, the only one that needs the LLM, has three tokens"
    if use_cache:
        assert output.past_key_values.routing.unfinished.sum(1).tolist() == [3, 4, 10]


def test_a_forward_for_finished_rows_alone_skips_the_llm(pair, count_calls):
    calls = count_calls(pair.llm)
    text = torch.tensor(random_prompts((5, 5)))
    output = pair(input_ids=text, router_threshold=2.0, finished_rows=torch.tensor([True, True]))
    assert calls == [] and not output.routed_to_llm.any()
