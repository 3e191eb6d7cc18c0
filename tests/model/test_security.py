"""What a router's files cannot do: lead elsewhere, run code of base models, take memory that they only claim."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from citer_hf import CiterForCausalLM
from tests.chat_pairs import invoke
from tests.repositories import save_base_models

load = CiterForCausalLM.from_pretrained


@pytest.fixture
def router(tmp_path: Path) -> Path:
    """A router with weights that holds its base models."""
    save_base_models(tmp_path)
    pair = CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm", router="linear")
    pair.save_pretrained(tmp_path / "router", save_base_models=True)
    return tmp_path / "router"


def change(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which the weights of a base model are read."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded weights"))


@pytest.mark.parametrize(
    "reference",
    [
        {"subfolder": "../slm"},
        {"subfolder": "slm/../../slm"},
        {"subfolder": "/etc"},
        {"subfolder": "..\\slm"},
        {"subfolder": "C:\\slm"},
        {"name_or_path": "../slm"},
        {"name_or_path": "team/slm", "subfolder": "../x"},
        {"name_or_path": "team/slm", "gguf_file": "/etc/passwd"},
        {"name_or_path": "team/slm", "revision": "../../refs"},
        {"subfolder": ["slm"]},
        "slm",
    ],
    ids=str,
)
def test_a_reference_that_leads_out_of_the_repository_is_not_followed(router, nothing_is_read, reference):
    change(router, slm_reference=reference)
    with pytest.raises(ValueError, match=r"slm_reference: .*expected"):
        load(router)


@pytest.fixture
def cached(router: Path, tmp_path: Path) -> Path:
    """The cache of a Hub that holds the router as `me/router`, its files linked to blobs."""
    commit, repository = "c" * 40, tmp_path / "cache" / "models--me--router"
    for number, file in enumerate(file for file in router.rglob("*") if file.is_file()):
        link = repository / "snapshots" / commit / file.relative_to(router)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "cache"


def test_a_router_from_the_hub_refers_to_no_directory_of_this_machine(cached, nothing_is_read, tmp_path, monkeypatch):
    snapshot = cached / "models--me--router" / "snapshots" / ("c" * 40)
    config = json.loads((snapshot / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team" / "slm").mkdir(parents=True)
    for name in (str(tmp_path / "slm"), "slm", "team/slm", "a/b/c", "~/slm", ""):
        changed = config | {"slm_reference": {"name_or_path": name}}
        (snapshot / "config.json").unlink(missing_ok=True)
        (snapshot / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"slm_reference: .*expected the id of a repository on the Hub"):
            load("me/router", cache_dir=cached, local_files_only=True)


def test_a_snapshot_of_the_hubs_cache_is_a_directory_like_any_other(cached, router):
    snapshot = cached / "models--me--router" / "snapshots" / ("c" * 40)
    text = torch.arange(5, 12)[None]
    expected = load(router)(text).logits
    assert torch.equal(load(snapshot)(text).logits, expected)
    assert torch.equal(load("me/router", cache_dir=cached, local_files_only=True)(text).logits, expected)


def test_saving_writes_nothing_through_a_link(router, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (router / "config.json").unlink()
    (router / "config.json").symlink_to(tmp_path / "mine")
    CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm").save_pretrained(router)
    assert (tmp_path / "mine").read_text() == "mine" and not (router / "config.json").is_symlink()


# ---- files that claim more than they hold ----


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content


def claiming(shape: list[int], size: int) -> bytes:
    tensors = {"router.score.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    content = json.dumps(tensors).encode()
    return header(len(content), content) + bytes(128)


@pytest.mark.parametrize(
    "content",
    [
        header(1 << 62),
        header(200 << 20, b"{" + b" " * 1000),
        claiming([1 << 40, 1 << 20], 1 << 62),
        claiming([1 << 40], 128),
        b"",
    ],
    ids=["header of 4 EiB", "cut header", "huge shape", "shape and size differ", "empty"],
)
def test_a_file_that_claims_more_than_it_holds_is_refused(router, nothing_is_read, content):
    (router / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=r"router: the router could not be loaded from"):
        load(router)


@pytest.mark.parametrize("content", [header(1 << 62), claiming([1 << 40], 128)])
@pytest.mark.parametrize("role", ["slm", "llm"])
def test_weights_of_a_base_model_that_claim_more_than_they_hold_are_refused(router, role, content):
    (router / role / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=rf"{role}: the {role.upper()} could not be loaded from"):
        load(router)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size"])
def test_a_base_model_that_claims_to_be_huge_takes_no_memory(router, name):
    # Both say it, so that they agree; the weights do not.
    config = json.loads((router / "config.json").read_text())
    change(router, llm_config=config["llm_config"] | {name: 1 << 44})
    change(router / "llm", **{name: 1 << 44})
    with pytest.raises((ValueError, RuntimeError, OSError), match=r"size|shape"):
        load(router)


@pytest.mark.parametrize("name", ["top_logprobs", "hidden_size"])
def test_a_router_that_claims_to_be_huge_takes_no_memory(router, nothing_is_read, name):
    change(router, router={"type": "mlp", name: 1 << 44})
    with pytest.raises(ValueError, match=r"do not fit its router|hidden size"):
        load(router)


def test_weights_are_read_from_safetensors_only(router):
    tensors = load_file(router / "model.safetensors")
    (router / "model.safetensors").unlink()
    torch.save(tensors, router / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"named model.safetensors"):
        load(router)
    save_file(tensors, router / "model.safetensors", metadata={"format": "pt"})
    load(router)


# ---- code of base models ----

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

open(os.environ["RAN"], "a").write("ran\\n")

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that tells whether the code of the LLM's own class, beside its weights, has run."""
    save_base_models(tmp_path)
    (tmp_path / "llm" / "own.py").write_text(CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(tmp_path / "llm", model_type="own-llama", auto_map=auto_map)
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture(params=[False, True], ids=["referring", "holding"])
def untrusted(own_code: Path, tmp_path: Path, request: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A router whose LLM has code of its own, as in a new process: nothing of that code is known."""
    pair = CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm", llm_trust_remote_code=True)
    assert type(pair.llm).__name__ == "OwnForCausalLM" and own_code.exists()
    pair.save_pretrained(tmp_path / "router", save_base_models=request.param)
    own_code.unlink()
    for name in [name for name in sys.modules if name.endswith(".own")]:
        monkeypatch.delitem(sys.modules, name)
    mapping = AutoModelForCausalLM._model_mapping
    others = {key: value for key, value in mapping._extra_content.items() if key.__name__ != "OwnConfig"}
    monkeypatch.setattr(mapping, "_extra_content", others)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    return tmp_path / "router"


REFUSED = r"llm: .* brings code of its own.*llm_trust_remote_code=True"
WAYS: dict[str, Callable[..., Any]] = {
    "from_pretrained": load,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "pipeline": lambda path, **options: pipeline("text-generation", model=str(path), **options),
}


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"slm_trust_remote_code": True}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_code_of_a_base_model_does_not_run_unless_it_is_trusted_by_name(own_code, untrusted, way, options):
    if way == "pipeline" and "slm_trust_remote_code" in options:
        options = {"model_kwargs": options}
    with pytest.raises(ValueError, match=REFUSED):
        WAYS[way](untrusted, **options)
    assert not own_code.exists()


def test_code_of_a_base_model_runs_when_it_is_trusted_by_name(own_code, untrusted):
    text = torch.arange(5, 12)[None]
    loaded = load(untrusted, llm_trust_remote_code=True)
    assert type(loaded.llm).__name__ == "OwnForCausalLM" and own_code.exists()
    assert loaded(text, router_threshold=2.0).logits.isfinite().all()


def test_trust_in_a_router_loads_no_code_of_its_models_for_configuration_or_tokenizer(own_code, untrusted):
    assert AutoConfig.from_pretrained(untrusted, trust_remote_code=True).model_type == "citer"
    assert len(AutoTokenizer.from_pretrained(untrusted, trust_remote_code=True)) > 0
    assert not own_code.exists()


COMMANDS = [
    ("chat", "{router}"),
    ("bench", "{router}"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_trust_in_a_router_on_the_command_line_is_none_in_its_models(own_code, untrusted, tmp_path, command):
    arguments = [one.format(router=untrusted, out=tmp_path / "out") for one in command]
    result = invoke(*arguments, "--trust-remote-code")
    assert result.exit_code == 1 and re.search(REFUSED, result.stderr), result.output
    assert not own_code.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["slm", "llm"])
def test_code_of_a_base_models_tokenizer_does_not_run(own_code, tmp_path, role):
    change(tmp_path / "llm", model_type="llama", auto_map={})
    CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm").save_pretrained(tmp_path / "router")
    (tmp_path / role / "own.py").write_text(CODE)
    file = tmp_path / role / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    for options in ({}, {"trust_remote_code": True}):
        load(tmp_path / "router", **options)
        pipeline("text-generation", model=str(tmp_path / "router"), **options)
    assert not own_code.exists()
