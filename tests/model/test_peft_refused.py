"""Adapters that cannot work, and what the files of a stranger's adapter cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from citer_hf import CiterForCausalLM
from tests.adapters import OLD_NAME, change, logits, pair_with, peft, save_models_with_adapters, with_adapter

pytestmark = OLD_NAME
load = CiterForCausalLM.from_pretrained


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return save_models_with_adapters(tmp_path)


def test_what_cannot_work_is_refused_with_the_reason(home):
    model = pair_with(home)
    with pytest.raises(ValueError, match=r"load_adapter: a pair has two models.*model\.slm\.load_adapter"):
        model.load_adapter(str(home / "slm-lora"))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"slm: PROMPT_TUNING puts its adapter before the prompt"):
        pair_with(home, slm=peft.get_peft_model(AutoModelForCausalLM.from_pretrained(home / "slm"), prompt))
    with pytest.raises(ValueError, match=r"slm_adapter_name_or_path: this model is loaded already"):
        pair_with(home, slm=model.slm, slm_adapter_name_or_path=home / "slm-lora")
    with pytest.raises(ValueError, match=r"slm, slm_adapter_name_or_path: both name an adapter"):
        pair_with(home, slm_adapter_name_or_path=home / "slm-lora")
    with pytest.raises(ValueError, match=r"slm: the adapter .*llm-lora does not fit LlamaForCausalLM"):
        pair_with(home, slm=home / "slm", slm_adapter_name_or_path=home / "llm-lora")
    with_adapter(home / "slm", 3).save_pretrained(home / "other")
    both = peft.PeftModel.from_pretrained(model.slm, home / "other", adapter_name="other")
    both.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"slm: it runs with several adapters, \['default', 'other'\]"):
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
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded weights"))


@pytest.fixture
def router(home: Path) -> Path:
    """A router that holds its models and its adapter."""
    pair_with(home).save_pretrained(home / "router", save_base_models=True)
    return home / "router"


@pytest.mark.parametrize(
    "reference",
    [
        {"subfolder": "../slm-lora"},
        {"name_or_path": "../slm-lora"},
        {"name_or_path": "a/b", "revision": "../x"},
        "a",
    ],
    ids=str,
)
def test_a_reference_to_an_adapter_that_leads_out_is_not_followed(router, nothing_is_read, reference):
    change(router, slm_reference={"subfolder": "slm", "adapter": reference})
    with pytest.raises(ValueError, match=r"slm_adapter_reference: .*expected"):
        load(router)


def test_an_adapter_beside_a_base_model_that_the_router_does_not_name_is_not_loaded(router, nothing_is_read, home):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (router / "llm" / name).write_bytes((home / "llm-lora" / name).read_bytes())
    with pytest.raises(ValueError, match=r"llm: .*holds an adapter that this router was not saved with"):
        load(router)


def test_weights_of_an_adapter_are_read_from_safetensors_only(router, nothing_is_read):
    file = router / "slm_adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), router / "slm_adapter" / "adapter_model.bin")
    file.unlink()
    with pytest.raises(OSError, match=r"no adapter_model.safetensors; adapters are loaded from safetensors only"):
        load(router)


def test_the_base_model_that_a_saved_adapter_names_is_not_followed(router, home):
    expected = logits(load(router), 0)
    change(
        router / "slm_adapter", "adapter_config.json", base_model_name_or_path=str(home / "llm"), revision="no-such"
    )
    assert torch.equal(logits(load(router), 0), expected)
