"""What a router's files cannot do: lead elsewhere, run code of base models; and a token is written nowhere."""

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from citer_hf import CiterForCausalLM
from citer_hf.runs import anonymous
from tests.chat_pairs import invoke
from tests.repositories import TEXT, change, logits, save_base_models
from tests.test_hub import TOKEN, assert_no_token_is_kept, client  # noqa: F401 - `client` is a fixture

load = CiterForCausalLM.from_pretrained


@pytest.fixture
def router(tmp_path: Path) -> Path:
    """A router with weights that holds its base models."""
    save_base_models(tmp_path)
    pair = CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm", router="linear")
    pair.save_pretrained(tmp_path / "router", save_base_models=True)
    return tmp_path / "router"


@pytest.mark.parametrize(
    "reference",
    [
        *({"subfolder": folder} for folder in ("slm/../../slm", "/etc", "C:\\slm", ["slm"])),
        {"name_or_path": "../slm"},
        {"name_or_path": "team/slm", "gguf_file": "/etc/passwd"},
        {"name_or_path": "team/slm", "revision": "../../refs"},
        "slm",
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_reference_that_leads_out_of_the_repository_is_not_followed(router, no_weights, reference, adapter):
    change(router, slm_reference={"subfolder": "slm", "adapter": reference} if adapter else reference)
    with pytest.raises(ValueError, match=r"slm(_adapter)?_reference: .*expected"):
        load(router)


@pytest.fixture
def cached(router: Path, tmp_path: Path) -> Path:
    """The snapshot in the cache of a Hub that holds the router as `me/router`, its files linked to blobs."""
    blobs = shutil.copytree(router, tmp_path / "cache" / "models--me--router" / "blobs")
    snapshot = blobs.parent / "snapshots" / ("c" * 40)
    shutil.copytree(blobs, snapshot, copy_function=lambda blob, link: os.symlink(blob, link))
    (blobs.parent / "refs").mkdir()
    (blobs.parent / "refs" / "main").write_text("c" * 40)
    return snapshot


def test_a_router_from_the_hub_refers_to_no_directory_of_this_machine(cached, no_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team" / "slm").mkdir(parents=True)
    for name in (str(tmp_path / "slm"), "slm", "team/slm", "a/b/c", "~/slm", ""):
        change(cached, slm_reference={"name_or_path": name})
        with pytest.raises(ValueError, match=r"slm_reference: .*expected the id of a repository on the Hub"):
            load("me/router", cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_snapshot_of_the_hubs_cache_is_a_directory_like_any_other(cached, router, tmp_path):
    expected = logits(load(router))
    assert torch.equal(logits(load(cached)), expected)
    assert torch.equal(logits(load("me/router", cache_dir=tmp_path / "cache", local_files_only=True)), expected)


@pytest.mark.parametrize("part", ["router", "slm", "llm"])
def test_a_file_that_is_cut_short_or_claims_more_than_it_holds_is_refused(router, part):
    file = router / ("" if part == "router" else part) / "model.safetensors"
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], struct.pack("<Q", 1 << 62) + content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(OSError, match=rf"(?is){part}: the {part} could not be loaded from .*cut short"):
            load(router)


def test_weights_are_read_from_safetensors_only(router):
    torch.save(load_file(router / "model.safetensors"), router / "pytorch_model.bin")
    (router / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"named model.safetensors"):
        load(router)


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
    loaded = load(untrusted, llm_trust_remote_code=True)
    assert type(loaded.llm).__name__ == "OwnForCausalLM" and own_code.exists()
    assert loaded(TEXT, router_threshold=2.0).logits.isfinite().all()


@pytest.mark.parametrize("command", ["chat", "bench", "label", "evaluate"])
def test_trust_in_a_router_on_the_command_line_is_none_in_its_models(own_code, untrusted, tmp_path, command):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "w5", "answer": "w6", "response": "w6"}))
    more = ("--data", data, "--checker", "exact", "--out", tmp_path / "out") * (command in ("label", "evaluate"))
    result = invoke(command, untrusted, *more, "--trust-remote-code")
    assert result.exit_code == 1 and re.search(REFUSED, result.stderr), result.output
    assert not own_code.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["slm", "llm"])
