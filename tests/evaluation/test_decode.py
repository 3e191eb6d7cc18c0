"""Decoding and scoring of many prompts equals decoding each alone, naively, whatever the generation settings are."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from citer_hf.evaluation.decode import decode, encode_prompts, score_outputs, spread_thresholds, with_router
from citer_hf.model.routers import ConfidenceRouter, LinearRouter, RandomRouter
from citer_hf.model.sequence import MOST_DRAFTS
from tests.conftest import make_pair, random_prompts
from tests.reference import naive_generate
from tests.training_data import LetterTokenizer, examples

PROMPTS = random_prompts((5, 9, 12, 3, 7))


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_outputs_are_those_that_each_prompt_gets_alone(pair: Any, batch_tokens: int):
    router = ConfidenceRouter(32)
    other = with_router(pair, router)
    assert isinstance(pair.router, RandomRouter) and other.router is router and other.slm is pair.slm
    for model, threshold, veto in ((pair, 0.5, 0.0), (other, 0.7, 0.0), (other, 0.1, 0.4)):
        sizes = {"max_new_tokens": 8, "batch_tokens": batch_tokens}
        decoded = decode(model, PROMPTS, router_threshold=threshold, llm_veto=veto, **sizes)
        expected = [naive_generate(model, prompt, 8, threshold, veto=veto)[:2] for prompt in PROMPTS]
        assert [(one.tokens, one.to_llm) for one in decoded] == expected
        assert all(one.seconds > 0 for one in decoded)
        for prompt, one in zip(PROMPTS, decoded, strict=True):
            # No model processes the last token; a model may process a place again, behind a draft that was replaced.
            for passes in (one.passes["slm"], one.passes["llm"]):
                reached = [end for _, end in passes]
                starts = zip(passes, [0, *reached], strict=False)
                assert all(start <= before and start < end for (start, end), before in starts)
                assert max(reached, default=0) <= len(prompt) + len(one.tokens) + MOST_DRAFTS
            assert bool(one.passes["llm"]) == (any(one.to_llm) or veto > 0)


def test_a_pair_that_cannot_take_tokens_back_decodes_through_transformers_loop():
    model = make_pair("lfm2", "llama")
    expected = [naive_generate(model, prompt, 8, 0.5)[:2] for prompt in PROMPTS]
    decoded = decode(model, PROMPTS, router_threshold=0.5, max_new_tokens=8)
    assert [(one.tokens, one.to_llm) for one in decoded] == expected
    for prompt, one in zip(PROMPTS, decoded, strict=True):
        by_llm = [len(prompt) + place for place, to_llm in enumerate(one.to_llm) if to_llm]
        assert one.passes["llm"] == list(zip([0, *by_llm], by_llm, strict=False))
        assert [end for _, end in one.passes["slm"]] == [len(prompt) + place for place in range(len(one.tokens))]
    with pytest.raises(ValueError, match=r"^llm_veto: expected 0 here"):
        decode(model, PROMPTS, router_threshold=0.5, llm_veto=0.3, max_new_tokens=8)


@pytest.mark.parametrize(("alone", "threshold"), [("slm", 0.0), ("llm", 2.0)])
def test_a_model_alone_runs_no_pass_of_the_other(pair: Any, count_calls: Any, alone: Any, threshold: float):
    expected = [naive_generate(pair, prompt, 8, threshold)[0] for prompt in PROMPTS]
    passes = {"slm": count_calls(pair.slm), "llm": count_calls(pair.llm)}
    decoded = decode(pair, PROMPTS, alone=alone, max_new_tokens=8)
    assert [one.tokens for one in decoded] == expected
    assert [one.to_llm for one in decoded] == [[alone == "llm"] * len(tokens) for tokens in expected]
    assert passes[alone] and not passes["llm" if alone == "slm" else "slm"]
    for prompt, one in zip(PROMPTS, decoded, strict=True):
        ends = range(len(prompt), len(prompt) + len(one.tokens))
        assert [end for _, end in one.passes[alone]] == [*ends] and one.passes[alone][0][0] == 0


@pytest.mark.parametrize("alone", [None, "slm", "llm"])
def test_generation_settings_of_the_models_take_no_part(alone: Any):
    plain, other = make_pair(), make_pair()
    settings = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "suppress_tokens": [*range(3, 40)]}
    for model in (other, other.slm, other.llm):
        model.generation_config.update(**settings, max_length=7)
    before = copy.deepcopy(other.generation_config)
    options: Any = {"router_threshold": 0.5, "max_new_tokens": 8, "alone": alone}
    found, expected = ([one.tokens for one in decode(pair, PROMPTS, **options)] for pair in (other, plain))
    assert found == expected
    assert other.generation_config == before


def test_outputs_stop_where_the_context_is_full_and_a_prompt_that_fills_it_is_named_by_its_row():
    pair = make_pair("gpt2", "gpt2", max_position_embeddings=14)
    decoded = decode(pair, PROMPTS, router_threshold=0.5, max_new_tokens=8)
    for place, prompt in enumerate(PROMPTS):
        assert decoded[place].tokens == naive_generate(pair, prompt, min(8, 14 - len(prompt)), 0.5)[0]
    pair._tokenizer = LetterTokenizer()
    with pytest.raises(ValueError, match=r"^row 12: 15 tokens exceed the context of 14"):
        encode_prompts(pair, examples((3, 14)))


def test_a_router_in_training_decides_as_in_evaluation():
    torch.manual_seed(0)
    pair = make_pair(router={"type": "mlp", "dropout": 0.5})
    options: Any = {"router_threshold": 0.5, "max_new_tokens": 8}
    expected = [one.to_llm for one in decode(pair, PROMPTS, **options)]
    assert [one.to_llm for one in decode(pair.train(), PROMPTS, **options)] == expected


def test_a_router_that_gives_nan_is_named(pair: Any):
    router = LinearRouter(32)
    torch.nn.init.constant_(router.score.weight, float("nan"))
    with pytest.raises(ValueError, match=r"^router 'mine': scores are NaN"):
        score_outputs(pair, {"mine": router}, PROMPTS, [[5, 6]] * len(PROMPTS))


def test_scores_along_outputs_are_those_of_decoding(pair: Any):
    naive = [naive_generate(pair, prompt, 8, 0.5) for prompt in PROMPTS]
    found = score_outputs(pair, {"own": pair.router}, PROMPTS, [one[0] for one in naive])["own"]
    assert np.concatenate(found) == pytest.approx(np.concatenate([one.scores for one in naive]), abs=1e-4)


def test_thresholds_send_the_wanted_shares_of_the_scores():
    scores = np.random.default_rng(0).random(1000).astype(np.float32)
    thresholds = spread_thresholds(scores, (0.1, 0.25, 0.9))
    assert [float((scores < threshold).mean()) for threshold in thresholds] == pytest.approx([0.1, 0.25, 0.9])
    assert not {*map(np.float32, thresholds)} & {*scores}
    # Tied scores give each threshold once, and none that sends no token.
    assert spread_thresholds(np.array([0.5] * 60 + [1.0] * 40), (0.1, 0.2, 0.5, 0.7, 0.9)) == [1.0]
