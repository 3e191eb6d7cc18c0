"""Every decoding mode of `generate`."""

from typing import Any

import pytest
import torch
import transformers
from transformers import set_seed
from transformers.utils import is_optimum_quanto_available

from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import tiny_model
from tests.reference import naive_generate, naive_logits

GREEDY = {"max_new_tokens": 12, "do_sample": False}
ROWS = (3, 11, 7, 9)
SAMPLING = {"max_new_tokens": 12, "do_sample": True}
PROCESSORS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.8},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.01},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[7], [9, 11]]},
    "min_new_tokens": {"min_new_tokens": 6},
    "suppress_tokens": {"suppress_tokens": [5, 6, 7]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 6, 7]},
    "forced_eos": {"forced_eos_token_id": 2},
    "sequence_bias": {"sequence_bias": [[[8], 3.0]]},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.2)},
    "renormalize": {"renormalize_logits": True, "top_k": 5},
    "guidance": {"guidance_scale": 1.5},
}


def single(length: int = 9) -> dict[str, torch.Tensor]:
    return left_padded(random_prompts((length,)))


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_acts_as_in_the_writing_model_and_with_any_cache(pair, name, warned):
    options = {**SAMPLING, **PROCESSORS[name], "do_sample": name != "guidance", "pad_token_id": 0}

    def generate(model: Any, lengths: tuple[int, ...], **more: Any) -> Any:
        set_seed(0)
        return model.generate(**left_padded(random_prompts(lengths)), **options, **more)

    for threshold, alone in ((0.0, pair.slm), (2.0, pair.llm)):
        assert torch.equal(generate(pair, ROWS, router_threshold=threshold), generate(alone, ROWS))
    for lengths in ((9,), ROWS):
        wanted = {"eos_token_id": [2, 9], "return_dict_in_generate": True, "output_scores": True}
        ways = [generate(pair, lengths, **wanted, cache_implementation=cache) for cache in ("dynamic", "static")]
        assert torch.equal(*(one.sequences for one in ways))
        scores = [torch.stack(one.scores, 1)[ways[0].cache.routing.unfinished] for one in ways]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        # Guidance runs the model a second time, for all rows at once.
        assert bool(warned()) == (name == "guidance" and len(lengths) > 1)


def test_a_processor_changes_the_text_of_a_mixed_pair(pair):
    batch = left_padded(random_prompts())
    plain = pair.generate(**batch, **GREEDY)
    banned = plain[:, 12:].flatten().unique().tolist()[3:]
    constrained = pair.generate(**batch, **GREEDY, suppress_tokens=banned)
    assert not set(constrained[:, 12:].flatten().tolist()) & set(banned)


def test_a_threshold_per_row_follows_its_row_through_num_return_sequences(pair):
    batch = left_padded(random_prompts())
    thresholds = torch.tensor([0.0, 0.5, 2.0])
    set_seed(1)
    output = pair.generate(
        **batch, **SAMPLING, num_return_sequences=2, router_threshold=thresholds, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences[:, :12], batch["input_ids"].repeat_interleave(2, 0))
    assert not torch.equal(*output.sequences[:2])
    routing = output.past_key_values.routing
    assert not routing.to_llm[:2].any()
    assert torch.equal(routing.to_llm[4:], routing.unfinished[4:])
    assert 0 < routing.to_llm[2:4].float().mean() < 1


@pytest.mark.parametrize(("do_sample", "early_stopping"), [(False, False), (True, True)])
def test_beam_search_at_the_ends_of_the_threshold_is_that_of_the_model(pair, do_sample, early_stopping):
    batch = left_padded(random_prompts())
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": do_sample, "early_stopping": early_stopping}
    for threshold, alone in ((0.0, pair.slm), (1.5, pair.llm)):
        set_seed(0)
        ours = pair.generate(**batch, **options, router_threshold=threshold)
        set_seed(0)
        assert torch.equal(ours, alone.generate(**batch, **options))


