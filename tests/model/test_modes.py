"""Every decoding mode of `generate`, with caches that grow and static ones."""

from typing import Any

import pytest
import torch
import transformers
from transformers import LogitsProcessorList, StoppingCriteriaList, set_seed

from citer_hf import CiterCache
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import tiny_model
from tests.reference import naive_generate, naive_logits

GREEDY = {"max_new_tokens": 12, "do_sample": False}
ROWS = (3, 11, 7, 9)
SAMPLING = {"max_new_tokens": 12, "do_sample": True}
STATIC = {"cache_implementation": "static"}
PROCESSORS: list[dict[str, Any]] = [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
PROCESSORS += [{"typical_p": 0.8}, {"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.01}, {"repetition_penalty": 1.5}]
PROCESSORS += [{"no_repeat_ngram_size": 2}, {"bad_words_ids": [[7], [9, 11]]}, {"min_new_tokens": 6}]
PROCESSORS += [{name: [5, 6, 7]} for name in ("suppress_tokens", "begin_suppress_tokens")]
PROCESSORS += [{"forced_eos_token_id": 2}, {"sequence_bias": [[[8], 3.0]]}, {"guidance_scale": 1.5}]
PROCESSORS += [{"exponential_decay_length_penalty": (4, 1.2)}, {"renormalize_logits": True, "top_k": 5}]


def single(length: int = 9) -> dict[str, torch.Tensor]:
    return left_padded(random_prompts((length,)))


@pytest.mark.parametrize("processor", PROCESSORS, ids=str)
def test_a_processor_acts_as_in_the_writing_model_and_with_any_cache(pair, processor, warned):
    guided = "guidance_scale" in processor
    options = {**SAMPLING, **processor, "do_sample": not guided, "pad_token_id": 0}

    def generate(model: Any, lengths: tuple[int, ...], **more: Any) -> Any:
        set_seed(0)
        return model.generate(**left_padded(random_prompts(lengths)), **{**options, **more})

    for dials, alone in (({"router_threshold": 0.0}, pair.slm), ({"router_threshold": 2.0}, pair.llm)):
        # A single sequence draws what transformers draws; in a batch, each has a generator of its own.
        assert torch.equal(generate(pair, (9,), **dials), generate(alone, (9,)))
        greedy = {"do_sample": False}
        assert torch.equal(generate(pair, ROWS, **dials, **greedy), generate(alone, ROWS, **greedy))
    if not guided:
        lossless = [generate(pair, ROWS, **one) for one in ({"router_threshold": 2.0}, {"llm_veto": 1.0})]
        assert torch.equal(*lossless)
    for lengths in ((9,), ROWS):
        wanted = {"eos_token_id": [2, 9], "return_dict_in_generate": True, "output_scores": True}
        ways = [generate(pair, lengths, **wanted, cache_implementation=cache) for cache in ("dynamic", "static")]
        assert torch.equal(*(one.sequences for one in ways))
        scores = [torch.stack(one.scores, 1)[ways[0].cache.routing.unfinished] for one in ways]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        # Guidance runs the model a second time, for all sequences at once.
        assert bool(warned()) == guided


def test_a_threshold_per_row_follows_its_row_through_num_return_sequences(pair):
    batch = left_padded(random_prompts())
    thresholds = torch.tensor([0.0, 0.5, 2.0])
    set_seed(1)
    wanted = {**SAMPLING, "num_return_sequences": 2, "return_dict_in_generate": True}
    output = pair.generate(**batch, **wanted, router_threshold=thresholds)
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
    wanted = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
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
    assert torch.equal(plain, pair.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3, max_drafts=3))


def test_the_llm_processes_a_prompt_in_chunks_too_and_once(pair, count_calls):
    calls = count_calls(pair.llm)
    pair.generate(**single(12), max_new_tokens=1, do_sample=False, router_threshold=2.0, prefill_chunk_size=3)
    assert calls == [3] * 4


def test_scores_logits_hidden_states_and_attentions_come_per_token(pair):
    model = make_pair(hidden_size=48)
    model.set_attn_implementation("eager")
    kinds = ("scores", "logits", "hidden_states", "attentions")
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**single(), **wanted, **{f"output_{kind}": True for kind in kinds})
    assert all(len(output[kind]) == 5 for kind in kinds)
    assert output.hidden_states[0][-1].shape == (1, 9, 32)
    assert output.attentions[1][0].shape == (1, 4, 1, 10)
    logits = naive_generate(model, single()["input_ids"][0].tolist(), 5, 0.5, eos=()).logits
    torch.testing.assert_close(output.logits[0][0], logits[0], atol=1e-4, rtol=1e-4)


def test_continuous_batching_is_refused(pair):
    with pytest.raises(ValueError, match="generate_batch: its paged cache holds one model"):
        pair.generate_batch([[5, 6, 7]])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beams reorder"),
        ({"use_cache": False}, "there is no cache"),
        ({"prompt_lookup_num_tokens": 3}, "an assistant model drafts"),
        ({"output_hidden_states": True}, "hidden states"),
    ],
)
def test_a_veto_that_cannot_be_is_an_error_by_keyword_and_one_warning_by_configuration(options, reason, caplog):
    model, wanted = make_pair(hidden_size=48), {**single(), **GREEDY, "return_dict_in_generate": True, **options}
    with pytest.raises(ValueError, match=rf"^llm_veto: expected 0 here, got 0.3\..*{reason}"):
        model.generate(**wanted, llm_veto=0.3)
    plain = model.generate(**wanted, llm_veto=0.0)
    transformers.utils.logging.warning_once.cache_clear()
    model.generation_config.llm_veto = 0.3
    for _ in range(2):
        assert torch.equal(model.generate(**wanted).sequences, plain.sequences)
    told = [record.getMessage() for record in caplog.records if "llm_veto" in record.getMessage()]
    assert len(told) == 1 and reason in told[0]


