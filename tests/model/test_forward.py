"""`forward`: what it returns for every combination of inputs, what it does not run, and input that means nothing."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from citer_hf import CiterCache, CiterConfig, CiterForCausalLM
from citer_hf.model.compat import cache_argument
from citer_hf.model.routers import as_threshold
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.families import tiny_model
from tests.reference import naive_generate, naive_logits

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def text() -> torch.Tensor:
    return torch.tensor(random_prompts((12,)))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 5, 11]), torch.tensor([2])])
def test_kept_logits_are_those_positions_of_all_logits(pair, text, kept):
    whole, part = pair(input_ids=text), pair(input_ids=text, logits_to_keep=kept)
    positions = kept if isinstance(kept, torch.Tensor) else torch.arange(12 - kept, 12)
    torch.testing.assert_close(part.logits, whole.logits[:, positions], **CLOSE)
    assert torch.equal(part.routed_to_llm, whole.routed_to_llm[:, positions])


def test_padding_on_the_left_changes_nothing_and_is_not_counted(pair):
    rows = random_prompts()
    batch = left_padded(rows)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    output = pair(**batch, use_cache=False, position_ids=positions)
    counted = pair(**batch, router_threshold=2.0).past_key_values.routing
    for index, row in enumerate(rows):
        logits, _, _ = naive_logits(pair, row, threshold=0.5)
        torch.testing.assert_close(output.logits[index, -1], logits, **CLOSE)
    assert torch.equal(counted.unfinished, batch["attention_mask"].bool()) and counted.llm_share == 1.0


def test_labels_give_the_loss_of_the_routed_logits_and_a_tuple_where_no_dictionary_is_wanted(pair, text):
    output, as_tuple = (pair(input_ids=text, labels=text, return_dict=named) for named in (True, False))
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], text[0, 1:])
    torch.testing.assert_close(output.loss, expected)
    assert len(as_tuple) == 3 and isinstance(as_tuple[2], CiterCache)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


def test_training_loss_is_the_marginal_likelihood_and_reaches_the_router_alone(text):
    model = make_pair(router={"type": "linear"}, hidden_size=48).train()
    assert model.router.training and not model.slm.training and not model.llm.training
    output = model(input_ids=text, labels=text)
    output.loss.backward()
    p_slm = output.router_scores[0, :-1, None]
    slm = model.slm(text).logits[0, :-1].softmax(-1)
    llm = model.llm(text).logits[0, :-1].softmax(-1)
    mixture = (p_slm * slm + (1 - p_slm) * llm).gather(1, text[0, 1:, None])
    torch.testing.assert_close(output.loss, -mixture.log().mean(), **CLOSE)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "router.score.weight",
        "router.score.bias",
    }


def test_hidden_states_and_attentions_are_the_slms(text):
    model = make_pair(hidden_size=48)
    model.set_attn_implementation("eager")
    ours = model(input_ids=text, output_hidden_states=True, output_attentions=True)
    alone = model.slm(input_ids=text, output_hidden_states=True, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, alone.hidden_states, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, alone.attentions, strict=True))
    model.config.output_hidden_states = True
    assert len(model(input_ids=text).hidden_states) == 3


def test_the_llm_first_reads_the_prompt_at_its_first_token(count_calls, text):
    model = make_pair(router=ScriptedRouter(torch.tensor([[0, 0, 0, 1, 0, 1]])))
    calls = count_calls(model.llm)
    model(input_ids=text, router_threshold=0.0)
    assert calls == []
    model.router.calls = 0
    model.generate(input_ids=text, max_new_tokens=6, do_sample=False, eos_token_id=None, max_drafts=0)
    assert calls == [12 + 3, 2]


def test_a_threshold_per_sequence_routes_it_and_an_equal_score_is_the_slms(pair, text):
    batch = text.expand(3, -1)
    output = pair(input_ids=batch, router_threshold=torch.tensor([0.0, 0.5, 2.0]))
    assert not output.routed_to_llm[0].any() and output.routed_to_llm[2].all()
    assert torch.equal(output.routed_to_llm[1], output.router_scores[1] < 0.5)
    score = pair(input_ids=text, logits_to_keep=1).router_scores[0, 0]
    output = pair(input_ids=text, logits_to_keep=1, router_threshold=float(score))
    assert not output.routed_to_llm.any()


def test_the_vocabulary_is_the_smaller_table_and_resizing_it_resizes_both(text):
    model = make_pair("llama", "qwen2", vocab_size=70)
    for size in (61, 72):
        output = model(input_ids=torch.full((1, 2), size - 1), router_threshold=2.0)
        assert output.logits.shape[-1] == model.config.vocab_size == size
        model.resize_token_embeddings(72)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_stays_fp32_until_the_whole_model_is_cast(dtype, text):
    model = make_pair(router={"type": "mlp"})
    model.slm.to(dtype)
    model.llm.to(dtype)
    assert model(input_ids=text).router_scores.dtype == torch.float32
    model.to(dtype)
    output = model(input_ids=text)
    assert output.router_scores.dtype == output.logits.dtype == dtype


def test_another_head_may_be_put_on_the_slm(text):
    model = make_pair(router="confidence")
    model.slm.lm_head = torch.nn.Linear(model.slm.lm_head.in_features, model.slm.lm_head.out_features, bias=False)
    torch.testing.assert_close(model(text, router_threshold=0.0).logits, model.slm(text).logits)


class OwnCode(LlamaForCausalLM):
    """A base model with code of its own, whose `forward` takes no `**kwargs`."""

    def forward(  # type: ignore[override]
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None
    ):
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, **cache_argument(super(), past_key_values), **inputs, return_dict=True)


class NewerCode(OwnCode):
    """The same, written for the newer name of the cache."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None):  # type: ignore[override]
        return super().forward(input_ids, attention_mask, position_ids, cache, use_cache)


