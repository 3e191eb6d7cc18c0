"""Adapters of PEFT on a base model: every way to give one, saving them, and those that cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from citer_hf import CiterForCausalLM
from tests.adapters import OLD_NAME, TRANSFORMERS_LOADS, pair_with, peft, save_models_with_adapters, with_adapter
from tests.conftest import left_padded, random_prompts
from tests.families import tiny_model
from tests.reference import naive_generate
from tests.repositories import TEXT, change, config_of, logits, save_base_models

pytestmark = OLD_NAME
load = CiterForCausalLM.from_pretrained


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return save_models_with_adapters(tmp_path)


def loaded_by_transformers(home: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(home / "slm")
    model.load_adapter(str(home / "slm-lora"))
    return model


WAYS = {
    "path": lambda home: {"slm": home / "slm-lora"},
    "both names": lambda home: {"slm": home / "slm", "slm_adapter_name_or_path": home / "slm-lora"},
    "PeftModel": lambda home: {"slm": with_adapter(home / "slm")},
    "load_adapter": lambda home: {"slm": loaded_by_transformers(home)},
    "from_pretrained": lambda home: {"slm": AutoModelForCausalLM.from_pretrained(home / "slm-lora")},
    "afterwards": lambda home: {"slm": home / "slm"},
}

ON_THE_HEAD = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"trainable_token_indices": [5, 6]},
]
CASES = [
    pytest.param(way, marks=TRANSFORMERS_LOADS) if way in ("load_adapter", "from_pretrained") else way for way in WAYS
]


@pytest.mark.parametrize("way", CASES)
def test_an_adapter_given_in_any_way_writes_as_merged_weights_do(home, way):
    model = pair_with(home, **WAYS[way](home))
    if way == "afterwards":
        peft.PeftModel.from_pretrained(model.slm, home / "slm-lora")
    merged = pair_with(home, slm=with_adapter(home / "slm").merge_and_unload())
    merged.router = model.router
    batch = left_padded(random_prompts((5, 9, 12)))
    threshold = float(merged(**batch).router_scores.detach().median())
    options = {"router_threshold": threshold, "max_new_tokens": 8, "return_dict_in_generate": True}
    for inputs in (batch, {"input_ids": TEXT}):
        found, expected = (pair.generate(**inputs, **options, output_logits=True) for pair in (model, merged))
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        routing, other = (out.past_key_values.routing for out in (found, expected))
        assert torch.equal(routing.to_llm, other.to_llm)
        torch.testing.assert_close(routing.scores, other.scores, atol=1e-5, rtol=0)


def test_an_adapter_on_the_llm_works_alike(home):
    model = CiterForCausalLM.from_pair(home / "slm", home / "llm-lora", router="confidence")
    model.save_pretrained(home / "router")
    adapted = with_adapter(home / "llm", 1)
    for pair in (model, load(home / "router")):
        assert torch.equal(logits(pair, 2), logits(adapted))
        assert torch.equal(logits(pair, 0), logits(AutoModelForCausalLM.from_pretrained(home / "slm")))


@pytest.mark.parametrize("options", ON_THE_HEAD)
def test_an_adapter_on_a_tied_head_hides_no_state_from_the_router_and_stays_tied(home, options):
    tiny_model("llama", seed=1, tie_word_embeddings=True).save_pretrained(home / "tied")
    adapted = with_adapter(home / "tied", **options)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    expected, model = logits(adapted), pair_with(home, slm=adapted)
    ids = TEXT[0].tolist()
    text, _, _, scores, _ = naive_generate(model, ids, 6, 0.5, eos=(2, 5))
    out = model.generate(TEXT, router_threshold=0.5, max_new_tokens=6, return_dict_in_generate=True)
    assert out.sequences[0, len(ids) :].tolist() == text
    assert out.past_key_values.routing.scores[0].tolist() == pytest.approx(scores, abs=1e-5)
    model.tie_weights()
    for holds in (False, True):
        model.save_pretrained(home / "router", save_base_models=holds)
        assert torch.equal(logits(load(home / "router"), 0), expected)
    kept = load_file(home / "router" / "slm" / "model.safetensors")
    assert kept.keys() == load_file(home / "tied" / "model.safetensors").keys()


@TRANSFORMERS_LOADS
def test_another_adapter_and_none_can_be_chosen_in_the_pair(home):
    model = pair_with(home)
    first, other = logits(model, 0), with_adapter(home / "slm", 5)
    other.save_pretrained(home / "other")
    model.slm.load_adapter(str(home / "other"), adapter_name="other")
    model.slm.set_adapter("other")
    assert torch.equal(logits(model, 0), logits(other))
    model.slm.disable_adapters()
    bare = logits(AutoModelForCausalLM.from_pretrained(home / "slm"))
    assert torch.equal(logits(model, 0), bare)
    model.save_pretrained(home / "without")
    assert torch.equal(logits(load(home / "without"), 0), bare)
    model.slm.enable_adapters()
    model.save_pretrained(home / "with other")
    assert torch.equal(logits(load(home / "with other"), 0), logits(other))
    model.slm.set_adapter("default")
    model.save_pretrained(home / "first")
    assert torch.equal(logits(load(home / "first"), 0), first)


@pytest.mark.parametrize("way", CASES)
@pytest.mark.parametrize("holds", [False, True])
def test_a_saved_router_gives_the_same_with_its_adapter(home, way, holds):
    model = pair_with(home, **WAYS[way](home))
    if way == "afterwards":
        with_adapter(model.slm)
    model.save_pretrained(home / "router", save_base_models=holds)
    by_name, inside = {"name_or_path": str(home / "slm-lora")}, {"subfolder": "slm_adapter"}
    adapter = by_name if way in ("path", "both names") and not holds else inside
    base = {"subfolder": "slm"} if holds else {"name_or_path": str(home / "slm")}
    assert config_of(home / "router")["slm_reference"] == {**base, "adapter": adapter}
    if adapter == inside:
        saved = peft.PeftConfig.from_pretrained(str(home / "router" / "slm_adapter"))
        assert saved.base_model_name_or_path == base.get("name_or_path")
    if holds:
        for folder in ("slm", "llm", "slm-lora"):
            (home / folder).rename(home / f"{folder} was")
        bare, kept = (load_file(home / name / "model.safetensors") for name in ("slm was", "router/slm"))
        assert bare.keys() == kept.keys() and all(torch.equal(bare[key], kept[key]) for key in bare)
    again = load(home / "router")
    again.save_pretrained(home / "again")
    for pair in (again, AutoModelForCausalLM.from_pretrained(home / "router"), load(home / "again")):
        for threshold in (0, 0.5, 2):
            assert torch.equal(logits(pair, threshold), logits(model, threshold))
    assert (config_of(home / "again")["slm_reference"]["adapter"] == by_name) == (adapter == by_name)


def test_an_adapter_trained_in_the_pair_is_saved_with_it(home):
    model = pair_with(home)
    for name, parameter in model.slm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.slm(TEXT, labels=TEXT).loss.backward()
    torch.optim.SGD((one for one in model.slm.parameters() if one.requires_grad), lr=1.0).step()
    model.save_pretrained(home / "router")
    assert config_of(home / "router")["slm_reference"]["adapter"] == {"subfolder": "slm_adapter"}
    assert torch.equal(logits(load(home / "router"), 0), logits(model, 0))
    assert not torch.equal(logits(pair_with(home), 0), logits(model, 0))


def test_a_quantized_model_keeps_its_adapter_beside_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    save_base_models(tmp_path, 64, 128)
    with_adapter(tmp_path / "slm").save_pretrained(tmp_path / "slm-lora")
    quantized = {"slm_quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    model = pair_with(tmp_path, **quantized)
    model.save_pretrained(tmp_path / "router")
    assert torch.equal(logits(load(tmp_path / "router", **quantized), 0), logits(model, 0))
    full = logits(load(tmp_path / "router"), 0)
    assert torch.equal(full, logits(with_adapter(tmp_path / "slm"))) and not torch.equal(full, logits(model, 0))
    with pytest.raises(ValueError, match=r"slm: it cannot be saved as it is loaded"):
        model.save_pretrained(tmp_path / "held", save_base_models=True)


def test_models_and_adapters_that_have_moved_are_found_by_their_new_names(home):
    model = pair_with(home)
    model.save_pretrained(home / "router")
    for name in ("slm", "slm-lora"):
        (home / name).rename(home / f"{name}-new")
    with pytest.raises(OSError, match=r"(?s)slm_adapter: .* could not be loaded .*slm_adapter_name_or_path"):
        load(home / "router", slm_name_or_path=home / "slm-new")
    new = {"slm_name_or_path": home / "slm-new", "slm_adapter_name_or_path": home / "slm-lora-new"}
    assert torch.equal(logits(load(home / "router", **new), 0), logits(model, 0))


def test_an_adapter_on_the_pair_as_a_whole_is_pefts_to_save_and_load(home):
    pair_with(home, slm=home / "slm").save_pretrained(home / "router")
    pair = load(home / "router")
    before = logits(pair, 0)
    whole = with_adapter(pair, target_modules=r"slm\..*\.(q_proj|v_proj)")
    assert {name.split(".")[2] for name, value in whole.named_parameters() if value.requires_grad} == {"slm"}
    whole(input_ids=TEXT, labels=TEXT, router_threshold=0).loss.backward()
    assert all(value.grad is not None for value in whole.parameters() if value.requires_grad)
    assert not torch.equal(logits(whole, 0), before)
    whole.save_pretrained(home / "whole")
    again = peft.PeftModel.from_pretrained(load(home / "router"), home / "whole")
    assert torch.equal(logits(again, 0), logits(whole, 0))
    generate = {"input_ids": TEXT, "router_threshold": 0.5, "max_new_tokens": 6}
    assert torch.equal(again.generate(**generate), whole.generate(**generate))
    with pytest.raises(ValueError, match=r"slm: an adapter was attached to the pair as a whole.*pair\.slm"):
        pair.save_pretrained(home / "lost")
    assert not (home / "lost").exists()
    over_one = pair_with(home)
    with_adapter(over_one, target_modules=r"slm\..*\.(q_proj|v_proj)")
    with pytest.raises(ValueError, match=r"slm: an adapter was attached to the pair as a whole"):
        over_one.save_pretrained(home / "lost")
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(pair, adapter\)"):
        AutoModelForCausalLM.from_pretrained(home / "whole")


def test_what_cannot_work_is_refused_with_the_reason(home):
    model = pair_with(home)
    with pytest.raises(ValueError, match=r"load_adapter: a pair has two models.*model\.slm\.load_adapter"):
        model.load_adapter(str(home / "slm-lora"))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"slm: expected an adapter in the layers .*got PROMPT_TUNING"):
        pair_with(home, slm=peft.get_peft_model(AutoModelForCausalLM.from_pretrained(home / "slm"), prompt))
    with pytest.raises(ValueError, match=r"slm_adapter_name_or_path: expected the name of a model"):
        pair_with(home, slm=model.slm, slm_adapter_name_or_path=home / "slm-lora")
    with pytest.raises(ValueError, match=r"slm, slm_adapter_name_or_path: both name an adapter"):
        pair_with(home, slm_adapter_name_or_path=home / "slm-lora")
    with pytest.raises(ValueError, match=r"slm: the adapter .*llm-lora does not fit .*slm: "):
        pair_with(home, slm=home / "slm", slm_adapter_name_or_path=home / "llm-lora")
    with_adapter(home / "slm", 3).save_pretrained(home / "other")
    both = peft.PeftModel.from_pretrained(model.slm, home / "other", adapter_name="other")
    both.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"slm: expected one active adapter, got \['default', 'other'\]"):
        model.save_pretrained(home / "router")
    both.base_model.set_adapter("default")
    for module in model.slm.modules():
        if hasattr(module, "merge"):
            module.merge()
    with pytest.raises(ValueError, match=r"merged into its weights. Call unmerge_adapter"):
        model.save_pretrained(home / "router", save_base_models=True)


def test_without_peft_it_says_what_to_install(home, monkeypatch):
    pair_with(home).save_pretrained(home / "router")
    monkeypatch.setattr("citer_hf.model.adapters.is_peft_available", lambda: False)
    for make in (lambda: load(home / "router"), lambda: pair_with(home)):
        with pytest.raises(ImportError, match=r"slm: the adapter .*slm-lora needs PEFT.*pip install peft"):
            make()


@pytest.fixture
def router(home: Path) -> Path:
    """A router that holds its models and its adapter."""
    pair_with(home).save_pretrained(home / "router", save_base_models=True)
    return home / "router"


def test_an_adapter_beside_a_base_model_that_the_router_does_not_name_is_not_loaded(router, no_weights, home):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (router / "llm" / name).write_bytes((home / "llm-lora" / name).read_bytes())
    with pytest.raises(ValueError, match=r"llm: .*holds an adapter that this router was not saved with"):
        load(router)


def test_weights_of_an_adapter_are_read_from_safetensors_only(router, no_weights):
    file = router / "slm_adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), router / "slm_adapter" / "adapter_model.bin")
    file.unlink()
    with pytest.raises(OSError, match=r"no adapter_model.safetensors; adapters are loaded from safetensors only"):
        load(router)


def test_the_base_model_that_a_saved_adapter_names_is_not_followed(router, home):
    expected = logits(load(router), 0)
    other = {"base_model_name_or_path": str(home / "llm"), "revision": "no-such"}
    change(router / "slm_adapter", "adapter_config.json", **other)
    assert torch.equal(logits(load(router), 0), expected)