def test_an_end_a_stop_string_or_a_length_within_a_draft_ends_the_text_there_and_streams_each_token_once(pair):
    class Shown(transformers.TextStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    for threshold, veto in ((0.5, 0.3), (2.0, 0.0), (0.3, 0.0)):
        dials = {"router_threshold": threshold, "llm_veto": veto}
        whole = naive_generate(pair, single()["input_ids"][0].tolist(), 24, threshold, (), veto).tokens
        for step in range(1, 24, 4):
            length, shown = whole.index(whole[step]) + 1, Shown()
            wanted = {**GREEDY, "max_new_tokens": 24, "eos_token_id": whole[step], "streamer": shown, **dials}
            output = pair.generate(**single(), **wanted)
            assert output[0, 9:].tolist() == whole[:length] == shown.tokens[9:-1]
            short = pair.generate(**single(), **{**wanted, "eos_token_id": None, "max_new_tokens": step})
            assert short[0, 9:].tolist() == whole[:step]


def test_the_record_counts_what_the_models_did(pair, count_calls):
    wanted = {**GREEDY, "max_new_tokens": 40, "eos_token_id": None, "llm_veto": 0.3, "return_dict_in_generate": True}
    output = pair.generate(**single(), **wanted)
    text, routing = output.sequences[0].tolist(), output.past_key_values.routing
    flagged = routing.to_llm & ~routing.vetoed
    places = [9 + step for step in flagged[0].nonzero()[:, 0].tolist()]
    agreed = sum(int(naive_logits(pair, text[:place], 0.0)[0].argmax()) == text[place] for place in places)
    assert routing.accepted == agreed / len(places) and bool(routing.vetoed.any())
    calls = {"slm": count_calls(pair.slm), "llm": count_calls(pair.llm)}
    routing = pair.generate(**single(), **wanted).past_key_values.routing
    assert (routing.slm_calls, routing.llm_calls) == (len(calls["slm"]), len(calls["llm"]))


# ---- static caches ----


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
    assert output.past_key_values.get_max_length() == output.past_key_values.get_seq_length() == 9 + 12 - 1
    for options in ({**STATIC, "max_cache_len": 200}, {"past_key_values": CiterCache(pair.config, max_cache_len=200)}):
        output = pair.generate(**single(), **GREEDY, **options, return_dict_in_generate=True)
        assert output.past_key_values.get_max_length() == 200


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
