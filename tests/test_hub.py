"""Routers on a Hub: pushed and loaded by the unmodified client, in processes of their own, against a local server."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from citer_hf.hub import ALL_FACTS
from tests.hub_server import Hub, running_hub
from tests.repositories import WITHOUT_THE_PACKAGE, save_base_models

TOKEN, WRONG_TOKEN = "hf_GoodSecret0123456789", "hf_WrongSecret0123456789"

PRELUDE = """
import json, logging, os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, pipeline
import citer_hf
from citer_hf import CiterForCausalLM

said = {}
IDS = torch.tensor([list(range(5, 17))])
TOKEN, WRONG = os.environ.get("GOOD"), os.environ.get("WRONG")

def text(model, **options):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, **options).tolist()

def error(call, kind=OSError):
    try:
        call()
    except kind as caught:
        return f"{type(caught).__name__}: {caught}"
    raise AssertionError("nothing was raised")
"""


@dataclass
class Client:
    """Runs scripts in processes of their own, which know the Hub by its address only."""

    hub: Hub
    folder: Path
    output: str = ""

    def run(self, code: str, home: str = "home", prelude: str = PRELUDE, **environment: str) -> dict:
        """What a script leaves in `said`; its home is where the cache is."""
        script = self.folder / "script.py"
        script.write_text(prelude + textwrap.dedent(code) + "\nprint('SAID' + json.dumps(said))\n")
        here = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        here |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.folder / home), "OMP_NUM_THREADS": "1"}
        here |= {"GOOD": TOKEN, "WRONG": WRONG_TOKEN, "PYTHONPATH": str(Path(__file__).parents[1])}
        here |= {"HF_HUB_DISABLE_XET": "1", **environment}
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=here, cwd=self.folder)
        output = done.stdout + done.stderr
        self.output += output
        assert done.returncode == 0, output
        return json.loads(done.stdout.rpartition("SAID")[2])


PUSH = """
    from huggingface_hub import HfApi

    logging.getLogger("citer_hf").setLevel(logging.DEBUG)
    api = HfApi(token=TOKEN)
    for role in ("slm", "llm"):
        api.create_repo(f"me/{role}", private=role == "llm")
        api.upload_folder(repo_id=f"me/{role}", folder_path=role)
    pair = CiterForCausalLM.from_pair("me/slm", "me/llm", router="mlp", router_threshold=0.5, token=TOKEN)
    said["references"] = [pair.config.slm_reference, pair.config.llm_reference]
    said["commit"] = pair.push_to_hub("me/router", token=TOKEN)
    said["first"] = text(pair)
    torch.manual_seed(1)
    for parameter in pair.router.parameters():
        torch.nn.init.normal_(parameter)
    pair.config.router_threshold = 0.25
    pair.save_pretrained("router")
    said["proposed"] = pair.push_to_hub("me/router", token=TOKEN, create_pr=True)
    os.environ["HF_TOKEN"] = TOKEN
    from typer.testing import CliRunner
    from citer_hf.cli import app
    result = CliRunner().invoke(app, ["push", "router", "me/router"])
    said["command"] = [result.exit_code, result.output]
    said["second"] = text(pair)
    pair.save_pretrained("held", push_to_hub=True, repo_id="me/held", save_base_models=True, private=True)
    said["local"] = error(lambda: CiterForCausalLM.from_pair("slm", "llm").push_to_hub("me/local"), ValueError)
    said["option"] = error(lambda: pair.push_to_hub("me/router", privat=True), TypeError)
    said["not mine"] = error(lambda: pair.push_to_hub("you/router"))
    said["wrong token"] = error(lambda: pair.push_to_hub("me/router", token=WRONG))
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Scripts that know a Hub, in a folder with the base models."""
    with running_hub({TOKEN: "me"}) as hub:
        folder = tmp_path_factory.mktemp("hub")
        save_base_models(folder)
        yield Client(hub, folder)


@pytest.fixture(scope="module")
def pushed(client: Client) -> dict:
    """What was said while a router and its base models were pushed, twice."""
    return client.run(PUSH)


def head_of(client: Client, name: str) -> str:
    return client.hub.repositories[name].branches["main"]


def files(client: Client, name: str) -> dict[str, bytes]:
    return client.hub.repositories[name].commits[head_of(client, name)]


def uploaded(client: Client, name: str) -> str:
    """The first commit with files."""
    return list(client.hub.repositories[name].commits)[1]


def test_a_router_repository_holds_all_that_it_needs_and_pushing_answers_with_its_address(client, pushed):
    found = files(client, "me/router")
    assert found.keys() >= {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "citer/modeling.py", "citer/configuration.py"),
    }
    references = [{"name_or_path": f"me/{role}", "revision": head_of(client, f"me/{role}")} for role in ("slm", "llm")]
    config = json.loads(found["config.json"])
    assert [config["slm_reference"], config["llm_reference"]] == references == pushed["references"]
    card = found["README.md"].decode()
    assert "base_model:\n- me/slm\n- me/llm\n" in card and 'name = "me/router"' in card
    assert pushed["commit"].startswith(f"{client.hub.endpoint}/me/router/commit/")
    assert pushed["proposed"] == f"{client.hub.endpoint}/me/router/discussions/1"
    assert pushed["command"][0] == 0 and "/me/router/commit/" in pushed["command"][1]
    assert client.hub.repositories["me/held"].private and not client.hub.repositories["me/router"].private
    assert {"slm/model.safetensors", "llm/model.safetensors"} <= files(client, "me/held").keys()


def test_what_cannot_be_pushed_is_said(pushed):
    assert "refers to the directory" in pushed["local"] and "save_base_models=True" in pushed["local"]
    assert "privat" in pushed["option"]
    for name in ("not mine", "wrong token"):
        assert "Nothing on this machine was lost" in pushed[name] and "hf auth login" in pushed[name]


CARRY = """
    from huggingface_hub import HfApi

    from citer_hf.hub import ALL_FACTS
    from citer_hf.runs import router_sha256
    from tests.test_card import put, results

    api = HfApi(token=TOKEN)
    pair = CiterForCausalLM.from_pair("me/slm", "me/llm", router="mlp", token=TOKEN)
    pair.push_to_hub("me/measured", token=TOKEN)
    sha256 = router_sha256(pair.router)
    facts = {"results": results({"citer": sha256}), "provenance": {"router_sha256": sha256, "objective": "citer"}}
    put(Path("facts"), **facts)
    for name in ("curve.png", "results.md"):
        Path("facts", name).write_bytes(name.encode())
    api.upload_folder(repo_id="me/measured", folder_path="facts")
    card = Path(api.hf_hub_download("me/measured", "README.md", local_dir="card"))
    card.write_text(card.read_text().replace("---\\n", "---\\nlicense: mit\\n", 1))
    api.upload_file(repo_id="me/measured", path_or_fileobj=card, path_in_repo="README.md")

    model = CiterForCausalLM.from_pretrained("me/measured", token=TOKEN)
    model.push_to_hub("me/copy", token=TOKEN, tags=["maths"], commit_message="Copied", revision="side")
    model.push_to_hub("me/whole", token=TOKEN, save_base_models=True)
    model.save_pretrained("measured", save_base_models=True)
    # Without results beside it, the same router leaves those on the Hub.
    pair.push_to_hub("me/measured", token=TOKEN)
    torch.nn.init.normal_(model.router.score.weight)
    model.push_to_hub("me/copy", token=TOKEN, revision="side")
    CiterForCausalLM.from_pair("me/slm", "me/llm", token=TOKEN).push_to_hub("me/whole", token=TOKEN)
