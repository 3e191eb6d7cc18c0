"""Rows of a batch that do not wait for each other get the texts that they get alone, in far fewer calls of the LLM."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LogitsProcessorList, StoppingCriteriaList, set_seed
from transformers.generation import MaxTimeCriteria

from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.model.generation import CiterGenerationMixin
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import FAMILIES, SHAPE, VOCAB, tiny_model
from tests.reference import naive_generate

ARCHITECTURES = frozenset(["llama"])
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
# Architectures that `tests/families.py` does not have: configuration class and what it adds to the shape.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **LOW_RANK,
            **MOE,
            "head_dim": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
        },
    ),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "olmo2": ("Olmo2Config", {}),
    "phi": ("PhiConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 16, **MOE}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def model_of(name: str, seed: int) -> Any:
    if name in FAMILIES:
        return tiny_model(name, seed)
    config, extra = MORE[name]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**{**SHAPE, **extra}), dtype=torch.float32
    ).eval()


def pair_of(slm: str, llm: str, router: Any = "random") -> CiterForCausalLM:
    small, large = model_of(slm, 1), model_of(llm, 2)
    config = CiterConfig(slm_config=small.config, llm_config=large.config, router=router, router_threshold=0.4)
    return CiterForCausalLM(config, slm=small, llm=large).eval()


@pytest.fixture
def moves_apart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that says whether the last `generate` used the loop in which rows move apart."""
    calls: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    import citer_hf.model.generation as module

    original = module.decode_rows
    monkeypatch.setattr(module, "decode_rows", noted)

    def happened() -> bool:
        result = bool(calls)
        calls.clear()
        return result

    return happened


def assert_rows_are_those_of_the_naive_loop(model: Any, output: Any, rows: list[list[int]], steps: int, eos: Any):
    width = max(map(len, rows))
    routing = output.past_key_values.routing
    for index, row in enumerate(rows):
        text, to_llm, scores, _ = naive_generate(model, row, steps, model.config.router_threshold, eos=eos)
        assert output.sequences[index, width : width + len(text)].tolist() == text
        assert not output.sequences[index, width + len(text) :].any()
        assert routing.to_llm[index, : len(text)].tolist() == to_llm
        assert not routing.unfinished[index, len(text) :].any()
        found = routing.scores[index, : len(text)].cpu()
        torch.testing.assert_close(found, torch.tensor(scores), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_rows_that_move_apart_are_those_of_the_naive_loop(architecture, moves_apart):
    names = {"gemma3_text": "gemma3"}
    name = names.get(architecture, architecture)
    model = pair_of(name, name)
    rows = random_prompts((3, 11, 7, 9))
    for waiting in (None, 4):
        output = model.generate(
            **left_padded(rows), **GREEDY, eos_token_id=[2, 9], return_dict_in_generate=True, waiting_rows=waiting
        )
        assert moves_apart(), "this architecture is said to be able to"
        assert_rows_are_those_of_the_naive_loop(model, output, rows, 20, (2, 9))


def test_sliding_windows_of_both_kinds_move_apart(moves_apart):
    model = pair_of("gemma2", "mistral_sliding")
    rows = random_prompts((3, 11, 7, 9))
    output = model.generate(**left_padded(rows), **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    assert moves_apart()
    assert_rows_are_those_of_the_naive_loop(model, output, rows, 20, ())


@pytest.mark.parametrize("name", ["bloom", "qwen3_next", "lfm2"])
def test_other_architectures_move_together(name, moves_apart):
    model = pair_of(name, name)
    model.generate(**left_padded(random_prompts()), **GREEDY)
    assert not moves_apart()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation, moves_apart):
    model = make_pair(hidden_size=48)
    model.slm.set_attn_implementation(implementation)
    model.llm.set_attn_implementation(implementation)
    rows = random_prompts((3, 11, 7, 9))
    output = model.generate(**left_padded(rows), **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    assert moves_apart()
    assert_rows_are_those_of_the_naive_loop(model, output, rows, 20, ())


MODEL = make_pair("llama", "qwen2", hidden_size=48)
token = st.integers(3, VOCAB - 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(token, min_size=1, max_size=9), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.1, 0.3, 0.6, 0.9]),
    eos=st.lists(token, max_size=20, unique=True),
    waiting=st.sampled_from([None, 2, 3, 99, lambda unfinished, llm_share, step_ratio: unfinished]),
)
def test_any_policy_gives_every_row_its_own_text(rows, seed, threshold, eos, waiting):
    MODEL.router.seed, MODEL.config.router_threshold = seed, threshold
    output = MODEL.generate(
        **left_padded(rows),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=0,
        waiting_rows=waiting,
        return_dict_in_generate=True,
    )
    assert_rows_are_those_of_the_naive_loop(MODEL, output, rows, 9, eos)


