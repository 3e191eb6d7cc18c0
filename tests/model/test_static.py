"""`cache_implementation="static"` gives what a growing cache gives, in every mode that can use it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer, set_seed

from citer_hf import CiterCache
from citer_hf.model.static_memory import BUCKETS
from tests.conftest import left_padded, make_pair, random_prompts
from tests.model.test_modes import PROCESSORS, single
from tests.reference import assert_sequences, naive_texts

STATIC = {"cache_implementation": "static"}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
SAMPLING = {**GREEDY, "do_sample": True}
ROWS = (3, 11, 7, 9)


@pytest.mark.parametrize("length", [1, 9, 40])
def test_one_row_is_that_of_the_naive_loop(pair, length, loop_taken):
    rows = random_prompts((length,))
    output = pair.generate(torch.tensor(rows), **GREEDY, **STATIC, eos_token_id=None, return_dict_in_generate=True)
    assert loop_taken() == "static"
    assert_sequences(output, rows, naive_texts(pair, rows, 20, ()))


@pytest.mark.parametrize("lengths", [(9,), ROWS])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_the_ends_of_the_threshold_are_the_two_models(pair, lengths, threshold, loop_taken):
    batch = left_padded(random_prompts(lengths))
    ours = pair.generate(**batch, **GREEDY, **STATIC, router_threshold=threshold)
    assert loop_taken() == "static"
    assert torch.equal(ours, (pair.slm if threshold == 0 else pair.llm).generate(**batch, **GREEDY))


ONE_ROW = ("top_k", "repetition_penalty", "guidance")


@pytest.mark.parametrize(
    ("name", "lengths"), [*((name, ROWS) for name in PROCESSORS), *((one, (9,)) for one in ONE_ROW)]
)
def test_a_processor_acts_as_with_a_growing_cache(pair, name, lengths, loop_taken):
    batch, options = left_padded(random_prompts(lengths)), {**SAMPLING, **PROCESSORS[name], "eos_token_id": [2, 9]}
    set_seed(0)
    plain = pair.generate(**batch, **options)
    set_seed(0)
    assert torch.equal(plain, pair.generate(**batch, **options, **STATIC))
    # Guidance runs the model a second time, for all rows at once.
    assert (loop_taken() == "static") == (name != "guidance" or len(lengths) == 1)


class Shown(TextStreamer):
    """Keeps what it gets, and who wrote it according to the record at that time."""

    def __init__(self, cache: CiterCache):
        self.cache, self.tokens, self.by_llm, self.ended = cache, [], [], False

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:
            self.by_llm.append(self.cache.routing.by_llm(len(self.tokens)))
            self.tokens += value.tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token_and_who_wrote_it(pair, loop_taken):
    cache = CiterCache(pair.config, max_cache_len=64)
    shown = Shown(cache)
    output = pair.generate(**single(), **GREEDY, streamer=shown, past_key_values=cache, return_dict_in_generate=True)
    assert loop_taken() == "static" and shown.ended
    assert shown.tokens == output.sequences[0, 9:].tolist()
    assert shown.by_llm == cache.routing.to_llm[0].tolist() and len(cache.routing) == 20
    plain = pair.generate(**single(), **GREEDY, return_dict_in_generate=True)
    assert torch.equal(plain.past_key_values.routing.to_llm, cache.routing.to_llm)


@pytest.mark.parametrize("options", [{}, STATIC])
def test_a_processor_and_a_criterion_of_ones_own_see_each_token_of_one_row_once(pair, options, loop_taken):
    seen: list[torch.Tensor] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        assert input_ids.shape[1] == 8 + len(seen)
        return scores

    def at_fifteen(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert len(scores) == input_ids.shape[1] - 9
        return torch.tensor([input_ids.shape[1] >= 15])

    mine = {"logits_processor": LogitsProcessorList([note]), "stopping_criteria": StoppingCriteriaList([at_fifteen])}
    wanted = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    output = pair.generate(**single(), **wanted, **mine, **options)
    assert loop_taken() == ("static" if options else "")
    assert output.sequences.shape[1] == 15 and len(seen) == len(output.logits) == 6
    assert all(torch.equal(ours, step) for ours, step in zip(seen, output.logits, strict=True))


@pytest.mark.parametrize(("name", "lengths"), [("llama", (9,)), ("gemma3", ROWS)])
def test_a_chat_goes_on_statically_and_the_cache_grows(name, lengths, loop_taken):
    model = make_pair(name, name)
    batch = left_padded(random_prompts(lengths))
    wanted = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    cache = None
    for turn in range(2):
        options = STATIC if cache is None else {"past_key_values": cache}
        output = model.generate(**batch, **wanted, **options)
        assert loop_taken() == "static", "a static cache stays one"
        fresh = model.generate(**batch, **wanted)
        assert torch.equal(output.sequences, fresh.sequences)
        assert torch.equal(output.past_key_values.routing.to_llm, fresh.past_key_values.routing.to_llm)
        cache, length = output.past_key_values, output.sequences.shape[1]
        assert cache.get_max_length() == length - 1, f"turn {turn}: room for what was asked for, as in transformers"
        assert cache.get_seq_length() == cache.slm.get_seq_length() == length - 1
        assert cache.llm.get_seq_length() == cache.llm_length <= length - 1
        follow = torch.full((len(lengths), 2), 7)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(lengths), 22, dtype=torch.long)], dim=1)
        batch = {"input_ids": torch.cat([output.sequences, follow], dim=1), "attention_mask": mask}


def test_the_length_may_be_given(pair):
    for options in ({**STATIC, "max_cache_len": 200}, {"past_key_values": CiterCache(pair.config, max_cache_len=200)}):
        output = pair.generate(**single(), **GREEDY, **options, return_dict_in_generate=True)
        assert output.past_key_values.get_max_length() == 200
    assert CiterCache(pair.config).get_max_length() == -1


@pytest.mark.parametrize("length", [None, 32])
def test_a_copied_prefix_serves_many_prompts(pair, length, loop_taken):
    prefix = random_prompts((7,))[0]
    cache = CiterCache(pair.config, max_cache_len=length)
    with torch.no_grad():
        pair(input_ids=torch.tensor([prefix]), past_key_values=cache)
    for seed in (1, 2):
        text = torch.tensor([prefix + random_prompts((4,), seed)[0]])
        ours = pair.generate(input_ids=text, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert loop_taken() == ("static" if length else "")
        assert torch.equal(ours, pair.generate(input_ids=text, **GREEDY))
    assert cache.get_seq_length() == 7


def test_the_prompt_may_be_read_in_chunks(pair, loop_taken):
    batch = left_padded(random_prompts())
    chunked = pair.generate(**batch, **GREEDY, **STATIC, prefill_chunk_size=4)
    assert loop_taken() == "static"
    assert torch.equal(pair.generate(**batch, **GREEDY), chunked)


class Every(nn.Module):
    """Sends every so manieth token to the LLM, by the call."""

    def __init__(self, period: int):
        super().__init__()
        self.period, self.calls = period, 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full(hidden.shape[:-1], float(self.calls % self.period != 0))


@pytest.mark.parametrize("period", [1, 3, 70])
def test_catch_ups_have_a_few_lengths(period, count_calls):
    model = make_pair(router=Every(period), hidden_size=48)
    plain = model.generate(**single(), **{**GREEDY, "max_new_tokens": 160}, eos_token_id=None)
    model.router.calls = 0
    lengths, steps = count_calls(model.llm), count_calls(model.slm)
    static = model.generate(**single(), **{**GREEDY, "max_new_tokens": 160}, **STATIC, eos_token_id=None)
    assert torch.equal(static, plain)
    # The first call reads the prompt. Longer ones than the longest length are read as they are.
    assert set(lengths[1:]) <= {*BUCKETS, 70} and set(steps[1:]) == {1}


class Constant(nn.Module):
    """A router that is always as sure."""

    dtype = torch.float32

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.full(hidden.shape[:-1], 0.7, dtype=self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.7, torch.full((4,), 0.7)])
def test_a_score_that_just_reaches_the_threshold_is_the_slms(dtype, threshold):
    model, batch = make_pair(router=Constant(), hidden_size=48), left_padded(random_prompts(ROWS))
    model.router.dtype = dtype
    for options in ({}, {"waiting_rows": 1}, STATIC):
        wanted = {**GREEDY, **options, "eos_token_id": None, "return_dict_in_generate": True}
        output = model.generate(**batch, **wanted, router_threshold=threshold)
        assert output.past_key_values.routing.llm_share == 0


@pytest.mark.parametrize("length", [0, "x"])
def test_room_that_is_no_number_of_tokens_is_refused(pair, length):
    with pytest.raises(ValueError, match="max_cache_len: expected a number of tokens from 1"):
        pair.generate(**single(), **GREEDY, **STATIC, max_cache_len=length)


@pytest.mark.parametrize("mode", [SAMPLING, {**GREEDY, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("lengths", [(9,), ROWS])
def test_the_host_waits_once_per_pass(pair, mode, lengths, count_calls, monkeypatch):
    steps, calls, waits = count_calls(pair.slm), count_calls(pair.llm), []

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: waits.append(1) or original(*args, **kwargs)

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))
    counts = []
    for tokens in (8, 20):
        for one in (steps, calls, waits):
            one.clear()
        options = {**mode, "max_new_tokens": tokens, "eos_token_id": None}
        pair.generate(**left_padded(random_prompts(lengths)), **options, **STATIC)
        counts.append((len(steps) + len(calls), len(waits)))
    (passes, waited), (more_passes, more_waited) = counts
    assert more_waited - waited == more_passes - passes


def never(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beams"),
        ({"logits_processor": LogitsProcessorList([lambda input_ids, scores: scores])}, "processor of your own"),
        ({"stopping_criteria": StoppingCriteriaList([never])}, "criterion of your own"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
    ],
)
def test_what_cannot_be_static_grows_and_says_so_once(pair, options, reason, loop_taken, warned):
    batch = left_padded(random_prompts(ROWS))
    plain = pair.generate(**batch, **GREEDY, **options)
    for _ in range(2):
        static = pair.generate(**batch, **GREEDY, **STATIC, **options)
    assert loop_taken() != "static"
    assert len(warned()) == 1 and reason in warned()[0]
    assert torch.equal(*(one if isinstance(one, torch.Tensor) else one.sequences for one in (plain, static)))


def test_a_model_that_transformers_does_not_compile_grows(monkeypatch, loop_taken, warned):
    model = make_pair("llama", "qwen2")
    monkeypatch.setattr(type(model.llm), "_can_compile_fullgraph", False)
    model.generate(**single(), **GREEDY, **STATIC)
    assert loop_taken() != "static" and "qwen2" in warned()[0]


def test_what_transformers_refuses_with_a_static_cache_is_refused(pair):
    with pytest.raises(ValueError, match="cache_implementation"):
        pair.generate(**single(), **GREEDY, **STATIC, past_key_values=CiterCache(pair.config))
