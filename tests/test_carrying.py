"""What lies beside a router goes along when the pair is pushed, as long as it is of this router."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.carrying import FACTS, carry
from citer_hf.evaluation.provenance import module_fingerprint
from tests.repositories import save_base_models
from tests.test_belonging import OwnRouter, make_pair, root, save_results  # noqa: F401 - `root` is a fixture
from tests.test_hub import client, files  # noqa: F401 - `client` is a fixture

load = CiterForCausalLM.from_pretrained


def lay_down(directory: Path, router: torch.nn.Module, names: tuple[str, ...] = FACTS) -> None:
    """Put down what `citer train` and `citer evaluate` leave."""
    for name in names:
        (directory / name).write_bytes(name.encode())
    save_results(directory, {"citer": module_fingerprint(router)})
    (directory / "provenance.json").write_text(json.dumps({"router_sha256": module_fingerprint(router)}))
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")


def pushed_with(model: Any, folder: Path, **options: Any) -> set[str]:
    """The names of what goes along."""
    model.save_pretrained(folder, **options)
    before = set(folder.iterdir())
    card = carry(model, folder)
    return {file.name for file in set(folder.iterdir()) - before} | ({card.name} if card else set())


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("router", ["mlp", "confidence"])
def test_what_belongs_to_the_router_goes_along(root, tmp_path, router, holds):  # noqa: F811
    pair = make_pair(root, router)
    pair.save_pretrained(tmp_path / "router", save_base_models=holds)
    lay_down(tmp_path / "router", pair.router)
    model = load(tmp_path / "router", router_threshold=0.9)
    for number, copied in enumerate((False, True)):
        assert pushed_with(model, tmp_path / str(number), save_base_models=copied) == {*FACTS, "README.md"}
        for name in FACTS:
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "router" / name).read_bytes()


def test_a_router_of_a_class_of_its_own_is_known_by_its_module(root, tmp_path):  # noqa: F811
    make_pair(root, OwnRouter()).save_pretrained(tmp_path / "router")
    model = load(tmp_path / "router", router=OwnRouter())
    lay_down(tmp_path / "router", model.router)
    assert pushed_with(model, tmp_path / "new") == {*FACTS, "README.md"}
    lay_down(tmp_path / "router", torch.nn.Identity())
    assert pushed_with(model, tmp_path / "other") == {"README.md"}


def other_weights(model: Any, root: Path) -> None:  # noqa: F811
    with torch.no_grad():
        model.router.score.weight[0, 0] += 1e-3


def other_kind(model: Any, root: Path) -> None:  # noqa: F811
    pair = make_pair(root, {"type": "mlp", "top_logprobs": 2})
    model.router, model.config.router = pair.router, pair.config.router


@pytest.mark.parametrize("change", [other_weights, other_kind])
def test_what_is_of_the_router_that_was_loaded_stays_when_it_has_changed(
    root: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Any, Path], None],
):
    pair = make_pair(root)
    pair.save_pretrained(tmp_path / "router")
    lay_down(tmp_path / "router", pair.router)
    model = load(tmp_path / "router")
    change(model, root)
    assert pushed_with(model, tmp_path / "new") == set()
    assert all(name in caplog.text for name in FACTS) and str(tmp_path / "router") in caplog.text


def test_results_stay_when_another_base_model_is_pushed_in_place_of_the_measured_one(root, tmp_path):  # noqa: F811
    pair = make_pair(root)
    pair.save_pretrained(tmp_path / "router")
    lay_down(tmp_path / "router", pair.router)
    save_base_models(tmp_path / "elsewhere")
    model = load(tmp_path / "router", llm_name_or_path=str(tmp_path / "elsewhere" / "llm"))
    assert pushed_with(model, tmp_path / "referring") == {*FACTS, "README.md"}
    assert pushed_with(model, tmp_path / "holding", save_base_models=True) == set()


def test_what_was_foreign_already_stays(root, tmp_path, caplog):  # noqa: F811
    pair = make_pair(root)
    pair.save_pretrained(tmp_path / "router")
    lay_down(tmp_path / "router", pair.router)
    save_results(tmp_path / "router", {"citer": "0" * 64})
    assert pushed_with(load(tmp_path / "router"), tmp_path / "new") == {"provenance.json", "training.png", "README.md"}
    assert "results.json, results.md, curve.png" in caplog.text and "0" * 12 in caplog.text


@pytest.mark.parametrize("name", ["results.json", "curve.png", "README.md"])
def test_a_link_out_of_the_directory_is_not_pushed(root, tmp_path, caplog, name):  # noqa: F811
    pair = make_pair(root)
    pair.save_pretrained(tmp_path / "router")
    lay_down(tmp_path / "router", pair.router)
    (tmp_path / "router" / name).rename(tmp_path / "secret")
    (tmp_path / "router" / name).symlink_to(tmp_path / "secret")
    assert pushed_with(load(tmp_path / "router"), tmp_path / "new") == set()
    assert "leads out of the router's directory" in caplog.text


def test_a_pair_that_was_put_together_here_brings_nothing(root, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING):
        assert pushed_with(make_pair(root), tmp_path / "new") == set() and not caplog.records


PUSH = """
    from huggingface_hub import HfApi
    from tests.test_carrying import lay_down

    api = HfApi(token=TOKEN)
    for role in ("slm", "llm"):
        api.create_repo(f"me/{role}")
        api.upload_folder(repo_id=f"me/{role}", folder_path=role)
    pair = CiterForCausalLM.from_pair("me/slm", "me/llm", router="mlp")
    pair.push_to_hub("me/router", token=TOKEN)
    pair.save_pretrained("router")
    lay_down(Path("router"), pair.router)
    Path("router/README.md").unlink()
    facts = ["*.png", "*.md", "results.json", "provenance.json"]
    api.upload_folder(repo_id="me/router", folder_path="router", allow_patterns=facts)
    card = Path(api.hf_hub_download("me/router", "README.md", local_dir="card"))
    card.write_text(card.read_text().replace("---\\n", "---\\nlicense: mit\\n", 1))
    api.upload_file(repo_id="me/router", path_or_fileobj=card, path_in_repo="README.md")

    model = CiterForCausalLM.from_pretrained("me/router")
    model.push_to_hub("me/copy", token=TOKEN)
    model.push_to_hub("me/whole", token=TOKEN, save_base_models=True)
    # From a directory without the results: on the Hub, they stay beside the same router.
    pair.push_to_hub("me/router", token=TOKEN)
    said["same"] = sorted(api.list_repo_files("me/router"))
    torch.nn.init.normal_(model.router.score.weight)
    model.push_to_hub("me/copy", token=TOKEN)
    CiterForCausalLM.from_pair("me/slm", "me/llm", router="confidence").push_to_hub("me/router", token=TOKEN)
"""


def test_facts_follow_their_router_from_repository_to_repository(client):  # noqa: F811
    said = client.run(PUSH)
    copies = [list(client.hub.repositories[name].commits.values())[1] for name in ("me/copy", "me/whole")]
    for found in copies:
        assert set(FACTS) <= found.keys()
        card = found["README.md"].content.decode()
        assert "license: mit" in card and "model-index" in card
    assert set(FACTS) <= set(said["same"])
    # Where another router has taken the place, nothing is left that tells of the earlier one.
    for name in ("me/copy", "me/router"):
        found = files(client, name)
        card = found["README.md"].decode()
        assert not set(FACTS) & found.keys() and "license: mit" in card and "model-index" not in card
    assert "are of another router, and are removed" in client.output and "Not pushed: " in client.output