class Independent(nn.Module):
    """Sends each token of each row to the LLM with the same probability."""

    def __init__(self, share: float):
        super().__init__()
        self.share, self.generator = share, torch.Generator().manual_seed(0)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (torch.rand(hidden.shape[:-1], generator=self.generator) >= self.share).float()


@pytest.mark.parametrize(("rows", "most_calls", "most_steps"), [(8, 0.32, 1.45), (16, 0.34, 1.45)])
def test_independent_rows_cost_half_the_calls_of_lock_step(rows, most_calls, most_steps, count_calls, monkeypatch):
    # Measured times, on a busy machine, may tell of an SLM as dear as the LLM.
    monkeypatch.setattr("citer_hf.model.batch.Pace.ratio", 0.5)
    monkeypatch.setattr("citer_hf.model.batch.Pace.growth", 0.0)
    model = make_pair(router=Independent(0.2), hidden_size=48, max_position_embeddings=600)
    model.slm.config.max_position_embeddings = 600
    steps, calls = count_calls(model.slm), count_calls(model.llm)
    prompts = torch.tensor(random_prompts((6,) * rows))
    model.generate(prompts, max_new_tokens=512, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(calls) / 512 <= most_calls
    assert len(steps) / 512 <= most_steps


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("llm", ["mistral_sliding", "gemma2", "gemma3", "gpt_oss"])
def test_an_llm_with_windows_that_reads_late_misses_nothing(llm, cache):
    """A row that waits while the others write more than a window sees what lies before its own end."""
    model = pair_of("llama", llm)
    for seed in range(4):
        model.config.router_threshold, model.router.seed = 0.08, seed
        rows = random_prompts((3, 11, 7, 9), seed)
        output = model.generate(
            **left_padded(rows),
            **{**GREEDY, "max_new_tokens": 40},
            eos_token_id=None,
            return_dict_in_generate=True,
            waiting_rows=99,
            cache_implementation=cache,
        )
        assert_rows_are_those_of_the_naive_loop(model, output, rows, 40, ())


@pytest.mark.parametrize("seed", [3, 40])
def test_the_cache_goes_on_where_an_llm_with_windows_reads_after_a_row_has_ended(seed):
    """With seed 40, the LLM first reads for one row when the other has just ended at the same place."""
    model, batch = pair_of("llama", "mistral_sliding"), left_padded(random_prompts((9, 9), seed))
    model.router.seed = seed
    wanted = {**GREEDY, "max_new_tokens": 24, "router_threshold": 0.06, "eos_token_id": list(range(3, 12))}
    output = model.generate(**batch, **wanted, return_dict_in_generate=True)
    text = torch.cat([output.sequences, torch.tensor([[7, 8], [9, 10]])], dim=1)
    wanted = {**GREEDY, "max_new_tokens": 8, "router_threshold": 2.0, "eos_token_id": None, "output_logits": True}
    wanted |= {"attention_mask": torch.ones_like(text), "return_dict_in_generate": True}
    again = model.generate(text, past_key_values=output.past_key_values, **wanted)
    torch.testing.assert_close(again.logits, model.generate(text, **wanted).logits, atol=1e-3, rtol=1e-3)


def test_waiting_for_one_row_is_lock_step(count_calls, moves_apart):
    model = make_pair(router=Independent(0.3), hidden_size=48)
    steps = count_calls(model.slm)
    model.generate(**left_padded(random_prompts()), **GREEDY, eos_token_id=None, waiting_rows=1)
    assert len(steps) == 20 and not moves_apart()


@pytest.mark.parametrize("threshold", [0.0, 1.5, torch.tensor([0.0, 0.0, 2.0])])
def test_thresholds_that_never_mix_need_no_waiting(pair, threshold, moves_apart):
    pair.generate(**left_padded(random_prompts()), **GREEDY, router_threshold=threshold)
    assert not moves_apart()


def test_a_threshold_per_row_moves_apart(pair, moves_apart):
    rows = random_prompts()
    thresholds = torch.tensor([0.0, 0.5, 2.0])
    settings = {**GREEDY, "eos_token_id": None}
    together = pair.generate(**left_padded(rows), **settings, router_threshold=thresholds, waiting_rows=1)
    moves_apart()
    assert torch.equal(together, pair.generate(**left_padded(rows), **settings, router_threshold=thresholds))
    assert moves_apart()


SAMPLING = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 6, "bad_words_ids": [[5], [7, 8]]},
]


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_draws_what_lock_step_draws(pair, options, moves_apart):
    batch = left_padded(random_prompts((3, 11, 7, 9)))
    sampling = {**GREEDY, "do_sample": True, "eos_token_id": [2, 9, 14], **options}
    set_seed(3)
    together = pair.generate(**batch, **sampling, waiting_rows=1)
    after = torch.rand(1)
    moves_apart()
    set_seed(3)
    apart = pair.generate(**batch, **sampling)
    assert moves_apart() and torch.equal(apart, together)
    assert torch.equal(torch.rand(1), after), "what is drawn next is the same, too"


