"""Bytes that a forward pass moves: counted from a configuration and from a model."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from citer_hf.costs import ModelCost, cost_of_config, cost_of_model
from citer_hf.model.compat import cache_argument
from tests.families import EVERY, FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("family", EVERY)
def test_a_configuration_costs_what_the_model_costs(family: str):
    model = tiny_model(family).to(torch.bfloat16)
    assert cost_of_config(tiny_config(family)) == cost_of_model(model)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
def test_keys_and_values_are_as_large_as_the_cache_that_the_model_fills(family: str):
    model = tiny_model(family)
    cost = cost_of_model(model)
    cache = DynamicCache(config=model.config)
    read(model, 1, cache)
    assert cost.kv_bytes_per_token == cache_bytes(cache)
    read(model, 19, cache)
    assert cost.kv_bytes_read(20) == cache_bytes(cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model_reads_all_weights_but_its_tables(family: str):
    model = tiny_model(family)
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables.pop(id(model.get_output_embeddings().weight), None)
    everything = sum(parameter.nbytes for parameter in model.parameters())
    cost = cost_of_model(model)
    assert cost.weight_bytes == everything - sum(table.nbytes for table in tables.values())
    assert cost.resident_bytes == everything


def test_of_experts_a_token_reads_those_that_it_visits():
    cost = cost_of_model(tiny_model("mixtral"))
    of_two = cost_of_model(tiny_model("mixtral", num_local_experts=2))
    router_rows = 2 * 2 * 32 * 4
    assert cost.weight_bytes == of_two.weight_bytes + router_rows
    assert cost.weight_bytes_read(1) == cost.weight_bytes
    # Half of four experts each: two tokens visit three of them on average, many tokens visit all.
    assert cost.weight_bytes_read(2) == cost.weight_bytes + cost.expert_bytes / 4
    assert cost.weight_bytes_read(100) == pytest.approx(cost.resident_bytes - 61 * 32 * 4)
    # A convolution is no expert: two layers of four experts, each with three matrices.
    assert cost_of_model(tiny_model("qwen3_next")).expert_bytes == 4 * 2 * 4 * 3 * 32 * 16


@pytest.mark.parametrize(("bits", "options"), [(8, {"load_in_8bit": True}), (4.5, {"load_in_4bit": True})])
def test_a_quantized_model_costs_what_it_stores(tmp_path: Any, bits: float, options: dict[str, Any]):
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 256, "intermediate_size": 512}
    tiny_model("llama", **shape).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    expected = cost_of_config(tiny_config("llama", **shape), bits=bits)
    cost = cost_of_model(model)
    # 8 bits: and one scale per output feature, which the nominal 8 leave out.
    assert cost.weight_bytes == pytest.approx(expected.weight_bytes, rel=0.015)
    assert cost.kv_bytes_per_token == expected.kv_bytes_per_token


def test_fewer_bits_leave_the_head_and_norms_at_sixteen():
    config = tiny_config("llama")
    whole, half = cost_of_config(config), cost_of_config(config, bits=8)
    decoder = tiny_model("llama").get_decoder()
    matrices = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear))
    assert whole.weight_bytes - half.weight_bytes == matrices


def test_a_configuration_that_was_given_is_left_as_it_was():
    config = tiny_config("llama")
    config._attn_implementation = "sdpa"
    before = config.to_dict()
    cost_of_config(config)
    assert config.to_dict() == before and config._attn_implementation == "sdpa"


def test_bytes_moved_are_the_weights_once_and_the_cache_of_each_sequence_up_to_a_window():
    cost = ModelCost(weight_bytes=1000, layers=((10, None),))
    assert cost.bytes_moved(sequences=2, tokens=3, context=20) == 1000 + 2 * (20 + 3) * 10
    cost = cost_of_config(tiny_config("mistral_sliding"))
    assert cost.bytes_moved(1, 1, 100) == cost.weight_bytes + (5 + 1) * cost.kv_bytes_per_token


def read(model: Any, tokens: int, cache: Any) -> None:
    model(torch.ones(1, tokens, dtype=torch.long), **cache_argument(model, cache), logits_to_keep=1)


def cache_bytes(cache: Any) -> int:
    layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