"""


@pytest.fixture(scope="module")
def carried(client: Client, pushed: dict) -> Hub:
    """The Hub after what tells of a router was pushed with it, and after another router took its place."""
    client.run(CARRY)
    return client.hub


def history(hub: Hub, name: str) -> list[dict[str, str]]:
    """The small files after each commit."""
    commits = hub.repositories[name].commits.values()
    return [{path: content.decode(errors="replace") for path, content in files.items()} for files in commits]


def test_what_tells_of_a_router_is_pushed_with_it_and_stays_beside_the_same_router(carried):
    for name in ("me/copy", "me/whole"):
        found = history(carried, name)[1]
        assert found.keys() >= {*ALL_FACTS, "model.safetensors"}
        assert "license: mit" in found["README.md"] and "88.0%" in found["README.md"]
    assert "- maths" in history(carried, "me/copy")[1]["README.md"]
    assert set(carried.repositories["me/copy"].branches) == {"main", "side"}
    assert len(history(carried, "me/measured")) == 5
    found = history(carried, "me/measured")[-1]
    assert found.keys() >= set(ALL_FACTS) and "license: mit" in found["README.md"]
    assert "88.0%" in found["README.md"] and "(curve.png)" in found["README.md"]


def test_nothing_is_left_of_a_router_that_another_one_replaces(carried, client):
    for name in ("me/copy", "me/whole"):
        found = history(carried, name)[-1]
        assert not set(ALL_FACTS) & found.keys()
        assert "license: mit" in found["README.md"] and "88.0%" not in found["README.md"]
    assert not [path for path in found if path.endswith(".safetensors")], "the base models' and the router's weights"
    assert "Left out: provenance.json" in client.output and "me/measured" in client.output


LOAD = """
    from citer_hf.runs import base_models

    commits = json.loads(os.environ["COMMITS"])
    torch.manual_seed(3)
    model = CiterForCausalLM.from_pretrained("me/router", token=TOKEN)
    said["first"], said["second"] = [], [text(model)]
    said["second"].append(text(AutoModelForCausalLM.from_pretrained("me/router", token=TOKEN)))
    old = CiterForCausalLM.from_pretrained("me/router", revision=commits[0], token=TOKEN)
    said["first"].append(text(old))
    said["second"].append(text(CiterForCausalLM.from_pretrained("me/router", revision="refs/pr/1", token=TOKEN)))
    held = AutoModelForCausalLM.from_pretrained("me/held", token=TOKEN)
    said["second"].append(text(held))
    held.save_pretrained("again")
    held.save_pretrained("whole", save_base_models=True)
    CiterForCausalLM.from_pretrained("whole", llm_name_or_path="me/llm", llm_revision="same", token=TOKEN)\
        .save_pretrained("moved", save_base_models=True)
    CiterForCausalLM.from_pretrained("whole", llm_name_or_path=os.path.abspath("llm")).save_pretrained("local", True)
    configs = {name: json.loads(Path(name, "config.json").read_text()) for name in ("whole", "moved", "local")}
    said["origins"] = {name: config["llm_reference"] for name, config in configs.items()}
    said["again"] = json.loads(Path("again/config.json").read_text())["llm_reference"]
    pipe = pipeline("text-generation", model="me/router", token=TOKEN)
    said["pipeline"] = pipe("w5 w6 w7", max_new_tokens=5)[0]["generated_text"]
    tokens = pipe.model.generate(**pipe.tokenizer("w5 w6 w7", return_tensors="pt"), max_new_tokens=5)[0]
    said["by the model"] = "w5 w6 w7" + pipe.tokenizer.decode(tokens[3:])
    options = {"llm_revision": json.loads(os.environ["LLM"]), "token": TOKEN}
    said["wrapped"] = text(CiterForCausalLM.from_pair("me/slm", "me/llm", router="me/router", **options))
    said["overridden"] = text(CiterForCausalLM.from_pretrained("me/router", llm_revision="same", token=TOKEN))
    moved = CiterForCausalLM.from_pretrained("me/router", revision=commits[0], llm_revision="same", token=TOKEN)
    held = CiterForCausalLM.from_pretrained("me/held", token=TOKEN)
    loaded = CiterForCausalLM.from_pair(model.slm, "me/llm", router=model.router, llm_revision="same", token=TOKEN)
    said["given"] = loaded.config.slm_reference
    runs = [base_models(pair) for pair in (model, moved, held, loaded)]
    said["commits"] = [[run[role]["commit"] for role in ("slm", "llm")] for run in runs]
    load = CiterForCausalLM.from_pretrained
    said["errors"] = {
        "wrong token": error(lambda: load("me/held", token=WRONG, force_download=True)),
        "private base": error(lambda: load("me/router", token=False, force_download=True)),
        "sizes": error(lambda: load("me/router", llm_revision="main", token=TOKEN), ValueError),
        "missing": error(lambda: load("me/nothing", token=TOKEN)),
        "revision": error(lambda: load("me/router", revision="no-such", token=TOKEN)),
    }
    os.environ["HF_TOKEN"] = TOKEN
    from typer.testing import CliRunner
    from citer_hf.cli import app
    said["chat"] = CliRunner().invoke(app, ["chat", "me/router", "--revision", commits[0]], input="/exit\\n").stdout
