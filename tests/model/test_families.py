"""One matrix, architecture x router x batch x cache: compared with the naive loop, and with the bare models."""

from itertools import cycle

import pytest
import torch

from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import EVERY, FAMILIES
from tests.reference import assert_sequences, naive_logits, naive_texts

BATCHES = [random_prompts((9,)), random_prompts((3, 11, 7, 9))]
ROWS = BATCHES[1]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
# They cannot take tokens back, so that transformers' loop calls `forward` for every token, and caches grow.
FORWARD_ONLY = ("qwen3_next", "lfm2")
ROUTERS = ["random", "confidence", "entropy", "linear", "r2r", {"type": "mlp", "batch_norm": True}]
# Both as one model, as the SLM and as the LLM; those of the table in mixed pairs, too.
PAIRS = [
    *(("llama", family) for family in FAMILIES if family != "llama"),
    *((family, "llama") for family in ("gpt2", "gemma3", "bloom", "lfm2")),
    ("gemma2", "mistral_sliding"),
    ("bloom", "gpt2"),
    ("lfm2", "qwen3_next"),
]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize(("name", "router"), list(zip(EVERY, cycle(ROUTERS))))
def test_a_batch_equals_the_naive_loop_with_any_cache_number_of_drafts_and_veto(name, router, warned):
    model = make_pair(name, name, router)
    scores = model(input_ids=torch.tensor([ROWS[1]]), use_cache=False).router_scores
    model.config.router_threshold = float(scores[0, :-1].median())
    for rows in BATCHES:
        wanted = {"output_logits": True, "eos_token_id": [2, 9]}
        for veto, ways in ((0.0, ((None, 0), ("static", None))), (0.3, ((None, None), ("static", 2)))):
            if veto and name in FORWARD_ONLY:
                continue
            expected = naive_texts(model, rows, 12, (2, 9), vetoes=[veto] * len(rows))
            for cache, drafts in ways:
                dials = {"max_drafts": drafts, "cache_implementation": cache, "llm_veto": veto}
                output = model.generate(**left_padded(rows), **GREEDY, **dials, **wanted)
                assert_sequences(output, rows, expected)
        assert bool(warned()) == (name in FORWARD_ONLY), "a static cache that cannot be is warned of"


@pytest.mark.parametrize(("slm", "llm"), PAIRS)
def test_a_mixed_pair_equals_the_naive_loop_with_and_without_a_cache_and_its_models_at_the_ends(slm, llm):
    model, batch = make_pair(slm, llm), left_padded(ROWS)
    output = model.generate(**batch, **GREEDY, output_logits=True)
    assert_sequences(output, ROWS, naive_texts(model, ROWS, 12, (2,)))
    assert torch.equal(output.sequences, model.generate(**batch, **GREEDY, use_cache=False).sequences)
    for threshold, alone in ((0.0, model.slm), (1.5, model.llm)):
        expected = alone.generate(**batch, **GREEDY).sequences
        for cache in ("dynamic", "static"):
            options = {"router_threshold": threshold, "cache_implementation": cache}
            assert torch.equal(model.generate(**batch, **GREEDY, **options).sequences, expected)
    whole = model(input_ids=torch.tensor([ROWS[1]]), use_cache=False)
    for position in range(0, 11, 2):
        logits, score, by_llm = naive_logits(model, ROWS[1][: position + 1], threshold=0.5)
        torch.testing.assert_close(whole.logits[0, position], logits, **CLOSE)
        assert whole.routed_to_llm[0, position] == by_llm
        assert abs(float(whole.router_scores[0, position]) - score) < 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("llm", ["mistral_sliding", "gemma3"])
def test_an_llm_with_windows_that_reads_late_misses_nothing(llm, cache):
    """A sequence that waits while the others write more than a window sees what lies before its own end."""
    model = make_pair("llama", llm, {"type": "random", "seed": 1}, threshold=0.08)
    wanted = {**GREEDY, "max_new_tokens": 40, "max_drafts": 99, "cache_implementation": cache, "eos_token_id": None}
    assert_sequences(model.generate(**left_padded(ROWS), **wanted), ROWS, naive_texts(model, ROWS, 40, ()))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_eager_attention_gives_the_same(cache):
    model = make_pair(hidden_size=48)
    for part in (model.slm, model.llm):
        part.set_attn_implementation("eager")
    output = model.generate(**left_padded(ROWS), **GREEDY, eos_token_id=None, cache_implementation=cache)
    assert_sequences(output, ROWS, naive_texts(model, ROWS, 12, ()))
