"""The model card and what goes to the Hub with it: what tells of this router, and nothing else."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from citer_hf import CiterForCausalLM
from citer_hf.demo import DEMO_PAIR
from citer_hf.hub import ALL_FACTS, GENERATED, facts_of, push, push_model, write_card
from citer_hf.runs import file_sha256, provenance, router_sha256
from tests.chat_pairs import invoke

CONFIG = {
    "model_type": "citer",
    "router": {"type": "confidence"},
    "router_threshold": 0.75,
    "slm_reference": {"name_or_path": "team/small", "revision": "a" * 40},
    "llm_reference": {"name_or_path": "team/large"},
}
OF_CONFIDENCE = {"router_sha256": None, "router": {"type": "confidence"}}
LINK = "[{0}](https://huggingface.co/{0})"


def point(threshold: float | None, share: float, accuracy: float) -> dict[str, Any]:
    interval = [accuracy - 0.05, accuracy + 0.05]
    return {"threshold": threshold, "llm_share": share, "accuracy": accuracy, "accuracy_ci": interval}


def results(routers: dict[str, str | None], **about: Any) -> dict[str, Any]:
    """Results of some routers, by their sha256, each with an accuracy of its own."""
    rows = enumerate(routers)
    methods = {name: [point(0.5, 0.08, 0.7), point(0.7654, 0.21, 0.88 - row / 10)] for row, name in rows}
    facts = {"problems": 200, "checker": "math", "data_sha256": "0123456789abcdef" * 4, "routers_sha256": routers}
    ends = {"slm": point(0.0, 0.0, 0.31), "llm": point(2.0, 1.0, 0.92)}
    return {"ends": ends, "methods": methods, "summary": {}, "provenance": {**facts, **about}}


def put(directory: Path, **files: Any) -> None:
    """Write JSON files into a directory."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def card_of(directory: Path, tags: tuple[str, ...] = ()) -> ModelCard:
    facts = facts_of(directory, directory.joinpath, str(directory))
    write_card(directory, "me/my-router", tags, facts)
    return ModelCard.load(directory / "README.md")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A router repository; whoever asks the Hub fails."""
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    put(tmp_path / "router", config=CONFIG)
    return tmp_path / "router"


def test_the_card_shows_what_the_files_say(directory):
    trained = {"options": {"objective": "citer-plus", "rounds": 2}, "labels": {"examples": 1234, "checker": "math"}}
    trained["labels"] |= {"name": "me/labels", "commit": "d" * 40, "dropped": [{"reason": "row 5: too long."}]}
    trained["validation"] = {"questions": 99, "auc": 0.8765, "auc_ci": [0.8, 0.95], "learning_rate": 0.01}
    ended = {"learning_rate": 0.01, "best_epoch": 4, "epochs": 9, "stopped_early": True}
    trained |= {"trainings": [ended], "tokens": {"dropped": 7, "dropped_because": "beyond --rollouts"}}
    put(directory, provenance=trained | OF_CONFIDENCE, results=results({"confidence": None, "random": None}))
    (directory / "curve.png").write_bytes(b"")
    card = card_of(directory)
    data, text = card.data, card.text
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.base_model == ["team/small", "team/large"] and data.base_model_relation == "adapter"
    assert data.license is None and "citer" in data.tags
    assert "| 0.7654 | 21.0% | 88.0% | 83.0% to 93.0% |" in text and "78.0%" not in text
    assert "| SLM alone | 0.0% | 31.0% |" in text and "| LLM alone | 100.0% | 92.0% |" in text
    assert "(curve.png)" in text and "200 problems of `sha256:0123456789ab`, graded by `math`" in text
    assert f"([me/labels](https://huggingface.co/datasets/me/labels) at `{'d' * 12}`)" in text
    assert "epoch 4 of 9, where the training was stopped early" in text and "AUC of 0.876 (95 %: 0.800 to 0.9" in text
    assert "1 examples were left out; the first: row 5: too long. 7 tokens were left out: beyond --rollouts." in text
    assert "1234 examples" in text and "objective `citer-plus`, rounds: 2" in text
    assert f"[team/small](https://huggingface.co/team/small) at `{'a' * 12}`" in text
    assert 'name = "me/my-router"' in text and "router_threshold=0.75" in text and "title={{CITER}: Coll" in text


def test_what_is_not_known_is_not_in_the_card(directory):
    card = card_of(directory)
    assert "Not measured" in card.text and "needs no training" in card.text
    assert "curve.png" not in card.text and "AUC" not in card.text and "untrained" not in card.text


ORIGIN = {"subfolder": "slm", "origin": "team/small", "origin_revision": "c" * 40}
ADAPTED = {"name_or_path": "team/small", "adapter": {"name_or_path": "me/lora"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router": {"type": "mlp", "untrained": True}}, "router is untrained"),
        ({"router": {"type": "mlp"}}, "does not say how"),
        ({"slm_reference": {"subfolder": "slm"}}, "| SLM | in the folder `slm` |"),
        ({"llm_reference": None}, "| LLM | in `model.safetensors` |"),
        ({"slm_reference": ORIGIN}, f"folder `slm`, loaded from {LINK.format('team/small')} at `{'c' * 12}`"),
        ({"slm_reference": ADAPTED}, f"team/small) with the adapter {LINK.format('me/lora')}"),
        ({f"{role}_reference": {"subfolder": role} for role in ("slm", "llm")}, "| LLM | in the folder `llm` |"),
    ],
)
def test_the_card_says_what_the_router_is_and_works_on(directory, changes, said):
    put(directory, config=CONFIG | changes)
    card = card_of(directory)
    assert said in card.text
    bases = [name for name in ("team/small", "me/lora", "team/large") if f"co/{name})" in card.text]
    # Models that were never published are no base models.
    assert card.data.base_model == (bases or None)


def test_the_card_of_a_converted_router_names_the_file(directory):
    put(directory, provenance=OF_CONFIDENCE | {"converted_from": {"file": "r.pt", "sha256": "ab"}})
    assert "from `r.pt` (SHA-256 `ab`)" in card_of(directory).text


def test_a_card_is_written_again_unless_a_person_wrote_it_and_keeps_the_metadata_of_a_person(directory):
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (directory / "README.md").write_text(mine)
    card_of(directory)
    assert (directory / "README.md").read_text() == mine
    (directory / "README.md").unlink()
    card_of(directory, tags=("maths",))
    written = (directory / "README.md").read_text()
    (directory / "README.md").write_text(written.replace("---\n", "---\nlicense: mit\nlanguage: de\n", 1))
    put(directory, results=results({"confidence": None}))
    card = card_of(directory)
    assert (card.data.license, card.data.language) == ("mit", "de") and "maths" in card.data.tags
    assert card.text.count(GENERATED) == 1 and "88.0%" in card.text


def make_pair(root: Path, router: Any = "mlp", seed: int = 0, **options: Any) -> CiterForCausalLM:
    torch.manual_seed(seed)
    return CiterForCausalLM.from_pair(root / "slm", root / "llm", router=router, **options)


@pytest.mark.parametrize(
    ("router", "options"),
    [({"type": "mlp", "batch_norm": True}, {}), ("linear", {"dtype": torch.bfloat16}), ("confidence", {})],
    ids=str,
)
def test_a_saved_router_has_the_sha256_that_runs_name(bases, tmp_path, router, options):
    pair = make_pair(bases, router, **options)
    pair.save_pretrained(tmp_path)
    loaded = CiterForCausalLM.from_pretrained(tmp_path, **options)
    shas = {provenance(one)["router_sha256"] for one in (pair, loaded)}
    assert shas == {file_sha256(tmp_path / "model.safetensors")}
    assert (None in shas) is (router == "confidence")


def test_the_provenance_of_the_shipped_pair_is_of_its_router():
    found = facts_of(DEMO_PAIR, DEMO_PAIR.joinpath, "here")
    assert set(found) == {"provenance.json"}


def test_of_several_routers_the_card_shows_the_one_that_is_here(bases, directory):
    pair, other = make_pair(bases, router_threshold=0.75), make_pair(bases, seed=1)
    pair.save_pretrained(directory)
    here, there = router_sha256(pair.router), router_sha256(other.router)
    put(directory, results=results({"citer-plus": there, "co-llm": here, "confidence": None}))
    text = card_of(directory).text
    assert "| 78.0% |" in text and "88.0%" not in text
    # A mean over routers of different seeds is of each of them.
    runs = [{"routers_sha256": {"citer-plus": sha256}} for sha256 in (there, here)]
    put(directory, results=results({"citer-plus": None}, runs=runs))
    assert "Means over 2 routers" in card_of(directory).text


@pytest.mark.parametrize("told", [{"router_sha256": "0" * 64}, {"router_sha256": None}, {}], ids=str)
def test_files_of_other_routers_are_left_out_with_one_warning(bases, directory, caplog, told):
    make_pair(bases).save_pretrained(directory)
    routers = {"citer": told["router_sha256"]} if "router_sha256" in told else {}
    put(directory, results=results(routers, **told), provenance={"objective": "citer-plus", **told})
    (directory / "curve.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        card = card_of(directory)
    assert "Not measured" in card.text and "citer-plus" not in card.text
    assert "The router is untrained" in card.text
    (message,) = (record.getMessage() for record in caplog.records if record.name == "citer_hf.hub")
    assert all(name in message for name in ALL_FACTS) and str(directory) in message


@pytest.mark.parametrize(("kind", "shown"), [("confidence", True), ("entropy", False)])
def test_a_router_without_weights_is_known_by_its_kind(directory, kind, shown):
    put(directory, results=results({kind: None}), provenance={"router_sha256": None, "router": {"type": kind}})
    assert ("88.0%" in card_of(directory).text) is shown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "is no router repository"),
        (CONFIG | {"llm_reference": {"name_or_path": "/large"}}, "llm: the router refers to the directory /large of"),
        (CONFIG | {"slm_reference": {"name_or_path": "."}}, "slm: the router refers to the directory"),
        (CONFIG | {"slm_reference": ADAPTED | {"adapter": {"name_or_path": "/lora"}}}, "slm: the router refers to"),
    ],
    ids=["no router", "absolute path", "relative path", "adapter"],
)
def test_what_nobody_else_could_load_is_not_pushed(directory, config, message):
    put(directory, config=config)
    result = invoke("push", directory, "me/router")
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (directory / "README.md").exists()
    (directory / "config.json").unlink()
    assert "is no router repository" in invoke("push", directory, "me/router").stderr


def test_a_link_out_of_the_directory_is_not_pushed(bases, directory, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (directory / "results.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link out of the directory"):
        push(directory, "me/router")
    make_pair(bases, "confidence").save_pretrained(directory)
    pair = CiterForCausalLM.from_pretrained(directory)
    pair.save_pretrained(tmp_path / "new", save_base_models=True)
    with pytest.raises(ValueError, match="is a link out of the directory"):
        push_model(pair, str(tmp_path / "new"), "me/router")