"""


@pytest.fixture(scope="module")
def loaded(client: Client, pushed: dict) -> dict:
    """What was said while what was pushed was loaded, in a process with an empty cache."""
    # The LLM has moved on since the router was saved.
    repository, llm = client.hub.repositories["me/llm"], uploaded(client, "me/llm")
    before = repository.commits[llm]
    for branch, layers in (("same", 2), ("main", 3)):
        config = {**json.loads(before["config.json"]), "num_hidden_layers": layers}
        repository.commit(branch, {**before, "config.json": json.dumps(config).encode()})
    commits = list(client.hub.repositories["me/router"].commits)[1:]
    return client.run(LOAD, home="other", COMMITS=json.dumps(commits), LLM=json.dumps(llm))


def test_a_router_is_loaded_by_id_in_every_way(pushed, loaded):
    assert pushed["first"] != pushed["second"]
    assert loaded["first"] == [pushed["first"]]
    assert loaded["second"] == [pushed["second"]] * 4
    assert loaded["wrapped"] == loaded["overridden"] == pushed["second"]
    assert loaded["pipeline"] == loaded["by the model"] and "Threshold 0.5." in loaded["chat"]


def test_a_pair_saved_again_says_where_its_models_are_or_came_from(client, loaded):
    assert loaded["again"] == {"name_or_path": "me/held", "subfolder": "llm", "revision": head_of(client, "me/held")}
    llm = client.hub.repositories["me/llm"]
    first = {"subfolder": "llm", "origin": "me/llm", "origin_revision": uploaded(client, "me/llm")}
    same = {**first, "origin_revision": llm.branches["same"]}
    # What was loaded from another directory may be anything.
    assert loaded["origins"] == {"whole": first, "moved": same, "local": {"subfolder": "llm"}}
    # A model that was loaded before the pair was made.
    assert loaded["given"] == {"name_or_path": "me/slm", "revision": head_of(client, "me/slm")}
    held = files(client, "me/held")
    assert json.loads(held["config.json"])["llm_reference"] == first
    assert "base_model:\n- me/slm\n- me/llm\n" in held["README.md"].decode()


def test_provenance_names_the_commits_of_what_was_loaded(client, loaded):
    held, slm = (head_of(client, f"me/{name}") for name in ("held", "slm"))
    same = client.hub.repositories["me/llm"].branches["same"]
    assert loaded["commits"] == [[slm, uploaded(client, "me/llm")], [slm, same], [held, held], [None, same]]


def test_errors_of_the_hub_name_what_and_what_to_do(loaded):
    errors = loaded["errors"]
    assert "me/held" in errors["wrong token"]
    assert "llm: the LLM could not be loaded from me/llm" in errors["private base"]
    assert "num_hidden_layers is 3, but was 2" in errors["sizes"]
    assert "me/nothing" in errors["missing"] and "no-such" in errors["revision"]


SPACE = """
    from citer_hf.hub import push

    CiterForCausalLM.from_pair("me/slm", "me/llm", token=TOKEN).save_pretrained("shown")
    options = {"token": TOKEN, "space": "me/page"}
    said["addresses"] = push("shown", "me/shown", private=True, **options).splitlines()
    push("shown", "me/shown", **options)
    said["branch"] = error(lambda: push("shown", "me/shown", create_pr=True, **options), ValueError)
    said["not mine"] = error(lambda: push("shown", "me/shown", token=TOKEN, space="you/page"))
