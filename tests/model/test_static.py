"""`cache_implementation="static"` gives what a growing cache gives, in every mode that can use it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList, TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from citer_hf import CiterCache
from citer_hf.model.batch_support import ARCHITECTURES
from citer_hf.model.static_memory import BUCKETS
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import VOCAB
from tests.model.test_modes import PROCESSORS, single
from tests.model.test_rows import assert_rows_are_those_of_the_naive_loop, pair_of, same_output
from tests.reference import naive_generate

STATIC = {"cache_implementation": "static"}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
SAMPLING = {**GREEDY, "do_sample": True}
ROWS = (3, 11, 7, 9)


@pytest.fixture
def runs_statically(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Returns a function that says whether the last `generate` took the static path."""
    import citer_hf.model.generation as module

    calls: list[int] = []
    original = module.decode_static

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "decode_static", noted)

    def happened() -> bool:
        result = bool(calls)
        calls.clear()
        return result

    return happened


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Returns a function that gives the warnings about static caches, as a process sees them that has just begun."""
    transformers_logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if "static" in record.getMessage()]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_rows_are_those_of_the_naive_loop(architecture, runs_statically):
    name = {"gemma3_text": "gemma3"}.get(architecture, architecture)
    model, rows = pair_of(name, name), random_prompts(ROWS)
    for waiting in (None, 1):
        output = model.generate(
            **left_padded(rows),
            **GREEDY,
            **STATIC,
            eos_token_id=[2, 9],
            return_dict_in_generate=True,
            waiting_rows=waiting,
        )
        assert runs_statically()
        assert_rows_are_those_of_the_naive_loop(model, output, rows, 20, (2, 9))


@pytest.mark.parametrize(("slm", "llm"), [("gemma2", "mistral_sliding"), ("gpt2", "llama")])
def test_different_models_are_a_pair(slm, llm, runs_statically):
    model, rows = pair_of(slm, llm), random_prompts(ROWS)
    output = model.generate(**left_padded(rows), **GREEDY, **STATIC, eos_token_id=None, return_dict_in_generate=True)
    assert runs_statically()
    assert_rows_are_those_of_the_naive_loop(model, output, rows, 20, ())


@pytest.mark.parametrize("length", [1, 9, 40])
def test_one_row_is_that_of_the_naive_loop(pair, length, runs_statically):
    row = random_prompts((length,))[0]
    output = pair.generate(torch.tensor([row]), **GREEDY, **STATIC, eos_token_id=None, return_dict_in_generate=True)
    assert runs_statically()
    text, to_llm, scores, _ = naive_generate(pair, row, 20, 0.5, eos=())
    assert output.sequences[0, length:].tolist() == text
    assert output.past_key_values.routing.to_llm[0].tolist() == to_llm
    torch.testing.assert_close(output.past_key_values.routing.scores[0], torch.tensor(scores), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lengths", [(9,), ROWS])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLING])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_the_ends_of_the_threshold_are_the_two_models(pair, lengths, mode, threshold, runs_statically):
    batch = left_padded(random_prompts(lengths))
    set_seed(0)
    ours = pair.generate(**batch, **mode, **STATIC, router_threshold=threshold)
    set_seed(0)
    assert runs_statically()
    assert torch.equal(ours, (pair.slm if threshold == 0 else pair.llm).generate(**batch, **mode))


def test_a_threshold_per_row_follows_its_row(pair, runs_statically):
    batch, thresholds = left_padded(random_prompts()), torch.tensor([0.0, 0.5, 2.0])
    plain = pair.generate(**batch, **GREEDY, router_threshold=thresholds)
    assert torch.equal(plain, pair.generate(**batch, **GREEDY, **STATIC, router_threshold=thresholds))
    assert runs_statically()


MODEL = make_pair("llama", "qwen2", hidden_size=48)
token = st.integers(3, VOCAB - 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.1, 0.3, 0.6, 0.9]),
    eos=st.lists(token, max_size=20, unique=True),
    waiting=st.sampled_from([None, 1, 2, 99]),
)
def test_any_policy_gives_every_row_its_own_text(rows, seed, threshold, eos, waiting):
    MODEL.router.seed, MODEL.config.router_threshold = seed, threshold
    output = MODEL.generate(
        **left_padded(rows),
        **{**GREEDY, "max_new_tokens": 9},
        **STATIC,
        eos_token_id=eos or None,
        waiting_rows=waiting,
        return_dict_in_generate=True,
    )
    assert_rows_are_those_of_the_naive_loop(MODEL, output, rows, 9, eos)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("lengths", [(9,), ROWS])
def test_a_processor_acts_as_with_a_growing_cache(pair, name, lengths, runs_statically):
    batch, options = left_padded(random_prompts(lengths)), {**SAMPLING, **PROCESSORS[name], "eos_token_id": [2, 9]}
    set_seed(0)
    plain = pair.generate(**batch, **options, waiting_rows=1)
    after = torch.rand(1)
    set_seed(0)
    assert torch.equal(plain, pair.generate(**batch, **options, **STATIC))
    assert torch.equal(after, torch.rand(1)), "what is drawn next is the same, too"
    # Guidance runs the model a second time, for all rows at once.
    assert runs_statically() == (name != "guidance" or len(lengths) == 1)


@pytest.mark.parametrize("lengths", [(9,), ROWS])
@pytest.mark.parametrize("eos", [None, [2, 9, 14, 21]])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"num_return_sequences": 2, "do_sample": True}])
def test_everything_that_is_returned_means_the_same(pair, lengths, eos, options, runs_statically):
    batch = left_padded(random_prompts(lengths))
    everything = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    wanted = {**GREEDY, "max_new_tokens": 40, "eos_token_id": eos, **everything, **options}
    set_seed(1)
    plain = pair.generate(**batch, **wanted, waiting_rows=1)
    set_seed(1)
    static = pair.generate(**batch, **wanted, **STATIC)
    assert runs_statically()
    same_output(static, plain)


# ---- one row: streamers, processors and criteria of one's own -------------------------------------------------------


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


def test_a_streamer_gets_every_token_and_who_wrote_it(pair, runs_statically):
    cache = CiterCache(pair.config, max_cache_len=64)
    shown = Shown(cache)
    output = pair.generate(**single(), **GREEDY, streamer=shown, past_key_values=cache, return_dict_in_generate=True)
    assert runs_statically() and shown.ended
    assert shown.tokens == output.sequences[0, 9:].tolist()
    assert shown.by_llm == cache.routing.to_llm[0].tolist() and len(cache.routing) == 20
    plain = pair.generate(**single(), **GREEDY, return_dict_in_generate=True)
    assert torch.equal(plain.past_key_values.routing.to_llm, cache.routing.to_llm)


def test_a_processor_of_ones_own_sees_each_token_of_one_row_once(pair, runs_statically):
    seen: list[torch.Tensor] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        assert input_ids.shape[1] == 8 + len(seen)
        return scores

    mine = {"logits_processor": LogitsProcessorList([note]), "return_dict_in_generate": True, "output_logits": True}
    output = pair.generate(**single(), **GREEDY, **STATIC, **mine)
    assert runs_statically()
    assert all(torch.equal(ours, step) for ours, step in zip(seen, output.logits, strict=True))


def test_a_criterion_of_ones_own_ends_one_row(pair, runs_statically):
    def at_fifteen(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert len(scores) == input_ids.shape[1] - 9
        return torch.tensor([input_ids.shape[1] >= 15])

    options = {"output_scores": True, "return_dict_in_generate": True}
    criteria = StoppingCriteriaList([at_fifteen])
    output = pair.generate(**single(), **GREEDY, **STATIC, stopping_criteria=criteria, **options)
    assert runs_statically() and output.sequences.shape[1] == 15


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("lengths", [(9,), ROWS])
def test_a_chat_goes_on_statically_and_the_cache_grows(name, lengths, runs_statically):
    model = pair_of(name, name)
    batch = left_padded(random_prompts(lengths))
    wanted = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    cache = None
    for turn in range(3):
        options = STATIC if cache is None else {"past_key_values": cache}
        output = model.generate(**batch, **wanted, **options)
        assert runs_statically(), "a static cache stays one"
        fresh = model.generate(**batch, **wanted)
        assert torch.equal(output.sequences, fresh.sequences)
        assert torch.equal(output.past_key_values.routing.to_llm, fresh.past_key_values.routing.to_llm)
        cache, length = output.past_key_values, output.sequences.shape[1]
        assert cache.get_max_length() == length - 1, f"turn {turn}: room for what was asked for, as in transformers"
        assert cache.get_seq_length() == cache.slm.get_seq_length() == length - 1
        assert cache.llm.get_seq_length() == cache.llm_length <= length - 1
        batch = {
            "input_ids": torch.cat([output.sequences, torch.full((len(lengths), 2), 7)], dim=1),
            "attention_mask": torch.cat(
                [batch["attention_mask"], torch.ones(len(lengths), 22, dtype=torch.long)], dim=1
            ),
        }


def test_the_length_may_be_given(pair):
    for options in ({**STATIC, "max_cache_len": 200}, {"past_key_values": CiterCache(pair.config, max_cache_len=200)}):
        output = pair.generate(**single(), **GREEDY, **options, return_dict_in_generate=True)
        assert output.past_key_values.get_max_length() == 200
    assert CiterCache(pair.config).get_max_length() == -1


def test_a_copied_prefix_serves_many_prompts(pair, runs_statically):
    prefix = random_prompts((7,))[0]
    cache = CiterCache(pair.config, max_cache_len=32)
    with torch.no_grad():
        pair(input_ids=torch.tensor([prefix]), past_key_values=cache)
    for seed in (1, 2):
        text = torch.tensor([prefix + random_prompts((4,), seed)[0]])
        ours = pair.generate(input_ids=text, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert runs_statically()
        assert torch.equal(ours, pair.generate(input_ids=text, **GREEDY))
    assert cache.get_seq_length() == 7


def test_the_generation_config_may_ask_for_it(runs_statically):
    model = make_pair()
    plain = model.generate(**single(), **GREEDY)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(plain, model.generate(**single(), **GREEDY))
    assert runs_statically()


def test_the_prompt_may_be_read_in_chunks(pair, runs_statically):
    batch = left_padded(random_prompts())
    assert torch.equal(
        pair.generate(**batch, **GREEDY), pair.generate(**batch, **GREEDY, **STATIC, prefill_chunk_size=4)
    )
    assert runs_statically()


def test_an_error_in_the_middle_leaves_the_users_cache_as_it_was_after_the_prompts(pair, monkeypatch):
    batch = left_padded(random_prompts(ROWS))
    cache = CiterCache(pair.config, max_cache_len=64)
    calls = []

    def broken(self: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("the lights went out")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with monkeypatch.context() as patch:
        patch.setattr(MaxTimeCriteria, "__call__", broken)
        criteria = StoppingCriteriaList([MaxTimeCriteria(1000.0)])
        with pytest.raises(RuntimeError, match="the lights"):
            pair.generate(**batch, **GREEDY, eos_token_id=2, past_key_values=cache, stopping_criteria=criteria)
    assert cache.get_seq_length() == cache.slm.get_seq_length() == 11
    text = torch.cat([batch["input_ids"], torch.full((4, 1), 5)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    again = pair.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY, eos_token_id=None)
    assert torch.equal(again, pair.generate(text, attention_mask=mask, **GREEDY, eos_token_id=None))


# ---- passes ---------------------------------------------------------------------------------------------------------


class Every(nn.Module):
    """Sends every so manieth token to the LLM, by the call."""

    def __init__(self, period: int):
        super().__init__()
        self.period, self.calls = period, 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full(hidden.shape[:-1], float(self.calls % self.period != 0))


@pytest.mark.parametrize("period", [1, 2, 3, 7, 40, 70])
def test_catch_ups_have_a_few_lengths(period, count_calls):
    model = make_pair(router=Every(period), hidden_size=48)
    plain = model.generate(**single(), **{**GREEDY, "max_new_tokens": 160}, eos_token_id=None)
    model.router.calls = 0
    lengths, steps = count_calls(model.llm), count_calls(model.slm)
    static = model.generate(**single(), **{**GREEDY, "max_new_tokens": 160}, **STATIC, eos_token_id=None)
    assert torch.equal(static, plain)
    # The first call reads the prompt. Longer ones than the longest length are read as they are.
    assert set(lengths[1:]) <= {*BUCKETS, 70} and set(steps[1:]) == {1}


@pytest.mark.parametrize("lead", [1, 2, 16, 17])
def test_padding_of_a_row_that_ends_early_sees_nothing_that_nobody_has_read(lead):
    """The lead of the longest row decides how the padding is divided into passes."""
    model, batch = pair_of("llama", "qwen2", "confidence"), left_padded(random_prompts((5, 9)))
    wanted = {**GREEDY, "max_new_tokens": 24, "eos_token_id": None, "router_threshold": 0.3}
    free = model.generate(**batch, **wanted)[:, 9:].tolist()
    end = next(place for place, token in enumerate(free[0]) if token not in free[0][:place] + free[1])
    wanted |= {"max_new_tokens": end + 1 + lead, "eos_token_id": free[0][end]}
    growing, static = (
        model.generate(**batch, **wanted, **options, output_logits=True, return_dict_in_generate=True)
        for options in ({}, STATIC)
    )
    torch.testing.assert_close(static.logits, growing.logits, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(static.past_key_values.slm.layers, growing.past_key_values.slm.layers, strict=True):
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-4)


class Constant(nn.Module):
    """A router that is always as sure."""

    def __init__(self, score: float, dtype: torch.dtype):
        super().__init__()
        self.score, self.dtype = score, dtype

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.full(hidden.shape[:-1], self.score, dtype=self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.7, torch.full((4,), 0.7), torch.full((4,), 0.7, dtype=torch.float64)])
def test_a_score_that_just_reaches_the_threshold_is_the_slms(dtype, threshold):
    model, batch = make_pair(router=Constant(0.7, dtype), hidden_size=48), left_padded(random_prompts(ROWS))
    for options in ({}, {"waiting_rows": 1}, STATIC):
        wanted = {**GREEDY, **options, "eos_token_id": None, "return_dict_in_generate": True}
        output = model.generate(**batch, **wanted, router_threshold=threshold)
        assert output.past_key_values.routing.llm_share == 0


@pytest.mark.parametrize("length", [0, -1, "x", 2.5])
def test_room_that_is_no_number_of_tokens_is_refused(pair, length):
    with pytest.raises(ValueError, match="max_cache_len: expected a number of tokens from 1"):
        pair.generate(**single(), **GREEDY, **STATIC, max_cache_len=length)


@pytest.mark.parametrize("mode", [GREEDY, SAMPLING, {**GREEDY, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("lengths", [(9,), ROWS])
def test_the_host_waits_once_per_pass(pair, mode, lengths, count_calls, monkeypatch):
    steps, calls, waits = count_calls(pair.slm), count_calls(pair.llm), []

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            waits.append(1)
            return original(*args, **kwargs)

        return noted

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


# ---- what cannot be static ------------------------------------------------------------------------------------------


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
def test_what_cannot_be_static_grows_and_says_so_once(pair, options, reason, runs_statically, warned):
    batch = left_padded(random_prompts(ROWS))
    plain = pair.generate(**batch, **GREEDY, **options)
    for _ in range(2):
        static = pair.generate(**batch, **GREEDY, **STATIC, **options)
    assert not runs_statically()
    assert len(warned()) == 1 and reason in warned()[0]
    assert torch.equal(*(one if isinstance(one, torch.Tensor) else one.sequences for one in (plain, static)))


@pytest.mark.parametrize("name", ["bloom", "qwen3_next", "lfm2"])
def test_architectures_that_were_not_tried_grow(name, runs_statically, warned):
    model, batch = pair_of("llama", name), left_padded(random_prompts())
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY, **STATIC))
    assert not runs_statically() and len(warned()) == 1 and model.llm.config.model_type in warned()[0]


def test_a_model_that_transformers_does_not_compile_grows(monkeypatch, runs_statically, warned):
    model = make_pair("llama", "qwen2")
    monkeypatch.setattr(type(model.llm), "_can_compile_fullgraph", False)
    model.generate(**single(), **GREEDY, **STATIC)
    assert not runs_statically() and "qwen2" in warned()[0]


def test_assisted_generation_is_refused_as_in_transformers(pair):
    with pytest.raises(ValueError, match="assisted generate is not supported with Static cache"):
        pair.generate(**single(), **GREEDY, **STATIC, assistant_model=pair.slm)


def test_a_cache_and_a_kind_of_cache_are_refused_as_in_transformers(pair):
    with pytest.raises(ValueError, match="cache_implementation"):
        pair.generate(**single(), **GREEDY, **STATIC, past_key_values=CiterCache(pair.config))
