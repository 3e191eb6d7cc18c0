"""`import citer_hf`: what it brings along, what it registers, and what the core may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import citer_hf

PACKAGE = Path(citer_hf.__file__).parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_it_imports_nothing_beyond_torch_and_transformers():
    code = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
before = {name.split('.')[0] for name in sys.modules}
import citer_hf
print(sorted({name.split('.')[0] for name in sys.modules} - before))
"""
    assert run(code).strip() == "['citer_hf']"


def test_it_registers_the_auto_classes():
    code = """
import citer_hf
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("citer")
print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)
"""
    assert run(code).split() == ["CiterConfig", "CiterForCausalLM"]


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("model/*.py")), ids=lambda file: file.stem)
def test_the_core_imports_only_torch_transformers_and_itself(file):
    allowed = {"torch", "transformers", "accelerate", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 and (PACKAGE / "model" / f"{node.module}.py").is_file()
            else:
                assert node.module.split(".")[0] in allowed


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig"])
def test_a_model_that_keeps_its_state_elsewhere_is_refused_when_the_pair_is_made(name):
    from tests.families import tiny_model

    other = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(vocab_size=61, hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(ValueError, match="keeps no keys and values in a `cache`"):
        citer_hf.CiterForCausalLM.from_pair(tiny_model("llama"), other)