@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_search_with_cache_equals_without_and_has_the_record_of_the_returned_sequences(pair, do_sample):
    rows = random_prompts()
    wanted = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "waiting_rows": 3}
    wanted["do_sample"] = do_sample
    set_seed(0)
    output = pair.generate(**left_padded(rows), **wanted, return_dict_in_generate=True)
    set_seed(0)
    assert torch.equal(output.sequences, pair.generate(**left_padded(rows), **wanted, use_cache=False))
    routing, beams = output.past_key_values.routing, output.beam_indices
    assert routing.to_llm.shape == beams.shape
    for index, sequence in enumerate(output.sequences):
        prompt, text = rows[index // 2], sequence[12:].tolist()
        length = int((beams[index] >= 0).sum())
        for step in range(length):
            _, _, by_llm = naive_logits(pair, prompt + text[:step], threshold=0.5)
            assert routing.to_llm[index, step] == by_llm
        assert not routing.unfinished[index, length:].any()


FORGETS = pytest.mark.skipif(transformers.__version__.startswith("5.17"), reason="fails with two bare models too")


@pytest.mark.parametrize("names", [("llama", "llama"), pytest.param(("mistral_sliding", "gemma2"), marks=FORGETS)])
@pytest.mark.parametrize(("assistant", "threshold"), [("slm", 0.0), ("slm", 0.5), ("other", 0.5), ("slm", 2.0)])
def test_assisted_generation_gives_the_greedy_text_and_record(names, assistant, threshold):
    model = make_pair(*names, threshold=threshold)
    assistant_model = model.slm if assistant == "slm" else tiny_model("qwen2", seed=5)
    plain = model.generate(**single(12), **GREEDY, return_dict_in_generate=True)
    assisted = model.generate(**single(12), **GREEDY, return_dict_in_generate=True, assistant_model=assistant_model)
    assert torch.equal(plain.sequences, assisted.sequences)
    assert torch.equal(plain.past_key_values.routing.to_llm, assisted.past_key_values.routing.to_llm)


def test_assisted_sampling_runs_and_ends(pair):
    set_seed(0)
    output = pair.generate(**single(), **SAMPLING, assistant_model=pair.slm)
    assert 9 < output.shape[1] <= 21


def test_prompt_lookup_gives_the_greedy_text(pair):
    prompt = {"input_ids": torch.tensor([random_prompts((6,))[0] * 3])}
    plain = pair.generate(**prompt, **GREEDY)
    assert torch.equal(plain, pair.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3, waiting_rows=3))


@pytest.mark.parametrize(("chunk", "cache"), [(1, "dynamic"), (5, "dynamic"), (4, "static")])
def test_reading_the_prompt_in_chunks_gives_the_same_text_and_record(pair, chunk, cache):
    # How often the LLM is called must not depend on the clock.
    settings = {**left_padded(random_prompts()), **GREEDY, "return_dict_in_generate": True, "waiting_rows": 2}
    plain = pair.generate(**settings)
    chunked = pair.generate(**settings, prefill_chunk_size=chunk, cache_implementation=cache)
    assert torch.equal(plain.sequences, chunked.sequences)
    ours, theirs = plain.cache.routing, chunked.cache.routing
    assert torch.equal(ours.to_llm, theirs.to_llm) and ours.llm_calls == theirs.llm_calls


def test_chunks_of_a_prompt_do_not_wake_the_llm(pair, count_calls):
    calls = count_calls(pair.llm)
    pair.generate(**single(12), max_new_tokens=1, do_sample=False, router_threshold=2.0, prefill_chunk_size=3)
    assert calls == [12]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads a cache from a GPU")
def test_an_offloaded_cache_gives_the_same_text(pair):
    batch = left_padded(random_prompts())
    offloaded = pair.generate(**batch, **GREEDY, cache_implementation="offloaded")
    assert torch.equal(pair.generate(**batch, **GREEDY), offloaded)


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="the backend of the quantized cache is not installed")
def test_a_quantized_cache_is_that_of_each_model():
    model = make_pair(hidden_size=48)
    quantized = {**GREEDY, "cache_implementation": "quantized", "cache_config": {"nbits": 4, "q_group_size": 8}}
    for threshold, alone in ((0.0, model.slm), (2.0, model.llm)):
        output = model.generate(**single(8), **quantized, router_threshold=threshold, return_dict_in_generate=True)
        assert torch.equal(output.sequences, alone.generate(**single(8), **quantized))
        cache = output.past_key_values
        assert "Quantized" in type(cache.slm).__name__ and "Quantized" in type(cache.llm).__name__


def test_scores_logits_hidden_states_and_attentions_come_per_token(pair):
    model = make_pair(hidden_size=48)
    model.set_attn_implementation("eager")
    kinds = ("scores", "logits", "hidden_states", "attentions")
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**single(), **wanted, **{f"output_{kind}": True for kind in kinds})
    assert all(len(output[kind]) == 5 for kind in kinds)
    assert output.hidden_states[0][-1].shape == (1, 9, 32)
    assert output.attentions[1][0].shape == (1, 4, 1, 10)
    _, _, _, logits = naive_generate(model, single()["input_ids"][0].tolist(), 5, 0.5, eos=())
    torch.testing.assert_close(output.logits[0][0], logits[0], atol=1e-4, rtol=1e-4)


def test_what_two_models_cannot_do_is_refused(pair):
    with pytest.raises(ValueError, match="generate_batch: continuous batching"):
        pair.generate_batch([[5, 6, 7]])
    with pytest.raises(ValueError, match="assistant_early_exit"):
        pair.generate(**single(), **GREEDY, assistant_early_exit=1, prompt_lookup_num_tokens=None)
