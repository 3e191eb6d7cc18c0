"""`cache_implementation="static"` gives what a growing cache gives, in every mode that can use it."""

import copy
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer

from citer_hf import CiterCache
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.model.test_modes import single

STATIC = {"cache_implementation": "static"}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
SAMPLING = {**GREEDY, "do_sample": True}
ROWS = (3, 11, 7, 9)


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


@pytest.mark.parametrize("length", [None, 64])
def test_a_streamer_gets_every_token_and_who_wrote_it(pair, length):
    cache = CiterCache(pair.config, max_cache_len=length)
    shown = Shown(cache)
    output = pair.generate(**single(), **GREEDY, streamer=shown, past_key_values=cache, return_dict_in_generate=True)
    assert shown.ended and shown.tokens == output.sequences[0, 9:].tolist()
    assert shown.by_llm == cache.routing.to_llm[0].tolist() and len(cache.routing) == 20
    plain = pair.generate(**single(), **GREEDY, return_dict_in_generate=True)
    assert torch.equal(plain.past_key_values.routing.to_llm, cache.routing.to_llm)


@pytest.mark.parametrize("options", [{}, STATIC])
def test_a_processor_and_a_criterion_of_ones_own_see_each_token_of_one_row_once(pair, options, warned):
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
    assert not warned() and output.sequences.shape[1] == 15 and len(seen) == len(output.logits) == 6
    assert all(torch.equal(ours, step) for ours, step in zip(seen, output.logits, strict=True))


@pytest.mark.parametrize("options", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.parametrize(
    ("name", "lengths", "threshold"), [("llama", (9,), 0.0), ("llama", (9,), 0.5), ("gemma3", ROWS, 2.0)]
)
def test_a_chat_goes_on_with_the_returned_cache(name, lengths, threshold, options, count_calls):
    model, cache = make_pair(name, name, threshold=threshold), None
    batch, steps = left_padded(random_prompts(lengths)), count_calls(model.slm)
    wanted = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    for turn in range(2):
        fresh = model.generate(**batch, **wanted)
        steps.clear()
        given = options if cache is None else {"past_key_values": cache}
        output = model.generate(**batch, **wanted, **given)
        assert not turn or steps[0] == 3, "the last token, which no model has read yet, and the two new ones"
        assert torch.equal(output.sequences, fresh.sequences)
        assert torch.equal(output.past_key_values.routing.to_llm, fresh.past_key_values.routing.to_llm)
        cache, length = output.past_key_values, output.sequences.shape[1]
        assert cache.get_max_length() == (length - 1 if options else -1), "capacity for what was asked for, no more"
        assert cache.get_seq_length() == cache.slm.get_seq_length() == length - 1
        assert cache.llm.get_seq_length() == cache.llm_length <= length - 1
        text = torch.cat([output.sequences, torch.full((len(lengths), 2), 7)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(lengths), 22, dtype=torch.long)], dim=1)
        batch = {"input_ids": text, "attention_mask": mask}


def test_the_length_may_be_given(pair):
    for options in ({**STATIC, "max_cache_len": 200}, {"past_key_values": CiterCache(pair.config, max_cache_len=200)}):
        output = pair.generate(**single(), **GREEDY, **options, return_dict_in_generate=True)
        assert output.past_key_values.get_max_length() == 200
    for length in (0, "x"):
        with pytest.raises(ValueError, match="max_cache_len: expected a number of tokens from 1"):
            pair.generate(**single(), **GREEDY, **STATIC, max_cache_len=length)


@pytest.mark.parametrize("length", [None, 32])
def test_a_copied_prefix_serves_many_prompts(pair, length):
    prefix = random_prompts((7,))[0]
    cache = CiterCache(pair.config, max_cache_len=length)
    with torch.no_grad():
        pair(input_ids=torch.tensor([prefix]), past_key_values=cache)
    for seed in (1, 2):
        text = torch.tensor([prefix + random_prompts((4,), seed)[0]])
        ours = pair.generate(input_ids=text, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(ours, pair.generate(input_ids=text, **GREEDY))
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("period", [1, 70])
def test_catch_ups_of_any_length_give_the_same_text(period):
    model = make_pair(router=ScriptedRouter(torch.arange(period)[None] == period - 1), hidden_size=48)
    texts = []
    for options in ({}, STATIC):
        model.router.calls = 0
        texts.append(model.generate(**single(), **GREEDY | {"max_new_tokens": 160}, **options, eos_token_id=None))
    assert torch.equal(*texts)


def sees_all_rows(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    assert len(input_ids) == len(ROWS)
    return scores


def never(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(len(ROWS), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beams"),
        ({"logits_processor": LogitsProcessorList([sees_all_rows])}, "processor of your own"),
        ({"stopping_criteria": StoppingCriteriaList([never])}, "criterion of your own"),
        ({"output_hidden_states": True}, "hidden states"),
    ],
)
def test_what_cannot_be_static_grows_and_says_so_once(pair, options, reason, warned):
    batch, wanted = left_padded(random_prompts(ROWS)), {**GREEDY, **options, "return_dict_in_generate": True}
    plain = pair.generate(**batch, **wanted)
    for _ in range(2):
        static = pair.generate(**batch, **wanted, **STATIC)
    assert len(warned()) == 1 and reason in warned()[0]
    assert torch.equal(plain.sequences, static.sequences)


def test_what_transformers_refuses_with_a_static_cache_is_refused(pair):
    with pytest.raises(ValueError, match="cache_implementation"):
        pair.generate(**single(), **GREEDY, **STATIC, past_key_values=CiterCache(pair.config))


def test_a_model_that_transformers_does_not_compile_grows(monkeypatch, warned):
    model = make_pair("llama", "qwen2")
    monkeypatch.setattr(type(model.llm), "_can_compile_fullgraph", False)
    model.generate(**single(), **GREEDY, **STATIC)
    assert len(warned()) == 1 and "qwen2" in warned()[0]
