"""Adapters on a Hub: each repository at its own commit, with its own revision, in processes of their own."""

import json
from collections.abc import Iterator

import pytest

from tests.adapters import OLD_NAME, with_adapter
from tests.hub_server import running_hub
from tests.repositories import WITHOUT_THE_PACKAGE, change, save_base_models
from tests.test_hub import PRELUDE, TOKEN, Client, files, head_of

pytestmark = OLD_NAME

PUSH = """
    from huggingface_hub import HfApi

    api = HfApi(token=TOKEN)
    for name in ("slm", "llm", "lora", "astray"):
        api.create_repo(f"me/{name}", private=name == "lora")
        api.upload_folder(repo_id=f"me/{name}", folder_path=name)
    # A branch that the adapter has, and its model has not.
    api.create_branch("me/lora", branch="better")
    api.upload_folder(repo_id="me/lora", folder_path="better", revision="better")
    pair = CiterForCausalLM.from_pair("me/lora", "me/llm", router="linear", token=TOKEN)
    said["references"] = pair.config.slm_reference
    said["text"] = text(pair, router_threshold=0)
    pair.push_to_hub("me/router", token=TOKEN)
    pair.push_to_hub("me/held", token=TOKEN, save_base_models=True)
    better = CiterForCausalLM.from_pair("me/lora", "me/llm", slm_revision="better", token=TOKEN)
    said["better"] = [text(better, router_threshold=0)]
    names = {"slm_adapter_name_or_path": "me/lora", "slm_adapter_revision": "better"}
    apart = CiterForCausalLM.from_pair("me/slm", "me/llm", token=TOKEN, **names)
    said["better"].append(text(apart, router_threshold=0))
    better.push_to_hub("me/better", token=TOKEN)
    local = CiterForCausalLM.from_pair("me/slm", "me/llm", token=TOKEN, slm_adapter_name_or_path="lora")
    said["local"] = error(lambda: local.push_to_hub("me/local", token=TOKEN), ValueError)
    said["astray"] = error(lambda: CiterForCausalLM.from_pair("me/astray", "me/llm", token=TOKEN), ValueError)
"""
LOAD = """
    load = AutoModelForCausalLM.from_pretrained
    for name in ("router", "held", "better"):
        options = {"token": TOKEN, "trust_remote_code": True}
        said[name] = text(load(f"me/{name}", **options), router_threshold=0)
    said["private"] = error(lambda: load("me/router", token=False, force_download=True, trust_remote_code=True))
"""
OFFLINE = """
    load = AutoModelForCausalLM.from_pretrained
    offline = [load(f"me/{name}", trust_remote_code=True) for name in ("router", "held")]
    said["offline"] = [text(model, router_threshold=0) for model in offline]
    said["missing"] = error(lambda: load("me/never-seen", trust_remote_code=True))
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_hub({TOKEN: "me"}) as hub:
        folder = tmp_path_factory.mktemp("hub")
        save_base_models(folder)
        for seed, name in enumerate(("lora", "better", "astray")):
            with_adapter(folder / "slm", seed).save_pretrained(folder / name)
            base = str(folder / "slm") if name == "astray" else "me/slm"
            change(folder / name, "adapter_config.json", base_model_name_or_path=base)
            # PEFT's card of an adapter says where its model lay.
            (folder / name / "README.md").unlink()
        yield Client(hub, folder)


@pytest.fixture(scope="module")
def pushed(client: Client) -> dict:
    """What was said while routers on adapted models were pushed."""
    return client.run(PUSH)


@pytest.fixture(scope="module")
def loaded(client: Client, pushed: dict) -> dict:
    """What was said while they were loaded with an empty cache, where `citer_hf` is not installed."""
    prelude = WITHOUT_THE_PACKAGE + "".join(line for line in PRELUDE.splitlines(True) if "citer_hf" not in line)
    said = client.run(LOAD, home="other", prelude=prelude)
    before = len(client.hub.requests)
    said |= client.run(OFFLINE, home="other", prelude=prelude, HF_HUB_OFFLINE="1")
    return said | {"requests offline": len(client.hub.requests) - before}


def test_a_router_refers_to_the_commits_of_the_adapter_and_of_its_model(client, pushed):
    adapter = {"name_or_path": "me/lora", "revision": head_of(client, "me/lora")}
    expected = {"name_or_path": "me/slm", "revision": head_of(client, "me/slm"), "adapter": adapter}
    found = files(client, "me/router")
    assert json.loads(found["config.json"])["slm_reference"] == expected
    card = found["README.md"].decode()
    assert "base_model:\n- me/slm\n- me/lora\n- me/llm\n" in card
    assert "| SLM | [me/slm](" in card and "with the adapter [me/lora](https://huggingface.co/me/lora) at `" in card
    other = json.loads(files(client, "me/better")["config.json"])["slm_reference"]["adapter"]
    assert other == adapter | {"revision": client.hub.repositories["me/lora"].branches["better"]}


def test_an_adapter_is_loaded_by_id_with_its_own_revision(pushed, loaded):
    assert [loaded["router"], loaded["held"]] == loaded["offline"] == [pushed["text"]] * 2
    assert pushed["better"] == [loaded["better"]] * 2 and loaded["better"] != loaded["router"]


def test_an_adapter_is_pushed_with_base_models_that_are(client, pushed):
    found = files(client, "me/held")
    assert found.keys() >= {"slm/model.safetensors", "slm_adapter/adapter_model.safetensors"}
    assert json.loads(found["slm_adapter/adapter_config.json"])["base_model_name_or_path"] is None


def test_errors_name_the_adapter_and_what_to_do(client, pushed, loaded):
    assert "slm: the router refers to the directory" in pushed["local"] and "lora" in pushed["local"]
    assert "slm: the adapter me/astray says that it is for the model" in pushed["astray"]
    assert "slm_adapter_name_or_path='me/astray'" in pushed["astray"]
    assert "slm_adapter: the SLM's adapter could not be loaded from me/lora" in loaded["private"]
    assert loaded["missing"].startswith("OSError") and loaded["requests offline"] == 0
    assert TOKEN not in client.output