"""
PROGRAM = """
    import gradio as gr
    from huggingface_hub import SpaceCard

    gr.Blocks.launch = lambda page, **options: said.update(launched=[page.title, options["server_name"]])
    exec(Path("space/app.py").read_text())
    said["card"] = SpaceCard.load("space/README.md").data.to_dict()
"""


def test_a_space_shows_a_pushed_router(client, pushed):
    said = client.run(SPACE)
    assert said["addresses"][1].startswith(f"{client.hub.endpoint}/spaces/me/page/commit/")
    assert "main branch" in said["branch"] and "you/page failed" in said["not mine"]
    repository = client.hub.repositories["spaces/me/page"]
    assert len(repository.commits) == 3 and repository.private and client.hub.repositories["me/shown"].private
    written = files(client, "spaces/me/page")
    assert written.keys() == {".gitattributes", "app.py", "requirements.txt", "README.md"}
    assert written["requirements.txt"] == b"citer-hf[playground]==0.1.*\ntorch\n"
    (client.folder / "space").mkdir()
    for name in ("app.py", "README.md"):
        (client.folder / "space" / name).write_bytes(written[name])
    said = client.run(PROGRAM, HF_TOKEN=TOKEN)
    assert said["launched"] == ["citer playground", "0.0.0.0"]
    assert said["card"].items() >= {"sdk": "gradio", "app_file": "app.py", "models": ["me/shown"]}.items()


LABELS = """
    from datasets import load_dataset
    from typer.testing import CliRunner

    from citer_hf import DEMO_PAIR, label_preferences, train
    from citer_hf.cli import app
    from citer_hf.demo.demo import export
    from citer_hf.hub import push

    export(Path("problems.jsonl"), problems=8)
    os.environ["HF_TOKEN"] = TOKEN
    model = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    label_preferences(model, "problems.jsonl", "exact", "labels", max_new_tokens=12, router_threshold=0)
    called = CliRunner().invoke(app, "push labels me/labels --dataset --tag maths".split())
    said["command"] = [called.exit_code, called.stdout]
    first = [load_dataset("me/labels", name).num_rows["train"] for name in (None, "questions")]
    made = train(model, "me/labels", "trained", objective="acceptance", learning_rates=(1e-2,), epochs=1)
    said["rows"], said["labels"] = first, made["labels"]
    said["errors"] = [
        error(lambda: push("labels", "me/x"), ValueError),
        error(lambda: push("trained", "me/x", dataset=True), ValueError),
        error(lambda: train(model, "me/nothing", "x")),
        error(lambda: train(model, "me/labels", "x", labels_revision="no-such")),
    ]
    card = Path("labels/README.md")
    card.write_text(card.read_text().replace("---\\n", "---\\nlicense: mit\\n", 1))
    push("labels", "me/labels", dataset=True)
    pinned = {"labels_revision": made["labels"]["commit"], "objective": "acceptance"}
    made = train(model, "me/labels", "of-pinned", epochs=1, **pinned)
    said["pinned"] = made["labels"]["commit"]
