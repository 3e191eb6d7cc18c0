"""CiterConfig: what it keeps, and what it refuses."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from citer_hf import CiterConfig, CiterForCausalLM
from tests.families import FAMILIES, tiny_config


def test_it_can_be_built_with_no_arguments():
    assert CiterConfig().vocab_size == LlamaConfig().vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_it_round_trips_through_json(family, tmp_path):
    config = CiterConfig(
        slm_config=tiny_config(family),
        llm_config=tiny_config("llama"),
        router={"type": "mlp", "batch_norm": True},
        router_threshold=0.73,
        slm_reference={"name_or_path": "user/small", "revision": "a" * 40},
        llm_reference={"name_or_path": "user/large", "revision": "b" * 40},
    )
    config.save_pretrained(tmp_path)
    for loaded in (CiterConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CiterConfig
        assert type(loaded.slm_config) is type(config.slm_config)
        loaded.name_or_path = ""
        assert loaded.to_dict() == config.to_dict()


def test_sub_configurations_may_be_dictionaries():
    config = CiterConfig(
        slm_config=Qwen2Config(vocab_size=50).to_dict(), llm_config=LlamaConfig(vocab_size=60).to_dict()
    )
    assert isinstance(config.slm_config, Qwen2Config)
    assert config.vocab_size == 50


@pytest.mark.parametrize("version", [1, 99])
def test_settings_of_a_newer_version_are_ignored_with_one_warning(tmp_path, version):
    CiterConfig(router_threshold=0.3).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "citer_version": version, "new_a": 1, "new_b": {}}))
    with pytest.warns(UserWarning, match=r"\['new_a', 'new_b'\] are unknown here and ignored") as caught:
        config = AutoConfig.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert not hasattr(config, "new_a") and config.router_threshold == 0.3


def test_settings_that_are_known_bring_no_warning(tmp_path, recwarn):
    CiterConfig().save_pretrained(tmp_path)
    CiterConfig.from_pretrained(tmp_path)
    assert not recwarn.list


def test_building_one_leaves_loaded_configurations_as_they_are():
    slm, llm = tiny_config("llama"), tiny_config("qwen2")
    slm._attn_implementation = llm._attn_implementation = "eager"
    CiterConfig(slm_config=slm, llm_config=llm)
    assert slm._attn_implementation == llm._attn_implementation == "eager"


def test_an_attention_implementation_that_is_asked_for_reaches_both():
    config = CiterConfig(slm_config=tiny_config("llama"), llm_config=tiny_config("qwen2"), attn_implementation="eager")
    model = CiterForCausalLM(config)
    assert model.slm.config._attn_implementation == model.llm.config._attn_implementation == "eager"


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "half", None])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match="router_threshold: expected a number from 0"):
        CiterConfig(router_threshold=threshold)


@pytest.mark.parametrize("router", [{"hidden_size": 3}, {"type": 3}])
def test_a_router_without_a_type_is_refused(router):
    with pytest.raises(ValueError, match="router: expected a kind"):
        CiterConfig(router=router)


def test_the_configuration_of_another_model_is_refused(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    for load in (CiterConfig.from_pretrained, CiterForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"expected a CITER router repository .* got model_type 'llama'"):
            load(tmp_path)


def test_the_context_is_the_shorter_of_the_two():
    config = CiterConfig(
        slm_config=tiny_config("llama", max_position_embeddings=100),
        llm_config=tiny_config("gpt2", max_position_embeddings=64),
    )
    assert config.max_position_embeddings == 64
