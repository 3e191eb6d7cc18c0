"""Sequences of a batch move at their own pace and get the texts that they get alone, in fewer calls of the LLM."""

import gc
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation import MaxTimeCriteria

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.model.generation import CiterGenerationMixin
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.families import VOCAB
from tests.reference import assert_sequences, naive_generate, naive_texts

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
ENDLESS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
LENGTHS = (3, 11, 7, 9)
MODEL = make_pair("llama", "qwen2", hidden_size=48)
token = st.integers(3, VOCAB - 1)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(token, min_size=1, max_size=9), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.1, 0.3, 0.6, 0.9]),
    eos=st.lists(token, max_size=20, unique=True),
    cache=st.sampled_from([None, "static"]),
    waiting=st.sampled_from([None, 1, 2, 99, lambda unfinished, llm_share, step_ratio: unfinished]),
)
def test_any_policy_and_cache_gives_every_sequence_its_own_text(rows, seed, threshold, eos, waiting, cache):
    MODEL.router.seed, MODEL.config.router_threshold = seed, threshold
    wanted = {**ENDLESS, "eos_token_id": eos or None, "waiting_rows": waiting, "cache_implementation": cache}
    output = MODEL.generate(**left_padded(rows), **wanted, max_new_tokens=9)
    assert_sequences(output, rows, naive_texts(MODEL, rows, 9, eos))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    row=st.lists(token, min_size=2, max_size=12),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.1]),
)
def test_any_cut_into_chunks_gives_the_same_logits(pair, row, cuts, threshold):
    text, cache, parts = torch.tensor([row]), CiterCache(pair.config), []
    with torch.no_grad():
        whole = pair(input_ids=text, use_cache=False, router_threshold=threshold).logits
        while (start := cache.get_seq_length()) < len(row):
            chunk = text[:, start : start + cuts[len(parts) % len(cuts)]]
            parts.append(pair(input_ids=chunk, past_key_values=cache, router_threshold=threshold).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


class Independent(nn.Module):
    """Sends each token of each row to the LLM with the same probability."""

    def __init__(self, share: float):
        super().__init__()
        self.share, self.generator = share, torch.Generator().manual_seed(0)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (torch.rand(hidden.shape[:-1], generator=self.generator) >= self.share).float()


def test_sequences_that_wait_for_each_other_cost_half_the_calls_of_lock_step(count_calls):
    model = make_pair(router=Independent(0.2), hidden_size=48)
    steps, calls = count_calls(model.slm), count_calls(model.llm)
    prompts, wanted = torch.tensor(random_prompts((6,) * 8)), {**GREEDY, "max_new_tokens": 120, "eos_token_id": None}
    model.generate(prompts, **wanted, waiting_rows=5)
    # Lock-step takes 1 - 0.8^8 = 0.83 calls for each position.
    assert len(calls) / 120 <= 0.45 and len(steps) / 120 <= 1.6


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("llm", ["mistral_sliding", "gemma3"])
def test_an_llm_with_windows_that_reads_late_misses_nothing(llm, cache):
    """A row that waits while the others write more than a window sees what lies before its own end."""
    model = make_pair("llama", llm)
    model.config.router_threshold, model.router.seed = 0.08, 1
    rows = random_prompts(LENGTHS, 1)
    wanted = {**ENDLESS, "max_new_tokens": 40, "waiting_rows": 99, "cache_implementation": cache}
    assert_sequences(model.generate(**left_padded(rows), **wanted), rows, naive_texts(model, rows, 40, ()))


def never(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"waiting_rows": 1},
        {"router_threshold": 0.0},
        {"router_threshold": 1.5},
        {"router_threshold": torch.tensor([0.0, 0.0, 2.0])},
        {"stopping_criteria": StoppingCriteriaList([never])},
        {"logits_processor": LogitsProcessorList([lambda input_ids, scores: scores])},
    ],
)
def test_what_looks_across_rows_or_never_mixes_keeps_rows_together(pair, options, loop_taken):
    pair.generate(**left_padded(random_prompts()), **GREEDY, **options)
    assert not loop_taken()


def test_a_threshold_per_row_moves_apart(pair, loop_taken):
    rows = random_prompts()
    thresholds = torch.tensor([0.0, 0.5, 2.0])
    settings = {**GREEDY, "eos_token_id": None}
    together = pair.generate(**left_padded(rows), **settings, router_threshold=thresholds, waiting_rows=1)
    loop_taken()
    assert torch.equal(together, pair.generate(**left_padded(rows), **settings, router_threshold=thresholds))
    assert loop_taken() == "rows"