def test_draws_that_do_not_fit_are_drawn_again(pair, monkeypatch):
    batch = left_padded(random_prompts((3, 11, 7, 9)))
    sampling = {**GREEDY, "do_sample": True, "eos_token_id": None}
    set_seed(3)
    plain = pair.generate(**batch, **sampling)
    monkeypatch.setattr("citer_hf.model.sampling.MOST_BYTES", 1)
    set_seed(3)
    assert torch.equal(pair.generate(**batch, **sampling), plain)


def test_sampled_tokens_have_the_distribution_of_the_writing_model():
    model = make_pair(hidden_size=48)
    prompt = torch.tensor(random_prompts((6,)))
    set_seed(0)
    drawn = model.generate(
        prompt, do_sample=True, max_new_tokens=2, num_return_sequences=4000, eos_token_id=None, pad_token_id=0
    )[:, 6:]
    first = int(drawn[:, 0].mode().values)
    text = torch.cat([prompt, torch.tensor([[first]])], dim=1)
    with torch.no_grad():
        expected = model(input_ids=text, use_cache=False, logits_to_keep=1).logits[0, -1].softmax(-1)
    seconds = drawn[drawn[:, 0] == first, 1]
    seen = torch.bincount(seconds, minlength=VOCAB) / len(seconds)
    # Six standard errors.
    assert (seen - expected).abs().max() < 6 * (0.25 / len(seconds)) ** 0.5


def same_output(apart: Any, together: Any) -> None:
    assert torch.equal(apart.sequences, together.sequences)
    for ours, theirs in ((apart.logits, together.logits), (apart.scores, together.scores)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    ours, theirs = apart.past_key_values.routing, together.past_key_values.routing
    assert torch.equal(ours.to_llm, theirs.to_llm) and torch.equal(ours.unfinished, theirs.unfinished)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eos", [None, [2, 9, 14, 21]])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"num_return_sequences": 2, "do_sample": True}])
def test_scores_logits_and_record_mean_what_they_mean_in_lock_step(pair, eos, options, moves_apart):
    batch = left_padded(random_prompts((3, 11, 7, 9)))
    everything = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    wanted = {**GREEDY, "max_new_tokens": 40, "eos_token_id": eos, **everything, **options}
    set_seed(1)
    together = pair.generate(**batch, **wanted, waiting_rows=1)
    moves_apart()
    set_seed(1)
    apart = pair.generate(**batch, **wanted)
    assert moves_apart()
    same_output(apart, together)


@pytest.mark.parametrize("slm", ["llama", "gemma3"])
@pytest.mark.parametrize("eos", [None, [2, 9, 14, 21]])
def test_the_returned_cache_goes_on_as_after_lock_step(slm, eos):
    model = pair_of(slm, slm)
    batch = left_padded(random_prompts((3, 11, 7, 9)))
    wanted = {**GREEDY, "max_new_tokens": 40, "eos_token_id": eos, "return_dict_in_generate": True}
    results = []
    for waiting in (1, None):
        first = model.generate(**batch, **wanted, waiting_rows=waiting)
        width = first.sequences.shape[1]
        text = torch.cat([first.sequences, torch.full((4, 2), 7)], dim=1)
        mask = torch.ones_like(text)
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
        cache = first.past_key_values
        assert cache.get_seq_length() == cache.slm.get_seq_length() == width - 1
        assert cache.llm.get_seq_length() == cache.llm_length <= width - 1
        second = model.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY, eos_token_id=None)
        results.append(second)
    assert torch.equal(*results)
    fresh = model.generate(text, attention_mask=mask, **GREEDY, eos_token_id=None)
    assert torch.equal(fresh, results[1])


