"""`citer push` refuses, before anything leaves the machine, what would be of no use on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from citer_hf.hub import ForeignFileError, repository_files
from tests.chat_pairs import invoke
from tests.test_card import CONFIG


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "router"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no router directory: it has no config.json"),
        ({"model_type": "llama"}, "expected a router repository, got a llama model"),
        (
            CONFIG | {"llm_reference": {"name_or_path": "/models/large"}},
            "llm: the router refers to the directory /models",
        ),
        (CONFIG | {"slm_reference": {"name_or_path": "."}}, "slm: the router refers to the directory"),
    ],
    ids=["empty", "no router", "absolute path", "relative path"],
)
def test_what_nobody_else_could_load_is_not_pushed(directory, config, message):
    (directory / "config.json").unlink()
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    result = invoke("push", directory, "me/router")
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (directory / "README.md").exists()


def test_hidden_files_stay_here_and_links_lead_nowhere(directory, tmp_path):
    for name in (".git/config", ".saving-1/config.json", "slm/config.json", "slm/.env", "__pycache__/x.pyc", ".env"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("")
    assert [name for name, _ in repository_files(directory)] == ["config.json", "slm/config.json"]
    (tmp_path / "secret").write_text("")
    (directory / "slm" / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ForeignFileError, match="is a link out of the directory"):
        repository_files(directory)
