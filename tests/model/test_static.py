"""`cache_implementation="static"` gives what a growing cache gives, in every mode that can use it."""

import copy
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from citer_hf import CiterCache
from tests.conftest import left_padded, random_prompts
from tests.model.test_modes import single

STATIC = {"cache_implementation": "static"}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
SAMPLING = {**GREEDY, "do_sample": True}
ROWS = (3, 11, 7, 9)


def test_a_processor_of_ones_own_sees_prefixes_and_a_criterion_each_settled_token_once(pair, warned):
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    lengths: list[int] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tuple(input_ids[0].tolist()), []).append(scores[0].clone())
        return scores

    def at_fifteen(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert len(scores) == input_ids.shape[1] - 9
        lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= 15])

    mine = {"logits_processor": LogitsProcessorList([note]), "stopping_criteria": StoppingCriteriaList([at_fifteen])}
    wanted = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    output = pair.generate(**single(), **wanted, **mine, **STATIC)
    assert not warned() and lengths == list(range(10, 16)) and len(output.logits) == 6
    for step, logits in enumerate(output.logits):
        given = seen[tuple(output.sequences[0, : 9 + step].tolist())]
        assert any(torch.equal(one, logits[0]) for one in given), "the logits of the model that decided"


def test_the_length_is_what_was_asked_for_and_may_be_given(pair):
    output = pair.generate(**single(), **GREEDY, **STATIC, eos_token_id=None, return_dict_in_generate=True)
    assert output.past_key_values.get_max_length() == output.past_key_values.get_seq_length() == 9 + 20 - 1
    for options in ({**STATIC, "max_cache_len": 200}, {"past_key_values": CiterCache(pair.config, max_cache_len=200)}):
        output = pair.generate(**single(), **GREEDY, **options, return_dict_in_generate=True)
        assert output.past_key_values.get_max_length() == 200


@pytest.mark.parametrize("length", [None, 32])
def test_a_copied_prefix_serves_many_prompts(pair, length):
    prefix = random_prompts((7,))[0]
    cache = CiterCache(pair.config, max_cache_len=length)
    with torch.no_grad():
        pair(input_ids=torch.tensor([prefix]), past_key_values=cache)
    for seed in (1, 2):
        text = torch.tensor([prefix + random_prompts((4,), seed)[0]])
        wanted = {"input_ids": text, **GREEDY, "return_dict_in_generate": True}
        ours, fresh = pair.generate(**wanted, past_key_values=copy.deepcopy(cache)), pair.generate(**wanted)
        assert torch.equal(ours.sequences, fresh.sequences)
        assert torch.equal(ours.past_key_values.routing.to_llm, fresh.past_key_values.routing.to_llm)
    assert cache.get_seq_length() == 7


def sees_all_rows(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    assert len(input_ids) == len(ROWS)
    return scores


def never(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(len(ROWS), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beams"),
        ({"logits_processor": LogitsProcessorList([sees_all_rows])}, "a processor of your own"),
        ({"stopping_criteria": StoppingCriteriaList([never])}, "a stopping criterion of your own"),
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
