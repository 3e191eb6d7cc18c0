"""Decoding of many prompts equals decoding each alone, naively, whatever the generation settings are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from citer_hf.bench.counting import count_passes
from citer_hf.evaluation.decoding import decode, with_router
from citer_hf.model.routers import ConfidenceRouter, RandomRouter
from tests.conftest import make_pair, random_prompts
from tests.reference import naive_generate

PROMPTS = random_prompts((5, 9, 12, 3, 7))


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_texts_are_those_that_each_prompt_gets_alone(pair: Any, batch_tokens: int):
    decoded = decode(pair, PROMPTS, router_threshold=0.5, max_new_tokens=8, batch_tokens=batch_tokens)
    for row, prompt in enumerate(PROMPTS):
        tokens, to_llm, scores, _ = naive_generate(pair, prompt, 8, 0.5)
        assert decoded.tokens[row] == tokens
        assert decoded.to_llm[row] == to_llm
        assert decoded.scores[row] == pytest.approx(scores, abs=1e-4)
    assert decoded.seconds > 0


@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize("batch_tokens", [60, 10_000])
def test_each_prompt_may_have_its_own_threshold(pair: Any, kind: Any, batch_tokens: int):
    thresholds = [0.0, 0.3, 0.5, 0.8, 2.0]
    options: Any = {"router_threshold": kind(thresholds), "max_new_tokens": 8, "batch_tokens": batch_tokens}
    decoded = decode(pair, PROMPTS, **options)
    for row, (prompt, threshold) in enumerate(zip(PROMPTS, thresholds, strict=True)):
        tokens, to_llm, _, _ = naive_generate(pair, prompt, 8, threshold)
        assert (decoded.tokens[row], decoded.to_llm[row]) == (tokens, to_llm)


@pytest.mark.parametrize(("alone", "threshold"), [("slm", 0.0), ("llm", 2.0)])
def test_a_model_alone_does_not_pay_for_the_other(pair: Any, alone: Any, threshold: float):
    with count_passes(pair) as passes:
        decoded = decode(pair, PROMPTS, alone=alone, max_new_tokens=8)
    assert not (passes.llm if alone == "slm" else passes.slm)
    assert decoded.llm_calls == len(passes.llm)
    for row, prompt in enumerate(PROMPTS):
        assert decoded.tokens[row] == naive_generate(pair, prompt, 8, threshold)[0]
        assert set(decoded.to_llm[row]) == {alone == "llm"}


@pytest.mark.parametrize("alone", [None, "slm", "llm"])
def test_generation_settings_of_the_models_take_no_part(alone: Any):
    plain, other = make_pair(), make_pair()
    settings = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "suppress_tokens": [*range(3, 40)]}
    for model in (other, other.slm, other.llm):
        model.generation_config.update(**settings, max_length=7)
    before = copy.deepcopy(other.generation_config)
    options: Any = {"router_threshold": 0.5, "max_new_tokens": 8, "alone": alone}
    assert decode(other, PROMPTS, **options).tokens == decode(plain, PROMPTS, **options).tokens
    assert other.generation_config == before


def test_the_number_of_finished_texts_is_told(pair: Any):
    told: list[int] = []
    decode(pair, PROMPTS, router_threshold=0.5, max_new_tokens=4, batch_tokens=40, progress=told.append)
    assert sum(told) == len(PROMPTS)
    assert len(told) > 1


def test_texts_stop_where_the_context_is_full():
    pair = make_pair("gpt2", "gpt2", max_position_embeddings=14)
    decoded = decode(pair, PROMPTS, router_threshold=0.5, max_new_tokens=8)
    for row, prompt in enumerate(PROMPTS):
        assert decoded.tokens[row] == naive_generate(pair, prompt, min(8, 14 - len(prompt)), 0.5)[0]


def test_a_prompt_that_fills_the_context_is_named():
    pair = make_pair("gpt2", "gpt2", max_position_embeddings=9)
    with pytest.raises(ValueError, match=r"^prompt number 1 has 9 tokens, .* up to 9 tokens"):
        decode(pair, PROMPTS, max_new_tokens=8)


def test_an_empty_prompt_is_named(pair: Any):
    with pytest.raises(ValueError, match=r"^prompt number 1 is empty"):
        decode(pair, [[5], []], max_new_tokens=8)


def test_as_many_thresholds_as_prompts_are_expected(pair: Any):
    with pytest.raises(ValueError, match=r"^router_threshold: expected 5, one per prompt, got 1"):
        decode(pair, PROMPTS, router_threshold=[0.5], max_new_tokens=8)


def test_another_router_leaves_the_pair_as_it_is(pair: Any):
    own = pair.router
    router = ConfidenceRouter(32)
    other = with_router(pair, router)
    assert pair.router is own and isinstance(own, RandomRouter)
    assert other.router is router and other.slm is pair.slm
    decoded = decode(other, PROMPTS, router_threshold=0.7, max_new_tokens=8)
    for row, prompt in enumerate(PROMPTS):
        tokens, to_llm, _, _ = naive_generate(other, prompt, 8, 0.7)
        assert (decoded.tokens[row], decoded.to_llm[row]) == (tokens, to_llm)


def test_an_interrupt_passes_through(pair: Any):
    def interrupt(texts: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(pair, PROMPTS, router_threshold=0.5, max_new_tokens=2, progress=interrupt)
    assert torch.is_grad_enabled()


def test_a_router_in_training_decides_as_in_evaluation_and_goes_on_training():
    torch.manual_seed(0)
    pair = make_pair(router={"type": "mlp", "dropout": 0.5})
    options: Any = {"router_threshold": 0.5, "max_new_tokens": 8}
    expected = decode(pair, PROMPTS, **options)
    pair.train()
    decoded = decode(pair, PROMPTS, **options)
    assert decoded.scores == expected.scores
    assert pair.training and pair.router.training
