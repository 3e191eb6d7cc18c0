"""Every architecture as either half of a pair, compared with the naive reference and with the bare models."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.families import FAMILIES
from tests.reference import naive_generate, naive_logits

PAIRS = [
    *(("llama", family) for family in FAMILIES),
    *((family, "llama") for family in FAMILIES if family != "llama"),
    ("qwen2", "qwen3"),
    ("gemma2", "gemma3"),
    ("bloom", "gpt2"),
    ("gpt2", "mistral_sliding"),
    ("lfm2", "qwen3_next"),
]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_a_padded_batch_equals_the_reference_row_by_row(slm, llm):
    model = make_pair(slm, llm)
    rows = random_prompts()
    output = model.generate(
        **left_padded(rows), max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    routing = output.past_key_values.routing
    for index, row in enumerate(rows):
        text, to_llm, scores, logits = naive_generate(model, row, 12, threshold=0.5)
        length = len(text)
        assert output.sequences[index, 12 : 12 + length].tolist() == text
        assert routing.to_llm[index, :length].tolist() == to_llm
        torch.testing.assert_close(routing.scores[index, :length], torch.tensor(scores), **CLOSE)
        torch.testing.assert_close(torch.stack([step[index] for step in output.logits])[:length], logits, **CLOSE)


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_a_catch_up_over_many_tokens_equals_reading_them_at_once(slm, llm):
    script = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1]])
    model = make_pair(slm, llm, router=ScriptedRouter(script))
    model.generation_config.eos_token_id = None
    prompt = random_prompts((9,))[0]
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.past_key_values.routing.llm_calls == 4
    text = output.sequences[0].tolist()
    for step in range(20):
        writer = model.llm if script[0, step % 10] else model.slm
        with torch.no_grad():
            expected = writer(torch.tensor([text[: 9 + step]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(output.logits[step][0], expected, **CLOSE)


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_the_ends_of_the_threshold_are_the_two_models(slm, llm):
    model = make_pair(slm, llm)
    batch = left_padded(random_prompts())
    settings = {"max_new_tokens": 10, "do_sample": False}
    for threshold, alone in ((0.0, model.slm), (1.5, model.llm)):
        ours = model.generate(**batch, **settings, router_threshold=threshold)
        assert torch.equal(ours, alone.generate(**batch, **settings))


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_no_cache_equals_cache(slm, llm):
    model = make_pair(slm, llm)
    batch = left_padded(random_prompts())
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_forward_routes_every_position(slm, llm):
    model = make_pair(slm, llm)
    prompt = random_prompts((12,))[0]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt]), use_cache=False)
    for position in range(12):
        logits, score, by_llm = naive_logits(model, prompt[: position + 1], threshold=0.5)
        torch.testing.assert_close(output.logits[0, position], logits, **CLOSE)
        assert output.routed_to_llm[0, position] == by_llm
        assert abs(float(output.router_scores[0, position]) - score) < 1e-3