SAMPLING = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 6, "bad_words_ids": [[5], [7, 8]]},
]


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_is_reproducible_and_does_not_depend_on_when_the_llm_is_called(pair, options, loop_taken):
    batch = left_padded(random_prompts(LENGTHS))
    sampling = {**GREEDY, "do_sample": True, "eos_token_id": [2, 9, 14], **options}
    drawn = []
    for waiting, cache in ((None, None), (2, None), (99, None), (3, "static")):
        set_seed(3)
        drawn.append(pair.generate(**batch, **sampling, waiting_rows=waiting, cache_implementation=cache))
        assert loop_taken()
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert not torch.equal(drawn[0], pair.generate(**batch, **sampling))


def test_what_a_sequence_draws_does_not_depend_on_its_neighbours(pair):
    rows = random_prompts((9, 9, 9, 9))
    sampling = {**GREEDY, "do_sample": True, "eos_token_id": None}
    texts = []
    for others in (rows[2:], rows[1:3]):
        set_seed(3)
        texts.append(pair.generate(torch.tensor([*rows[:2], *others]), **sampling)[:2])
    assert torch.equal(*texts)


def test_sampled_tokens_have_the_distribution_of_the_writing_model():
    model = make_pair(hidden_size=48)
    prompt = torch.tensor(random_prompts((6,)))
    set_seed(0)
    drawn = model.generate(
        prompt, do_sample=True, max_new_tokens=2, num_return_sequences=4000, eos_token_id=None, pad_token_id=0
    )[:, 6:]
    first = int(drawn[:, 0].mode().values)
    text = torch.cat([prompt, torch.tensor([[first]])], dim=1)
    with torch.no_grad():
        expected = model(input_ids=text, use_cache=False, logits_to_keep=1).logits[0, -1].softmax(-1)
    seconds = drawn[drawn[:, 0] == first, 1]
    seen = torch.bincount(seconds, minlength=VOCAB) / len(seconds)
    # Six standard errors.
    assert (seen - expected).abs().max() < 6 * (0.25 / len(seconds)) ** 0.5


