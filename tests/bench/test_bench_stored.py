"""Bits of weights: read from configurations as they are published, and held against what a quantized model stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from citer_hf.bench.costs import cost_of_config, cost_of_model
from citer_hf.bench.projections import simulate_command, table
from citer_hf.bench.stored import is_skipped, weights_of_config
from citer_hf.cli import app
from tests.families import tiny_config, tiny_model

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "symmetric": True}
MATRICES = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def compressed(*weights: dict[str, Any], targets: str = "Linear") -> dict[str, Any]:
    groups = {f"group_{index}": {"weights": one, "targets": [targets]} for index, one in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + (16 + 4) / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 4 + (16 + 4) / 32),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 64}, 2 + (16 + 2) / 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4.127),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 8),
        ({"load_in_8bit": True}, 8),
        (BitsAndBytesConfig(load_in_4bit=True), 4.5),
        (FP8, 8 + 32 / 128**2),
        ({"quant_method": "fp8", "weight_block_size": None}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, 4.25),
        (compressed(INT4), 4 + 16 / 128),
        (compressed({**INT4, "symmetric": False}), 4 + (16 + 4) / 128),
        (compressed(NVFP4), 4.5),
        (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}), 8),
    ],
)
def test_a_quantization_counts_with_its_scales(quantization: Any, bits: float):
    stored = weights_of_config(tiny_config("llama", quantization_config=quantization, dtype="bfloat16"))
    assert stored.bits == pytest.approx(bits, abs=1e-4)
    assert stored.other_bits == 16


@pytest.mark.parametrize(
    ("dtype", "bits", "source"),
    [
        ("float32", 32, "float32 in its config"),
        (torch.bfloat16, 16, "bfloat16 in its config"),
        (None, 16, "its config names no dtype"),
    ],
)
def test_without_a_quantization_the_dtype_counts(dtype: Any, bits: float, source: str):
    stored = weights_of_config(tiny_config("llama", dtype=dtype))
    assert (stored.bits, stored.other_bits, stored.source) == (bits, bits, source)


def test_what_the_user_gives_counts_first():
    config = tiny_config("llama", quantization_config={"quant_method": "hqq"}, dtype="float32")
    assert (weights_of_config(config, 8).bits, weights_of_config(config, 8).other_bits) == (8, 16)
    assert weights_of_config(config, 32).other_bits == 32


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "hqq"},
        {"bits": 4},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "gptq", "bits": 0},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*mlp.*": {"bits": 8}}},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        compressed(INT4, {**INT4, "num_bits": 8}),
        compressed(INT4, targets="re:.*mlp.*"),
        compressed(),
    ],
)
def test_a_quantization_that_is_not_known_is_not_guessed(quantization: dict[str, Any]):
    method = quantization.get("quant_method", "of an unnamed method")
    with pytest.raises(ValueError, match=rf"^llm_bits: .* not known here, {method} .* give llm_bits\.$"):
        weights_of_config(tiny_config("llama", quantization_config=quantization), argument="llm_bits")


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("model.layers.1", True),
        ("model.layers.1.mlp", True),
        ("model.layers.11", False),
        ("model.layers.*.mlp", True),
        ("gate_proj", True),
        ("gate", False),
        ("re:.*gate_proj$", True),
        ("*gate", False),
    ],
)
def test_modules_are_named_as_transformers_names_them(pattern: str, skipped: bool):
    assert is_skipped("model.layers.1.mlp.gate_proj", [pattern]) is skipped
    assert not is_skipped("model.layers.1.mlp.gate_proj", [])


def test_modules_that_are_not_converted_keep_their_bits():
    config = tiny_config("llama")
    part = cost_of_config(config, bits=8, skipped=["model.layers.0", "down_proj"])
    whole, all_of_it = cost_of_config(config), cost_of_config(config, bits=8)
    model = tiny_model("llama")
    kept = [*(getattr(model.model.layers[0].self_attn, name) for name in MATRICES[:4])]
    kept += [*(getattr(model.model.layers[0].mlp, name) for name in MATRICES[4:])]
    kept += [layer.mlp.down_proj for layer in model.model.layers[1:]]
    assert part.weight_bytes - all_of_it.weight_bytes == sum(module.weight.numel() for module in kept)
    assert all_of_it.weight_bytes < part.weight_bytes < whole.weight_bytes


def test_what_is_not_quantized_has_the_bits_of_the_dtype():
    config = tiny_config("llama")
    half, full = (cost_of_config(config, bits=4, other_bits=bits) for bits in (16, 32))
    matrices = half.active_parameters - half.head_parameters
    assert half.weight_bytes - matrices / 2 == (full.weight_bytes - matrices / 2) / 2


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantized_model_stores_what_its_configuration_says(tmp_path: Path, nested: bool):
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 256, "intermediate_size": 512}
    tiny_model("llama", **shape).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested)
    options = {"quantization_config": quantization, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    stored = weights_of_config(model.config)
    expected = cost_of_config(model.config, stored.bits, stored.other_bits, stored.other_bits, stored.skipped)
    assert cost_of_model(model).weight_bytes == pytest.approx(expected.weight_bytes, rel=0.015)


def pair_of(tmp_path: Path, **llm: Any) -> list[str]:
    files = []
    for name, config in (("slm", tiny_config("llama", dtype="float32")), ("llm", tiny_config("llama", **llm))):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config.to_dict(), default=str))
        files.append(str(file))
    return files


def test_a_projection_takes_the_bits_from_the_configurations_and_says_so(tmp_path: Path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    files = pair_of(tmp_path, hidden_size=512, quantization_config=awq, dtype="float16")
    machine = {"bandwidth_gb_s": 1.0, "shares": [0.2], "context": 100, "overhead": 0.0}
    taken = simulate_command(*files, **machine)[0]
    same = simulate_command(*files, **machine, slm_bits=32, llm_bits=4 + 20 / 128)[0]
    assert (taken.slm_step_s, taken.llm_step_s) == (same.slm_step_s, same.llm_step_s)
    assert (taken.bytes_per_gpu, taken.llm_bits) == (same.bytes_per_gpu, same.llm_bits)
    assert (taken.slm_bits, taken.slm_bits_from) == (32, "float32 in its config")
    text = table([taken])
    assert "Bits per weight of the SLM: 32 (float32 in its config)." in text
    assert "Bits per weight of the LLM: 4.156 (awq in its config, other weights 16)." in text
    assert "Bits per weight of the SLM: 32 (as given)." in table([same])
    assert same.llm_step_s < simulate_command(*files, **machine, llm_bits=16)[0].llm_step_s


def test_keys_and_values_have_the_bits_of_the_dtype(tmp_path: Path):
    (full,) = simulate_command(*pair_of(tmp_path, dtype="float32"), bandwidth_gb_s=1.0, shares=[0.2], context=100)
    (half,) = simulate_command(*pair_of(tmp_path, dtype="bfloat16"), bandwidth_gb_s=1.0, shares=[0.2], context=100)
    assert full.llm_step_s - 1e-3 == pytest.approx(2 * (half.llm_step_s - 1e-3))


def test_a_command_that_meets_an_unknown_quantization_says_what_to_give(tmp_path: Path):
    slm, llm = pair_of(tmp_path, quantization_config={"quant_method": "hqq"})
    command = ["bench", "--simulate", "--slm", slm, "--llm", llm, "--gpu", "h100"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --llm-bits: the configuration has a quantization")
    assert result.stderr.strip().endswith("and give --llm-bits.")
    assert CliRunner().invoke(app, [*command, "--llm-bits", "4.5"]).exit_code == 0
