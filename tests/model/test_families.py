"""Every architecture, both loops of batches, growing and static caches: compared with the naive loop, bare models."""

import pytest
import torch

from citer_hf.model.batch_support import why_not_placed
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.families import EVERY, FAMILIES
from tests.reference import assert_sequences, naive_logits, naive_texts

ROWS = random_prompts((3, 11, 7, 9))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
MOVE_TOGETHER = ("bloom", "qwen3_next", "lfm2")
# Both as one model, as the SLM and as the LLM; those of the table in mixed pairs, too.
PAIRS = [
    *(("llama", family) for family in FAMILIES if family != "llama"),
    *((family, "llama") for family in ("gpt2", "gemma3", "bloom", "lfm2")),
    ("gemma2", "mistral_sliding"),
    ("bloom", "gpt2"),
    ("lfm2", "qwen3_next"),
]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_equals_the_naive_loop_with_any_cache_and_any_number_of_waiting_sequences(name, loop_taken):
    model = make_pair(name, name, threshold=0.4)
    expected = naive_texts(model, ROWS, 12, (2, 9))
    apart = not why_not_placed(model.slm)
    assert apart == (name not in MOVE_TOGETHER)
    for cache, waiting, loop in ((None, 1, ""), (None, 4, "rows"), ("static", None, "static")):
        options = {"waiting_rows": waiting, "cache_implementation": cache, "output_logits": True}
        output = model.generate(**left_padded(ROWS), **GREEDY, **options, eos_token_id=[2, 9])
        assert loop_taken() == (loop if apart else "")
        assert_sequences(output, ROWS, expected)


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_a_mixed_pair_equals_the_naive_loop_with_and_without_a_cache_and_its_models_at_the_ends(slm, llm):
    model, batch = make_pair(slm, llm), left_padded(ROWS)
    output = model.generate(**batch, **GREEDY, output_logits=True)
    assert_sequences(output, ROWS, naive_texts(model, ROWS, 12, (2,)))
    assert torch.equal(output.sequences, model.generate(**batch, **GREEDY, use_cache=False).sequences)
    for threshold, alone in ((0.0, model.slm), (1.5, model.llm)):
        ours = model.generate(**batch, **GREEDY, router_threshold=threshold).sequences
        assert torch.equal(ours, alone.generate(**batch, **GREEDY).sequences)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ROWS[1]]), use_cache=False)
    for position in range(0, 11, 2):
        logits, score, by_llm = naive_logits(model, ROWS[1][: position + 1], threshold=0.5)
        torch.testing.assert_close(whole.logits[0, position], logits, **CLOSE)
        assert whole.routed_to_llm[0, position] == by_llm
        assert abs(float(whole.router_scores[0, position]) - score) < 1e-3


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_a_catch_up_over_many_tokens_equals_reading_them_at_once(slm, llm):
    script = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1]])
    model = make_pair(slm, llm, router=ScriptedRouter(script))
    model.generation_config.eos_token_id = None
    prompt = random_prompts((9,))[0]
    wanted = {**GREEDY, "max_new_tokens": 20, "output_logits": True}
    output = model.generate(input_ids=torch.tensor([prompt]), **wanted)
    assert output.past_key_values.routing.llm_calls == 4
    text = output.sequences[0].tolist()
    for step in range(20):
        writer = model.llm if script[0, step % 10] else model.slm
        with torch.no_grad():
            expected = writer(torch.tensor([text[: 9 + step]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(output.logits[step][0], expected, **CLOSE)


@pytest.mark.parametrize("cache", [None, "static"])
def test_eager_attention_gives_the_same(cache, loop_taken):
    model = make_pair(hidden_size=48)
    for part in (model.slm, model.llm):
        part.set_attn_implementation("eager")
    output = model.generate(**left_padded(ROWS), **GREEDY, eos_token_id=None, cache_implementation=cache)
    assert loop_taken()
    assert_sequences(output, ROWS, naive_texts(model, ROWS, 12, ()))