@pytest.mark.parametrize("eos", [None, [2, 9, 14, 21]])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}])
def test_scores_logits_and_record_mean_what_they_mean_in_lock_step(pair, eos, options, loop_taken):
    batch = left_padded(random_prompts(LENGTHS))
    wanted = {**GREEDY, "max_new_tokens": 40, "eos_token_id": eos, "return_dict_in_generate": True, **options}
    outputs = []
    for way in ({"waiting_rows": 1}, {}, {"cache_implementation": "static"}):
        outputs.append(pair.generate(**batch, **wanted, **way, output_scores=True, output_logits=True))
    assert loop_taken() == "static"
    together, *others = outputs
    ours = together.cache.routing
    for other in others:
        theirs = other.cache.routing
        assert torch.equal(together.sequences, other.sequences)
        assert torch.equal(ours.to_llm, theirs.to_llm) and torch.equal(ours.unfinished, theirs.unfinished)
        # What follows the end of a sequence is nobody's.
        real = ours.unfinished
        torch.testing.assert_close(ours.scores[real], theirs.scores[real], atol=1e-4, rtol=1e-4)
        for one, two in ((together.logits, other.logits), (together.scores, other.scores)):
            stacked = [torch.stack(steps, dim=1)[real] for steps in (one, two)]
            torch.testing.assert_close(*stacked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("eos", [None, [2, 9, 14, 21]])
def test_the_returned_cache_goes_on_where_what_follows_an_end_is_masked(name, eos, cache, count_calls):
    model, batch = make_pair(name, name, threshold=0.4), left_padded(random_prompts(LENGTHS))
    wanted = {**GREEDY, "eos_token_id": eos, "return_dict_in_generate": True}
    first = model.generate(**batch, **wanted, cache_implementation=cache)
    text = torch.cat([first.sequences, torch.full((4, 2), 7)], dim=1)
    mask = torch.cat([batch["attention_mask"], first.cache.routing.unfinished.long(), torch.ones(4, 2).long()], dim=1)
    width = first.sequences.shape[1]
    assert first.cache.get_seq_length() == first.cache.slm.get_seq_length() == width - 1
    assert first.cache.llm.get_seq_length() == first.cache.llm_length <= width - 1
    steps = count_calls(model.slm)
    # Above 1, the LLM reads all that it has not read.
    options = {**GREEDY, "eos_token_id": None, "router_threshold": 2.0}
    second = model.generate(text, attention_mask=mask, past_key_values=first.cache, **options)
    assert steps[0] == 3, "what the cache holds is not read again"
    assert torch.equal(second, model.generate(text, attention_mask=mask, **options))


@pytest.mark.parametrize("way", [{}, {"waiting_rows": 1}, {"cache_implementation": "static"}])
def test_without_end_tokens_the_returned_cache_goes_on_under_a_mask_of_ones(pair, way):
    """What `test_generate_continue_from_past_key_values` of transformers asks for, with its end tokens."""
    batch = left_padded(random_prompts(LENGTHS))
    wanted = {"do_sample": False, "eos_token_id": -1, "pad_token_id": -1, "return_dict_in_generate": True, **way}
    whole = pair.generate(**batch, **wanted, max_new_tokens=20)
    first = pair.generate(**batch, **wanted, max_new_tokens=13)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 13, dtype=torch.long)], dim=1)
    wanted.pop("cache_implementation", None)
    second = pair.generate(
        first.sequences, attention_mask=mask, past_key_values=first.cache, **wanted, max_new_tokens=7
    )
    assert torch.equal(second.sequences, whole.sequences)
    assert torch.equal(second.cache.routing.to_llm, whole.cache.routing.to_llm[:, 13:])
    for ours, theirs in zip(second.cache.layers, whole.cache.layers, strict=True):
        for one, two in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            # Places of padding hold what nobody sees.
            torch.testing.assert_close(one[:, :, 11:], two[:, :, 11:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [None, 64])
def test_an_error_in_the_middle_leaves_the_users_cache_as_it_was_after_the_prompts(pair, length):
    batch = left_padded(random_prompts(LENGTHS))
    cache = CiterCache(pair.config, max_cache_len=length)
    criterion = MaxTimeCriteria(1000.0, initial_timestamp=time.time())
    calls = []

    def broken(self: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("the lights went out")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaxTimeCriteria, "__call__", broken)
        with pytest.raises(RuntimeError, match="the lights"):
            criteria = StoppingCriteriaList([criterion])
            pair.generate(**batch, **GREEDY, eos_token_id=2, past_key_values=cache, stopping_criteria=criteria)
    assert cache.get_seq_length() == cache.slm.get_seq_length() == 11
    assert cache.llm.get_seq_length() == cache.llm_length <= 11
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


def test_the_decoding_loop_is_ours_where_it_can_be(pair, monkeypatch):
    calls: list[int] = []
    prepare = CiterGenerationMixin.prepare_inputs_for_generation

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(CiterGenerationMixin, "prepare_inputs_for_generation", counted)
    pair.generate(torch.tensor(random_prompts((5,))), **GREEDY)
    assert len(calls) == 1, "transformers' loop prepares the inputs of every token anew"


@pytest.mark.parametrize("waiting", [0, True, "all", lambda unfinished, llm_share, step_ratio: None])
def test_a_number_of_waiting_rows_that_means_nothing_is_refused(pair, waiting):
    with pytest.raises(ValueError, match="waiting_rows: expected"):
        pair.generate(**left_padded(random_prompts()), **GREEDY, waiting_rows=waiting)


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_other_modes_take_the_keyword_and_move_together(pair, mode):
    prompt = torch.tensor(random_prompts((9,)))
    plain = pair.generate(prompt, **GREEDY, **mode)
    assert torch.equal(plain, pair.generate(prompt, **GREEDY, **mode, waiting_rows=3))


@pytest.mark.parametrize(("rows", "cache"), [(1, "dynamic"), (3, "dynamic"), (3, "static")])
def test_no_keys_and_values_are_left_to_the_garbage_collector(pair: Any, rows: int, cache: str) -> None:
    batch = left_padded(random_prompts()[:rows])
    gc.collect()
    gc.disable()
    try:
        pair.generate(**batch, max_new_tokens=6, do_sample=False, router_threshold=0.5, cache_implementation=cache)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        # Compilers of earlier tests leave tensors of their own kind, which hold nothing.
        left = [one for one in gc.garbage if type(one) is torch.Tensor]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


# ---- limits and ends ----


@pytest.mark.parametrize("waiting", [1, None])
@pytest.mark.parametrize("limit", [{"max_length": 11 + 17}, {"max_new_tokens": 1}])
def test_every_sequence_gets_exactly_as_many_tokens_as_it_may(pair, limit, waiting):
    rows = random_prompts(LENGTHS)
    output = pair.generate(**left_padded(rows), **limit, **ENDLESS, waiting_rows=waiting)
    count = limit.get("max_new_tokens", 17)
    # `max_length` counts the padding, in transformers too.
    assert output.sequences.shape == (4, 11 + count)
    assert_sequences(output, rows, naive_texts(pair, rows, count, ()))


@pytest.mark.parametrize(("lengths", "waiting", "eos"), [((6,), 1, None), (LENGTHS, 1, [2]), (LENGTHS, 3, None)])
def test_when_the_time_is_up_every_row_stops_soon(pair, lengths, waiting, eos, count_calls, monkeypatch):
    passes = count_calls(pair.slm), count_calls(pair.llm)
    # Each forward pass takes a second on the clock that `max_time` reads.
    clock = SimpleNamespace(time=lambda: float(sum(map(len, passes))))
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", clock)
    rows = random_prompts(lengths)
    wanted = {**ENDLESS, "eos_token_id": eos, "waiting_rows": waiting}
    full = pair.generate(**left_padded(rows), **wanted, max_new_tokens=100)
    began = clock.time()
    output = pair.generate(**left_padded(rows), **wanted, max_new_tokens=100, max_time=40.0)
    # Of every row the token that it is at, by one pass of each model; then one over what ended rows have not read.
    assert 40 < clock.time() - began <= 40 + 4
    width = max(lengths)
    unfinished = output.past_key_values.routing.unfinished
    for row in range(len(rows)):
        length = int(unfinished[row].sum())
        assert 0 < length < 100
        assert torch.equal(output.sequences[row, : width + length], full.sequences[row, : width + length])
        assert not output.sequences[row, width + length :].any()


NEVER_SLM = torch.tensor([[1]])


class StopsRows(StoppingCriteria):
    """Ends chosen rows after so many tokens."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


def generate_ten(model, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**left_padded(random_prompts()), **options)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_finished_rows_never_count(pad_is_eos):
    model = make_pair(hidden_size=48)
    texts = [naive_generate(model, row, 10, 2.0, eos=())[0] for row in random_prompts()]
    # They end the rows after 1, 4 and 10 tokens or so.
    eos = [texts[0][0], texts[1][3]]
    output = generate_ten(model, router_threshold=2.0, eos_token_id=eos, pad_token_id=eos[0] if pad_is_eos else 0)
    routing = output.past_key_values.routing
    for row, text in enumerate(texts):
        length = next((step + 1 for step, one in enumerate(text) if one in eos), 10)
        assert routing.unfinished[row].sum() == length and routing.unfinished[row, :length].all()
    assert torch.equal(routing.to_llm, routing.unfinished)
    assert routing.llm_share == 1.0


class FirstRow(nn.Module):
    """Sends every token of the first row to the LLM."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (torch.arange(len(hidden)) > 0)[:, None].float().expand(hidden.shape[:2])


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_a_custom_criterion_stops_never_count_and_never_call_the_llm(count_calls, use_cache):
    model = make_pair(router=FirstRow(), hidden_size=48)
    calls = count_calls(model.llm)
    criteria = StoppingCriteriaList([StopsRows([15, 16, 99])])
    output = generate_ten(model, eos_token_id=None, stopping_criteria=criteria, use_cache=use_cache)
    assert len(calls) == 3, "the first row, the only one that needs the LLM, has three tokens"
    if use_cache:
        assert output.past_key_values.routing.unfinished.sum(1).tolist() == [3, 4, 10]


def test_finished_beams_never_call_the_llm(count_calls):
    model = make_pair(router=ScriptedRouter(NEVER_SLM), hidden_size=48)
    prompts = left_padded([random_prompts((9,))[0], random_prompts((9,), seed=8)[0]])
    ends = model.generate(**prompts, do_sample=False, max_new_tokens=3)[0, 9:].tolist()
    rows: list[int] = []
    model.register_forward_hook(lambda _, args, output: rows.append(int(output.routed_to_llm.any(1).sum())))
    model.generate(**prompts, max_new_tokens=12, num_beams=2, eos_token_id=ends, early_stopping=True, do_sample=False)
    assert rows[0] == 4
    assert min(rows) < 4, "beams of an input whose result is final need no LLM"


def test_a_forward_for_finished_rows_alone_skips_the_llm(pair, count_calls):
    calls = count_calls(pair.llm)
    text = torch.tensor(random_prompts((5, 5)))
    with torch.no_grad():
        output = pair(input_ids=text, router_threshold=2.0, finished_rows=torch.tensor([True, True]))
    assert calls == [] and not output.routed_to_llm.any()
