"""Adapters of PEFT on a base model: every way to give one, saving by reference and inside."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from citer_hf import CiterForCausalLM
from tests.adapters import (
    OLD_NAME,
    ROLES,
    TEXT,
    TRANSFORMERS_LOADS,
    bare_logits,
    logits,
    pair_with,
    peft,
    save_models_with_adapters,
    with_adapter,
)
from tests.conftest import left_padded, random_prompts
from tests.families import tiny_model
from tests.reference import naive_generate
from tests.repositories import save_base_models

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


# ---- running ----


@pytest.mark.parametrize("way", CASES)
def test_an_adapter_given_in_any_way_writes_as_merged_weights_do(home, way):
    model = pair_with(home, **WAYS[way](home))
    if way == "afterwards":
        peft.PeftModel.from_pretrained(model.slm, home / "slm-lora")
    merged = with_adapter(home / "slm").merge_and_unload()
    naive = SimpleNamespace(slm=merged, llm=model.llm, router=model.router, config=model.config)
    rows = random_prompts((5, 9, 12))
    threshold = float(model(**left_padded(rows)).router_scores.detach().median())
    texts = []
    for row in rows:
        text, to_llm, scores, expected = naive_generate(naive, row, 8, threshold, eos=(2, 5))
        out = model.generate(
            torch.tensor([row]),
            router_threshold=threshold,
            max_new_tokens=8,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert out.sequences[0, len(row) :].tolist() == text
        assert torch.allclose(torch.cat(out.logits), expected, atol=1e-4)
        routing = out.past_key_values.routing
        assert routing.to_llm[0].tolist() == to_llm
        assert routing.scores[0].tolist() == pytest.approx(scores, abs=1e-5)
        texts.append(text)
    width = max(map(len, rows))
    batch = model.generate(**left_padded(rows), router_threshold=threshold, max_new_tokens=8)[:, width:]
    for row, text in zip(batch.tolist(), texts, strict=True):
        assert row[: len(text)] == text and not any(row[len(text) :])


def test_threshold_zero_is_the_adapted_model_itself(home):
    adapted, bare = with_adapter(home / "slm"), AutoModelForCausalLM.from_pretrained(home / "slm")
    model = pair_with(home)
    expected = adapted.generate(input_ids=TEXT, max_new_tokens=8)
    assert torch.equal(model.generate(TEXT, router_threshold=0, max_new_tokens=8), expected)
    assert not torch.equal(bare.generate(TEXT, max_new_tokens=8), expected)
    assert torch.equal(logits(model, 0), bare_logits(adapted))


def test_an_adapter_on_the_llm_works_alike(home):
    model = CiterForCausalLM.from_pair(home / "slm", home / "llm-lora", router="confidence")
    model.save_pretrained(home / "router")
    adapted = with_adapter(home / "llm", 1)
    for pair in (model, load(home / "router")):
        assert torch.equal(logits(pair, 2), bare_logits(adapted))
        assert torch.equal(logits(pair, 0), bare_logits(AutoModelForCausalLM.from_pretrained(home / "slm")))


@pytest.mark.parametrize("options", ON_THE_HEAD)
@pytest.mark.parametrize("afterwards", [False, True])
def test_an_adapter_on_the_head_does_not_hide_the_state_that_the_router_reads(home, options, afterwards):
    model = pair_with(home, slm=home / "slm" if afterwards else with_adapter(home / "slm", **options))
    if afterwards:
        with_adapter(model.slm, **options)
    with torch.no_grad():
        for name, parameter in model.slm.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.01)
    ids = TEXT[0].tolist()
    text, _, scores, _ = naive_generate(model, ids, 6, 0.5, eos=(2, 5))
    out = model.generate(TEXT, router_threshold=0.5, max_new_tokens=6, return_dict_in_generate=True)
    assert out.sequences[0, len(ids) :].tolist() == text
    assert out.past_key_values.routing.scores[0].tolist() == pytest.approx(scores, abs=1e-5)
    for holds in (False, True):
        model.save_pretrained(home / "router", save_base_models=holds)
        assert torch.equal(logits(load(home / "router"), 0), logits(model, 0))
    bare = AutoModelForCausalLM.from_pretrained(home / "slm").state_dict()
    kept = AutoModelForCausalLM.from_pretrained(home / "router" / "slm").state_dict()
    assert all(torch.equal(bare[key], kept[key]) for key in bare)


@pytest.mark.parametrize("options", ON_THE_HEAD)
def test_tied_embeddings_stay_tied_under_an_adapter(home, options):
    tiny_model("llama", seed=1, tie_word_embeddings=True).save_pretrained(home / "tied")
    adapted = with_adapter(home / "tied", **options)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    expected = bare_logits(adapted)
    model = pair_with(home, slm=adapted)
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
    assert torch.equal(logits(model, 0), bare_logits(other))
    model.slm.disable_adapters()
    bare = bare_logits(AutoModelForCausalLM.from_pretrained(home / "slm"))
    assert torch.equal(logits(model, 0), bare)
    model.save_pretrained(home / "without")
    assert torch.equal(logits(load(home / "without"), 0), bare)
    model.slm.enable_adapters()
    model.save_pretrained(home / "with other")
    assert torch.equal(logits(load(home / "with other"), 0), bare_logits(other))
    model.slm.set_adapter("default")
    model.save_pretrained(home / "first")
    assert torch.equal(logits(load(home / "first"), 0), first)


# ---- saving ----


def references(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {role: config[f"{role}_reference"] for role in ROLES}


@pytest.mark.parametrize("way", CASES)
@pytest.mark.parametrize("holds", [False, True])
def test_a_saved_router_gives_the_same_with_its_adapter(home, way, holds):
    model = pair_with(home, **WAYS[way](home))
    if way == "afterwards":
        with_adapter(model.slm)
    model.save_pretrained(home / "router", save_base_models=holds)
    said = references(home / "router")["slm"]
    inside = {"subfolder": "slm_adapter"}
    by_name = {"name_or_path": str(home / "slm-lora")}
    assert said["adapter"] == (by_name if way in ("path", "both names") and not holds else inside)
    assert {key: said[key] for key in said if key != "adapter"} == (
        {"subfolder": "slm"} if holds else {"name_or_path": str(home / "slm")}
    )
    if holds:
        for folder in ("slm", "llm", "slm-lora"):
            (home / folder).rename(home / f"{folder} was")
        bare, kept = (
            load_file(home / "slm was" / "model.safetensors"),
            load_file(home / "router/slm/model.safetensors"),
        )
        assert bare.keys() == kept.keys() and all(torch.equal(bare[key], kept[key]) for key in bare)
    again = load(home / "router")
    again.save_pretrained(home / "again")
    for pair in (again, AutoModelForCausalLM.from_pretrained(home / "router"), load(home / "again")):
        for threshold in (0, 0.5, 2):
            assert torch.equal(logits(pair, threshold), logits(model, threshold))
    assert (references(home / "again")["slm"]["adapter"] == by_name) == (said["adapter"] == by_name)


def test_an_adapter_trained_in_the_pair_is_saved_with_it(home):
    model = pair_with(home)
    for name, parameter in model.slm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.slm(TEXT, labels=TEXT).loss.backward()
    with torch.no_grad():
        for parameter in model.slm.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    model.save_pretrained(home / "router")
    assert references(home / "router")["slm"]["adapter"] == {"subfolder": "slm_adapter"}
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
    assert torch.equal(full, bare_logits(with_adapter(tmp_path / "slm"))) and not torch.equal(full, logits(model, 0))
    with pytest.raises(ValueError, match=r"slm: LlamaForCausalLM cannot be saved as it is loaded"):
        model.save_pretrained(tmp_path / "held", save_base_models=True)


def test_models_that_have_no_name_are_saved_with_their_adapters(home):
    slm, llm = (
        AutoModelForCausalLM.from_config(copy.deepcopy(AutoModelForCausalLM.from_pretrained(home / role).config))
        for role in ROLES
    )
    for model in (slm, llm):
        model.config._name_or_path = model.name_or_path = ""
    pair = CiterForCausalLM.from_pair(with_adapter(slm), with_adapter(llm, 1), router="linear")
    pair.save_pretrained(home / "router")
    assert references(home / "router") == {
        role: {"subfolder": role, "adapter": {"subfolder": f"{role}_adapter"}} for role in ROLES
    }
    again = load(home / "router")
    assert all(torch.equal(logits(again, threshold), logits(pair, threshold)) for threshold in (0, 0.5, 2))
    # PEFT itself reads what was saved.
    own = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(home / "router/slm"), home / "router/slm_adapter"
    )
    assert torch.equal(bare_logits(own), logits(pair, 0))


def test_models_and_adapters_that_have_moved_are_found_by_their_new_names(home):
    model = pair_with(home)
    model.save_pretrained(home / "router")
    for name in ("slm", "slm-lora"):
        (home / name).rename(home / f"{name}-new")
    with pytest.raises(OSError, match=r"slm_adapter: there is no directory .*slm_adapter_name_or_path=\.\.\."):
        load(home / "router", slm_name_or_path=home / "slm-new")
    new = {"slm_name_or_path": home / "slm-new", "slm_adapter_name_or_path": home / "slm-lora-new"}
    assert torch.equal(logits(load(home / "router", **new), 0), logits(model, 0))


def test_a_router_is_trained_on_an_adapted_model(home):
    pytest.importorskip("pyarrow")

    from citer_hf.training.label import label_preferences
    from citer_hf.training.train import train
    from tests.chat_pairs import character_tokenizer
    from tests.training_data import has_letter, task

    for role in ROLES:
        character_tokenizer().save_pretrained(home / role)
    model = pair_with(home)
    label_preferences(model, task(), has_letter, home / "labels")
    settings = {"learning_rates": (1e-2,), "epochs": 2, "batch_size": 64, "patience": 1}
    before = {key: value.clone() for key, value in model.slm.state_dict().items()}
    train(model, home / "labels", out=home / "trained", **settings)
    assert all(torch.equal(before[key], value) for key, value in model.slm.state_dict().items())
    assert references(home / "trained")["slm"]["adapter"] == {"name_or_path": str(home / "slm-lora")}
    trained = load(home / "trained")
    assert trained.config.router["type"] == "mlp"
    assert torch.equal(logits(trained, 0), bare_logits(with_adapter(home / "slm")))


# ---- on the pair as a whole ----


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
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(pair, adapter\)"):
        AutoModelForCausalLM.from_pretrained(home / "whole")


def test_an_adapter_on_the_pair_over_one_of_the_slm_is_not_taken_for_the_slms(home):
    pair = pair_with(home)
    with_adapter(pair, target_modules=r"slm\..*\.(q_proj|v_proj)")
    with pytest.raises(ValueError, match=r"slm: an adapter was attached to the pair as a whole"):
        pair.save_pretrained(home / "router")
    assert not (home / "router").exists()