def test_code_of_a_base_models_tokenizer_does_not_run(own_code, tmp_path, role):
    change(tmp_path / "llm", model_type="llama", auto_map={})
    CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm").save_pretrained(tmp_path / "router")
    (tmp_path / role / "own.py").write_text(CODE)
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    change(tmp_path / role, "tokenizer_config.json", **own)
    for options in ({}, {"trust_remote_code": True}):
        load(tmp_path / "router", **options)
        pipeline("text-generation", model=str(tmp_path / "router"), **options)
    assert not own_code.exists()


# A router's whole life, with everything said that can be said.
LIFE = """
    import pickle, traceback
    from huggingface_hub import HfApi
    from citer_hf.evaluation.evaluate import evaluate
    from citer_hf.data.examples import read_examples

    logging.basicConfig(level=logging.DEBUG)
    for name in ("citer_hf", "transformers", "huggingface_hub", "httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.DEBUG)

    api = HfApi(token=TOKEN)
    for role in ("slm", "llm"):
        api.create_repo(f"me/{role}", private=True)
        api.upload_folder(repo_id=f"me/{role}", folder_path=role)
    pair = CiterForCausalLM.from_pair("me/slm", "me/llm", router="mlp", token=TOKEN)
    pair.save_pretrained("router", push_to_hub=True, repo_id="me/router", private=True, token=TOKEN)
    pair = CiterForCausalLM.from_pretrained("me/router", token=TOKEN)
    pipeline("text-generation", model="me/router", token=TOKEN)("w5 w6", max_new_tokens=3)
    rows = [{"prompt": f"w{n} w6", "answer": "w"} for n in (5, 7)]
    evaluate(pair, read_examples(rows), "exact", shares=(0.5,), max_new_tokens=3, out=Path("out"))
    pair.save_pretrained("again", save_base_models=True)
    pickle.dump(pair, open("pair.pickle", "wb"))
    said["kept"] = [one._repository[1] for one in (pair, pickle.load(open("pair.pickle", "rb")))]
    said["tokenizer"] = pair.load_tokenizer() is not None
    print(vars(pair), pair, pair.config, vars(pair.config), pair.generation_config)

    load = CiterForCausalLM.from_pretrained
    calls = [
        lambda: load("me/router", token=WRONG, force_download=True),
        lambda: load("me/router", token=TOKEN, llm_name_or_path="me/nothing"),
        lambda: load("me/router", token=TOKEN, llm_token=WRONG, force_download=True),
        lambda: load("me/router", token=TOKEN, no_such_keyword=1),
        lambda: CiterForCausalLM.from_pair("me/slm", "me/llm", router="me/nothing", token=TOKEN),
        lambda: pair.push_to_hub("you/router", token=TOKEN),
        lambda: pair.push_to_hub("me/router", token=TOKEN, no_such_keyword=1),
    ]
    said["not raised"] = len(calls)
    for call in calls:
        try:
            call()
        except Exception as caught:
            said["not raised"] -= 1
            traceback.print_exc()
            print(repr(caught), caught.args)
"""


def test_a_token_is_nowhere(client):  # noqa: F811
    said = client.run(LIFE)
    assert said["not raised"] == 0 and said["tokenizer"]
    assert not any("token" in kept for kept in said["kept"])
    assert "DEBUG:" in client.output
    assert_no_token_is_kept(client)


def test_a_token_within_a_text_is_not_published():
    text = "hf_ is how they start; citer_hf_settings is none, hf_0123456789abcdef is"
    assert anonymous([text]) == [text.replace("hf_0123456789abcdef", "hf_...")]
    nested = {"token": TOKEN, "data": f"http://me:{TOKEN}@hub/data", "list": [f"--token={TOKEN}"]}
    assert anonymous(nested) == {"token": "hf_...", "data": "http://me:hf_...@hub/data", "list": ["--token=hf_..."]}