"""


def test_labels_are_a_data_set_from_which_a_router_is_trained(client):
    said = client.run(LABELS, home="labels")
    repository = client.hub.repositories["datasets/me/labels"]
    first = uploaded(client, "datasets/me/labels")
    assert said["command"] == [0, f"{client.hub.endpoint}/datasets/me/labels/commit/{first}\n"]
    assert said["rows"] == [said["labels"]["counts"]["tokens"], 8]
    assert (said["labels"]["name"], said["labels"]["commit"], said["pinned"]) == ("me/labels", first, first)
    assert set(repository.commits[first]) - {".gitattributes"} == {
        *("README.md", "labels.json", "data/train.parquet", "questions/train.parquet")
    }
    card, again = repository.commits[first]["README.md"].decode(), files(client, "datasets/me/labels")["README.md"]
    assert 'load_dataset("me/labels", split' in card and "--labels me/labels" in card and "- maths\n" in card
    assert b"license: mit" in again and b"- maths\n" in again and len(repository.commits) == 3
    expected = ("Add --dataset to push labels", "holds no labels", "me/nothing is no directory here", "no-such")
    assert all(part in message for part, message in zip(expected, said["errors"], strict=True))


EXAMPLE = r"""
import json, os, re
from huggingface_hub import ModelCard

said = {}
card = ModelCard.load("me/router")
said["base_model"] = card.data.base_model
exec(re.search(r"```python\n(.*?)```", card.text, re.S)[1])
said["module"], said["text"] = type(model).__module__, tokenizer.decode(output.sequences[0])
"""


@pytest.mark.slow
def test_the_example_of_the_card_runs_where_the_package_is_not_installed(client, loaded):
    said = client.run(EXAMPLE, prelude=WITHOUT_THE_PACKAGE, home="fourth", HF_TOKEN=TOKEN)
    assert said["module"].startswith("transformers_modules.") and said["text"]
    assert said["base_model"] == ["me/slm", "me/llm"]


def assert_no_token_is_kept(client: Client) -> None:
    """In no output, no file and no repository."""
    found = {"output": client.output.encode()}
    found |= {str(file): file.read_bytes() for file in client.folder.rglob("*") if file.is_file()}
    for name in client.hub.repositories:
        found |= {f"{name}: {path}": content for path, content in files(client, name).items()}
    for secret in (TOKEN, WRONG_TOKEN):
        assert not [name for name, content in found.items() if secret.encode() in content]
