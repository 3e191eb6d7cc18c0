"""A row that has finished never calls the LLM and never counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.reference import naive_generate

NEVER_SLM = torch.tensor([[1]])


class StopsRows(StoppingCriteria):
    """Ends chosen rows after so many tokens."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


def generate(model, **options):
    return model.generate(
        **left_padded(random_prompts()),
        do_sample=False,
        max_new_tokens=10,
        return_dict_in_generate=True,
        **options,
    )


def end_tokens(model) -> list[int]:
    """An end token for each of three rows, which ends them after 1, 4 and 10 tokens or so."""
    texts = [naive_generate(model, row, 10, 2.0, eos=())[0] for row in random_prompts()]
    return [texts[0][0], texts[1][3]]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_finished_rows_never_count(pad_is_eos):
    model = make_pair(hidden_size=48)
    eos = end_tokens(model)
    output = generate(model, router_threshold=2.0, eos_token_id=eos, pad_token_id=eos[0] if pad_is_eos else 0)
    text, routing = output.sequences[:, 12:], output.past_key_values.routing
    for row in range(3):
        ends = [step for step in range(text.shape[1]) if int(text[row, step]) in eos]
        length = ends[0] + 1 if ends else text.shape[1]
        assert routing.unfinished[row].tolist() == [step < length for step in range(text.shape[1])]
    assert torch.equal(routing.to_llm, routing.unfinished)
    assert routing.llm_share == 1.0


class RowRouter(ScriptedRouter):
    """Sends every token of chosen rows to the LLM."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (~self.script[0])[:, None].float().expand(hidden.shape[:2])


def test_finished_rows_never_call_the_llm(count_calls):
    model = make_pair(router=RowRouter(torch.tensor([[1, 0, 0]])), hidden_size=48)
    calls = count_calls(model.llm)
    generate(model, eos_token_id=None, stopping_criteria=StoppingCriteriaList([StopsRows([15, 99, 99])]))
    assert len(calls) == 3, "the first row, the only one that needs the LLM, has three tokens"


def test_finished_rows_never_call_the_llm_without_a_cache(count_calls):
    model = make_pair(router=RowRouter(torch.tensor([[1, 0, 0]])), hidden_size=48)
    calls = count_calls(model.llm)
    criteria = StoppingCriteriaList([StopsRows([15, 99, 99])])
    generate(model, eos_token_id=None, stopping_criteria=criteria, use_cache=False)
    assert len(calls) == 3


def test_rows_that_a_custom_criterion_stops_never_count():
    model = make_pair(router=ScriptedRouter(NEVER_SLM))
    output = generate(model, eos_token_id=None, stopping_criteria=StoppingCriteriaList([StopsRows([13, 16, 99])]))
    assert output.past_key_values.routing.unfinished.sum(1).tolist() == [1, 4, 10]


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
