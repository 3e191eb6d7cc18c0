"""A router repository where `citer_hf` is not installed: the code that lies beside the weights."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from citer_hf import CiterForCausalLM
from tests.conftest import random_prompts
from tests.repositories import WITHOUT_THE_PACKAGE, change, save_base_models, word_tokenizer

TEXT = random_prompts((12,))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A router that refers to its base models, one that holds them, and a pair in one file."""
    root = tmp_path_factory.mktemp("repositories")
    save_base_models(root)
    torch.manual_seed(0)
    model = CiterForCausalLM.from_pair(root / "slm", root / "llm", router="mlp", router_threshold=0.5)
    model.save_pretrained(root / "referring")
    model.save_pretrained(root / "holding", save_base_models=True)
    model.config.slm_reference = model.config.llm_reference = None
    CiterForCausalLM(model.config, slm=model.slm, llm=model.llm, router=model.router).save_pretrained(root / "whole")
    word_tokenizer().save_pretrained(root / "whole")
    shutil.copytree(root / "referring", root / "earlier")
    move_code_to_the_root(root / "earlier")
    return root


def move_code_to_the_root(folder: Path) -> None:
    """Make a repository one as earlier versions saved it: its code in the root, in files named `*_citer.py`."""
    for file in (folder / "citer").glob("*.py"):
        code = re.sub(r"from \.(\w+) import", r"from .\1_citer import", file.read_text())
        (folder / f"{file.stem}_citer.py").write_text(code)
    shutil.rmtree(folder / "citer")
    model = {"AutoModelForCausalLM": "modeling_citer.CiterForCausalLM"}
    change(folder, auto_map={"AutoConfig": "configuration_citer.CiterConfig", **model})


SAME_TEXT_WITHOUT_THE_PACKAGE = """
    import json, os, shutil, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    ids = torch.tensor(json.loads(sys.argv[1]))
    texts = []
    for path in sys.argv[2:]:
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        texts.append(model.generate(ids, max_new_tokens=9, do_sample=False).tolist())
        texts.append(model.generate(ids, max_new_tokens=9, router_threshold=2.0).tolist())
        pipe = pipeline("text-generation", model=path, trust_remote_code=True)
        texts.append(pipe("w5 w6 w7", max_new_tokens=5)[0]["generated_text"])
        if os.path.basename(path) == "earlier":
            continue
        # Saved elsewhere, and over itself: the code is in its folder again, and nowhere else.
        for name, copied in (("again", False), ("over", True)):
            shutil.rmtree(name, ignore_errors=True)
            if copied:
                shutil.copytree(path, name)
            model.save_pretrained(name)
            config = json.load(open(os.path.join(name, "config.json")))
            assert config["auto_map"]["AutoConfig"] == "citer/configuration.CiterConfig", config["auto_map"]
            assert not [file for file in os.listdir(name) if file.endswith(".py")], os.listdir(name)
            assert "modeling.py" in os.listdir(os.path.join(name, "citer"))
        again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
        texts.append(again.generate(ids, max_new_tokens=9, do_sample=False).tolist())
        assert type(again).__module__.startswith("transformers_modules.") and "citer_hf" not in sys.modules
    print(json.dumps(texts))
"""


def expected_texts(path: Path) -> list:
    from transformers import pipeline

    model, ids = CiterForCausalLM.from_pretrained(path), torch.tensor(TEXT)
    return [
        model.generate(ids, max_new_tokens=9, do_sample=False).tolist(),
        model.generate(ids, max_new_tokens=9, router_threshold=2.0).tolist(),
        pipeline("text-generation", model=str(path))("w5 w6 w7", max_new_tokens=5)[0]["generated_text"],
    ]


def test_a_router_writes_the_same_where_the_package_is_not_installed(repositories, tmp_path):
    paths = [str(repositories / name) for name in ("referring", "holding", "whole", "earlier")]
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_THE_PACKAGE + textwrap.dedent(SAME_TEXT_WITHOUT_THE_PACKAGE))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), json.dumps(TEXT), *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    once = expected_texts(repositories / "referring")
    assert json.loads(done.stdout) == [*once, once[0]] * 3 + once


def test_a_repository_of_an_earlier_version_loads_and_is_saved_anew(repositories, tmp_path):
    shutil.copytree(repositories / "earlier", tmp_path / "earlier")
    (tmp_path / "earlier" / "mine.py").write_text("mine")
    assert expected_texts(tmp_path / "earlier") == expected_texts(repositories / "referring")
    CiterForCausalLM.from_pretrained(tmp_path / "earlier").save_pretrained(tmp_path / "earlier")
    assert [file.name for file in (tmp_path / "earlier").glob("*.py")] == ["mine.py"]
    assert expected_texts(tmp_path / "earlier") == expected_texts(repositories / "referring")
