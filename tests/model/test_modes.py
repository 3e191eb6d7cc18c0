"""Every decoding mode of `generate`."""

import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)
from transformers.utils import is_optimum_quanto_available

from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import VOCAB, tiny_model
from tests.reference import naive_generate, naive_logits

GREEDY = {"max_new_tokens": 12, "do_sample": False}
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


@pytest.mark.parametrize(("name", "threshold"), list(zip(PROCESSORS, [0.0, 2.0] * 9, strict=True)))
def test_sampling_with_a_processor_draws_what_the_writing_model_would(pair, name, threshold):
    batch, options = left_padded(random_prompts()), {**SAMPLING, **PROCESSORS[name]}
    if name == "guidance":
        options |= {"do_sample": False}
    set_seed(0)
    ours = pair.generate(**batch, **options, router_threshold=threshold)
    set_seed(0)
    assert torch.equal(ours, (pair.slm if threshold == 0 else pair.llm).generate(**batch, **options))


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
    wanted = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": do_sample}
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


@pytest.mark.parametrize(("assistant", "threshold"), [("slm", 0.0), ("slm", 0.5), ("other", 0.5), ("slm", 2.0)])
def test_assisted_generation_gives_the_greedy_text_and_record(pair, assistant, threshold):
    assistant_model = pair.slm if assistant == "slm" else tiny_model("qwen2", seed=5)
    settings = {**GREEDY, "router_threshold": threshold, "return_dict_in_generate": True}
    plain = pair.generate(**single(), **settings)
    assisted = pair.generate(**single(), **settings, assistant_model=assistant_model)
    assert torch.equal(plain.sequences, assisted.sequences)
    assert torch.equal(plain.past_key_values.routing.to_llm, assisted.past_key_values.routing.to_llm)


def test_assisted_sampling_runs_and_ends(pair):
    set_seed(0)
    output = pair.generate(**single(), **SAMPLING, assistant_model=pair.slm)
    assert 9 < output.shape[1] <= 21


def test_prompt_lookup_gives_the_greedy_text(pair):
    prompt = {"input_ids": torch.tensor([random_prompts((6,))[0] * 3])}
    plain = pair.generate(**prompt, **GREEDY)
    assert torch.equal(plain, pair.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3))


def sliding_assistants_work() -> bool:
    """Whether bare models can be assisted by one with sliding windows: on transformers 5.17, some texts fail."""
    assisted, prompt = tiny_model("gemma2", seed=2), single(12)
    try:
        for seed in (1, 2, 4):
            assisted.generate(**prompt, **GREEDY, assistant_model=tiny_model("mistral_sliding", seed=seed))
    except RuntimeError:
        return False
    return True


def test_assisted_generation_works_where_a_layer_forgets():
    if not sliding_assistants_work():
        pytest.skip("this transformers fails with two bare models too")
    model = make_pair("mistral_sliding", "gemma2")
    plain = model.generate(**single(12), **GREEDY)
    assert torch.equal(plain, model.generate(**single(12), **GREEDY, assistant_model=model.slm))


@pytest.mark.parametrize("chunk", [1, 5])
def test_reading_the_prompt_in_chunks_gives_the_same_text_and_record(pair, chunk):
    batch = left_padded(random_prompts())
    # How often the LLM is called must not depend on the clock.
    settings = {**GREEDY, "return_dict_in_generate": True, "waiting_rows": 2}
    plain, chunked = pair.generate(**batch, **settings), pair.generate(**batch, **settings, prefill_chunk_size=chunk)
    assert torch.equal(plain.sequences, chunked.sequences)
    assert torch.equal(plain.past_key_values.routing.to_llm, chunked.past_key_values.routing.to_llm)
    assert plain.past_key_values.routing.llm_calls == chunked.past_key_values.routing.llm_calls


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


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with one letter per token id."""
    alphabet = string.ascii_uppercase[:3] + string.ascii_lowercase + string.digits + string.punctuation
    tokenizer = Tokenizer(models.WordLevel({alphabet[index]: index for index in range(VOCAB)}, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="A", pad_token="A", eos_token="C")


def test_a_stop_string_ends_the_text(pair, words):
    plain = pair.generate(**single(), **GREEDY)[0, 9:].tolist()
    output = pair.generate(**single(), **GREEDY, stop_strings=[words.decode(plain[4:6])], tokenizer=words)
    assert output[0, 9:].tolist() == plain[:6]


@pytest.mark.parametrize("kind", [TextStreamer, TextIteratorStreamer])
def test_a_streamer_gets_the_text(pair, words, kind, capsys):
    streamer = kind(words, skip_prompt=True)
    output = pair.generate(**single(), **GREEDY, streamer=streamer)
    shown = capsys.readouterr().out if kind is TextStreamer else "".join(streamer)
    assert shown.strip() == words.decode(output[0, 9:])


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


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_a_chat_goes_on_with_the_returned_cache(pair, threshold, count_calls):
    settings = {**GREEDY, "router_threshold": threshold, "return_dict_in_generate": True}
    first = pair.generate(**single(), **settings)
    text = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    second_prompt = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    fresh = pair.generate(**second_prompt, **settings)
    calls = count_calls(pair.slm)
    second = pair.generate(**second_prompt, past_key_values=first.past_key_values, **settings)
    assert calls[0] == 4, "the last token, which no model has read yet, and the three new ones"
    assert torch.equal(second.sequences, fresh.sequences)
    assert torch.equal(second.past_key_values.routing.to_llm, fresh.past_key_values.routing.to_llm)


def test_what_two_models_cannot_do_is_refused(pair):
    with pytest.raises(ValueError, match="generate_batch: continuous batching"):
        pair.generate_batch([[5, 6, 7]])
    with pytest.raises(ValueError, match="inputs_embeds: the two models"):
        pair.generate(**single(), **GREEDY, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match=r"cache_implementation: .*'paged'"):
        pair.generate(**single(), **GREEDY, cache_implementation="paged")
    with pytest.raises(ValueError, match="assistant_early_exit"):
        pair.generate(**single(), **GREEDY, assistant_early_exit=1, prompt_lookup_num_tokens=None)