def test_a_prompt_that_the_cache_knows_is_not_read_again(pair, count_calls):
    batch = left_padded(random_prompts((3, 11, 7, 9)))
    wanted = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    first = pair.generate(**batch, **wanted)
    text = torch.cat([first.sequences, torch.full((4, 2), 7)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 22, dtype=torch.long)], dim=1)
    steps = count_calls(pair.slm)
    pair.generate(text, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert steps[0] == 3


def test_an_error_in_the_middle_leaves_the_users_cache_as_it_was_after_the_prompts(pair):
    from citer_hf import CiterCache

    batch = left_padded(random_prompts((3, 11, 7, 9)))
    cache = CiterCache(pair.config)

    criterion = MaxTimeCriteria(1000.0, initial_timestamp=time.time())
    calls = []

    def broken(self: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("the lights went out")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaxTimeCriteria, "__call__", broken)
        with pytest.raises(RuntimeError, match="the lights"):
            pair.generate(
                **batch,
                **GREEDY,
                eos_token_id=2,
                past_key_values=cache,
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
    assert cache.get_seq_length() == cache.slm.get_seq_length() == 11
    assert cache.llm.get_seq_length() == cache.llm_length <= 11
    text = torch.cat([batch["input_ids"], torch.full((4, 1), 5)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    again = pair.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY, eos_token_id=None)
    assert torch.equal(again, pair.generate(text, attention_mask=mask, **GREEDY, eos_token_id=None))


def test_a_criterion_of_ones_own_keeps_rows_together(pair, moves_apart):
    def never(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    pair.generate(**left_padded(random_prompts()), **GREEDY, stopping_criteria=StoppingCriteriaList([never]))
    assert not moves_apart()


def test_a_processor_of_ones_own_keeps_rows_together(pair, moves_apart):
    keep = LogitsProcessorList([lambda input_ids, scores: scores])
    pair.generate(**left_padded(random_prompts()), **GREEDY, logits_processor=keep)
    assert not moves_apart()


def test_a_hook_on_the_pair_sees_every_step(pair):
    seen: list[int] = []
    handle = pair.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[0]))
    pair.generate(**left_padded(random_prompts()), **GREEDY, eos_token_id=None)
    handle.remove()
    assert seen == [3] * 20


def test_a_subclass_that_changes_forward_is_asked_at_every_step():
    class Counting(CiterForCausalLM):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().forward(*args, **kwargs)

    small, large = tiny_model("llama", 1), tiny_model("llama", 2)
    config = CiterConfig(slm_config=small.config, llm_config=large.config, router="random")
    model = Counting(config, slm=small, llm=large).eval()
    model.generate(torch.tensor(random_prompts((5,))), **GREEDY, eos_token_id=None)
    assert Counting.calls == 20


def test_the_decoding_loops_are_ours_where_they_can_be(pair, monkeypatch):
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("transformers' loop prepares the inputs of every token anew")

    plain = pair.generate(torch.tensor(random_prompts((5,))), **GREEDY)
    prepare = CiterGenerationMixin.prepare_inputs_for_generation
    calls: list[int] = []

    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return never() if len(calls) > 1 else prepare(self, *args, **kwargs)

    monkeypatch.setattr(CiterGenerationMixin, "prepare_inputs_for_generation", once)
    assert torch.equal(plain, pair.generate(torch.tensor(random_prompts((5,))), **GREEDY))


@pytest.mark.parametrize("waiting", [0, -1, 1.5, True, "all", lambda unfinished, llm_share, step_ratio: None])
def test_a_number_of_waiting_rows_that_means_nothing_is_refused(pair, waiting):
    with pytest.raises(ValueError, match="waiting_rows: expected"):
        pair.generate(**left_padded(random_prompts()), **GREEDY, waiting_rows=waiting)


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_other_modes_take_the_keyword_and_move_together(pair, mode):
    prompt = torch.tensor(random_prompts((9,)))
    plain = pair.generate(prompt, **GREEDY, **mode)
    assert torch.equal(plain, pair.generate(prompt, **GREEDY, **mode, waiting_rows=3))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_no_keys_and_values_are_left_to_the_garbage_collector(pair: Any, rows: int, cache: str) -> None:
    batch = left_padded(random_prompts()[:rows])
    gc.collect()
    gc.disable()
    try:
        pair.generate(**batch, max_new_tokens=6, do_sample=False, router_threshold=0.5, cache_implementation=cache)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        # Compilers of earlier tests leave tensors of their own kind, which hold nothing.
        left = [one for one in gc.garbage if type(one) is torch.Tensor]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left