@pytest.mark.parametrize("code", [OwnCode, NewerCode])
@pytest.mark.parametrize("role", ["slm", "llm"])
def test_a_base_model_is_given_only_the_keywords_that_it_takes(role, code, text):
    plain = {"slm": tiny_model("llama", seed=1), "llm": tiny_model("llama", seed=2)}
    alone = plain[role]
    mine = code(copy.deepcopy(alone.config))
    mine.load_state_dict(alone.state_dict())
    parts = {**plain, role: mine.eval()}
    config = CiterConfig(slm_config=parts["slm"].config, llm_config=parts["llm"].config, router="random")
    model = CiterForCausalLM(config, **parts).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "router_threshold": 0.0 if role == "slm" else 2.0}
    for batch in (left_padded([text[0].tolist()]), left_padded(random_prompts())):
        expected = alone.generate(**batch, max_new_tokens=5, do_sample=False)
        for options in ({}, {"synced_gpus": False}, {"cache_implementation": "static"}, {"num_beams": 1}):
            assert torch.equal(model.generate(**batch, **settings, **options), expected)
    model.train()
    loss = model(text, labels=text, num_items_in_batch=torch.tensor(24)).loss
    assert loss.item() == pytest.approx(model(text, labels=text).loss.item() * 11 / 24, rel=1e-5)


def test_a_base_model_may_be_replaced_by_one_that_takes_other_keywords(text):
    model = make_pair()
    alone = model.slm
    model.slm = OwnCode(alone.config).eval()
    model.slm.load_state_dict(alone.state_dict())
    expected = alone.generate(text, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(text, max_new_tokens=4, do_sample=False, router_threshold=0.0), expected)


def test_an_slm_that_does_not_call_its_head_is_an_error_that_says_so(text):
    model = make_pair()
    head = model.slm.lm_head
    model.slm.lm_head.forward = None
    model.slm.forward = lambda input_ids, **_: CausalLMOutputWithPast(logits=head.weight[input_ids])
    with pytest.raises(ValueError, match="slm: LlamaForCausalLM does not call its output embeddings"):
        model(text)


@pytest.mark.parametrize("options", [{"use_cache": False}, {}, {"labels": True}])
def test_kept_positions_follow_the_veto(options):
    model, rows = make_pair(hidden_size=48), random_prompts((9, 9))
    text = torch.tensor(rows)
    dials = {"router_threshold": torch.tensor([0.3, 0.0]), "llm_veto": torch.tensor([0.4, 1.0])}
    if "labels" in options:
        options = {"labels": text}
    output = model(input_ids=text, **dials, **options)
    for index, (threshold, veto) in enumerate(((0.3, 0.4), (0.0, 1.0))):
        for position in range(9):
            step = naive_generate(model, rows[index][: position + 1], 1, threshold, (), veto)
            torch.testing.assert_close(output.logits[index, position], step.logits[0], atol=1e-4, rtol=1e-4)
            assert output.routed_to_llm[index, position] == step.to_llm[0]
    lossless = model(input_ids=text, use_cache=False, llm_veto=1.0).logits
    torch.testing.assert_close(lossless, model.llm(text).logits)


# ---- input that means nothing ----


TEXT = torch.tensor(random_prompts((6, 6)))
BAD_NUMBERS = [-0.5, 2.01, 70, float("nan"), float("inf"), "0.7", True, [0.5, 0.5], None]
BAD_TENSORS = [
    torch.tensor(values)
    for values in ([0.5, -0.1], [0.5, float("nan")], [0.5, 70], [True, False], [0.5], 0.5, [[0.5], [0.5]])
]


@pytest.mark.parametrize("threshold", BAD_NUMBERS + BAD_TENSORS, ids=str)
def test_what_is_no_threshold_is_an_error_that_names_the_range_and_the_value(pair, count_calls, threshold):
    message = r"router_threshold: expected a number from 0 .* to 2 .*; got " + re.escape(repr(threshold))
    with pytest.raises(ValueError, match=message):
        as_threshold(threshold, 2)
    if threshold is None:
        return
    calls = count_calls(pair.slm)
    with pytest.raises(ValueError, match=message.replace(" .*; got", ".*; got")):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_threshold=threshold)
    assert calls == []
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        pair(input_ids=TEXT, router_threshold=threshold)
    for make in (CiterConfig, partial(CiterForCausalLM.from_pair, pair.slm, pair.llm)):
        with pytest.raises(ValueError, match="router_threshold: expected a number from 0"):
            make(router_threshold=threshold)


@pytest.mark.parametrize("value", [0, 0.7, 1, 2, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_a_threshold_is_any_number_from_0_to_2(value):
    assert type(as_threshold(value)) is float and as_threshold(value) == value
    assert as_threshold(torch.tensor([value, value]), 2).shape == (2, 1)


def test_embeddings_no_input_and_misspelt_keywords_are_errors(pair):
    with pytest.raises(ValueError, match="inputs_embeds fit one of the two models at most"):
        pair(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="input_ids: expected token ids"):
        pair()
    with pytest.raises(ValueError, match="inputs_embeds"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="router_treshold"):
        pair.generate(input_ids=TEXT, max_new_tokens=2, router_treshold=0.5)


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig"])
def test_a_model_that_keeps_its_state_elsewhere_is_an_error_when_the_pair_is_made(name):
    config = getattr(transformers, name)(vocab_size=61, hidden_size=32, num_hidden_layers=2)
    other = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="keeps no keys and values in a `cache`"):
        CiterForCausalLM.from_pair(tiny_model("llama"), other)
