"""Results and provenance beside a router are told and pushed only when they are of this router."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from citer_hf import CiterForCausalLM
from citer_hf.belonging import saved_fingerprint
from citer_hf.card import write_card
from citer_hf.evaluation.provenance import module_fingerprint
from citer_hf.evaluation.results import average_results, make_results
from citer_hf.facts import Facts
from tests.chat_pairs import invoke
from tests.repositories import save_base_models
from tests.test_card import ENDS, point


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base models."""
    folder = tmp_path_factory.mktemp("models")
    save_base_models(folder)
    return folder


def make_pair(root: Path, router: Any = "mlp", seed: int = 0, **options: Any) -> CiterForCausalLM:
    torch.manual_seed(seed)
    return CiterForCausalLM.from_pair(root / "slm", root / "llm", router=router, **options)


@pytest.fixture
def directory(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A router that stands on its own; whoever asks the Hub fails."""
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    make_pair(root).save_pretrained(tmp_path / "router", save_base_models=True)
    return tmp_path / "router"


def save_results(directory: Path, routers: dict[str, str] | None, **facts: Any) -> None:
    """Results of some routers, each with an accuracy of its own, by their fingerprints."""
    found = {"problems": 200, **facts} | ({} if routers is None else {"routers_sha256": routers})
    methods = {name: [point(0.5, 0.2, 0.6 + index / 10)] for index, name in enumerate(routers or {"citer": ""})}
    make_results(ENDS, methods, found).write(directory / "results.json")


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("mlp", {}),
        ({"type": "mlp", "top_logprobs": 4, "batch_norm": True}, {}),
        ("linear", {"dtype": torch.bfloat16}),
        ("confidence", {}),
        ({"type": "random", "seed": 3}, {}),
        ("r2r", {}),
    ],
    ids=str,
)
def test_a_saved_router_has_the_fingerprint_that_it_was_evaluated_with(root, tmp_path, router, options):
    pair = make_pair(root, router, **options)
    pair.save_pretrained(tmp_path / "router")
    config = json.loads((tmp_path / "router" / "config.json").read_text())
    loaded = CiterForCausalLM.from_pretrained(tmp_path / "router", **options)
    fingerprints = {module_fingerprint(one.router) for one in (pair, loaded)}
    assert fingerprints == {saved_fingerprint(tmp_path / "router", config)}


def test_of_several_routers_the_card_tells_the_one_that_is_here(root, directory):
    here, other = (module_fingerprint(make_pair(root, seed=seed).router) for seed in (0, 1))
    save_results(directory, {"citer-plus": other, "co-llm": here, "random": "0" * 64})
    write_card(directory, "me/router")
    card = ModelCard.load(directory / "README.md")
    assert {one.metric_type: one.metric_value for one in card.data.eval_results}["accuracy"] == 0.7
    assert "do not say which router" not in card.text


def test_results_of_another_router_are_neither_told_nor_pushed(root, directory, caplog):
    other = module_fingerprint(make_pair(root, seed=1).router)
    save_results(directory, {"citer": other})
    result = invoke("push", directory, "me/router")
    here = saved_fingerprint(directory, json.loads((directory / "config.json").read_text()))
    assert here is not None and result.exit_code == 1
    assert f"citer {other[:12]}" in result.stderr and here[:12] in result.stderr and "remove" in result.stderr
    assert not (directory / "README.md").exists()
    with caplog.at_level(logging.WARNING):
        write_card(directory, "me/router")
    card = ModelCard.load(directory / "README.md")
    assert card.data.eval_results is None and "Not measured" in card.text and other[:12] in caplog.text


def test_results_that_do_not_say_which_router_they_measured_are_told_as_such(directory, caplog):
    save_results(directory, None)
    facts = Facts.read(directory)
    assert facts.points and facts.measured_as is None and not facts.foreign
    write_card(directory, "me/router")
    assert "do not say which router" in (directory / "README.md").read_text()
    with caplog.at_level(logging.WARNING), pytest.raises(pytest.fail.Exception, match="asked the Hub"):
        from citer_hf.hub import push

        push(directory, "me/router")
    assert "results.json does not say which router it measured" in caplog.text


@pytest.mark.parametrize(
    ("then", "now", "belongs"),
    [
        ({"name_or_path": "team/large"}, {"name_or_path": "team/large"}, True),
        ({"name_or_path": "team/large"}, {"name_or_path": "team/larger"}, False),
        (
            {"name_or_path": "team/large", "revision": "a" * 40},
            {"name_or_path": "team/large", "revision": "b" * 40},
            False,
        ),
        ({"name_or_path": "team/large", "revision": "a" * 40}, {"name_or_path": "team/large"}, True),
        # A directory may hold a copy of any model.
        ({"name_or_path": "large"}, {"name_or_path": "team/larger"}, True),
        ({"subfolder": "llm"}, {"name_or_path": "team/larger"}, True),
        ({"name_or_path": "team/large"}, {"name_or_path": "/models/larger"}, True),
        ({"name_or_path": "team/large"}, {"subfolder": "llm", "origin": "team/larger"}, False),
        ({"subfolder": "llm", "origin": "team/large"}, {"name_or_path": "me/held", "subfolder": "llm"}, True),
    ],
)
def test_results_of_another_pair_are_those_of_another_router(root, tmp_path, then, now, belongs):
    # Routers without weights are all alike.
    pair = make_pair(root, "confidence")
    pair.config.llm_reference = now
    pair.save_pretrained(tmp_path)
    save_results(tmp_path, {"confidence": module_fingerprint(pair.router)}, llm={"reference": then})
    facts = Facts.read(tmp_path)
    assert (facts.measured_as == "confidence", not facts.foreign) == (belongs, belongs)
    if not belongs:
        assert "measured the LLM team/large" in facts.foreign[0] and "team/large" in facts.foreign[0]


@pytest.mark.parametrize(("name", "belongs"), [("me/lora", True), ("me/other", False)])
def test_results_with_another_adapter_are_those_of_another_router(root, tmp_path, name, belongs):
    pair = make_pair(root, "confidence")
    pair.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    measured = {"name_or_path": "team/small", "adapter": {"name_or_path": "me/lora"}}
    config["slm_reference"] = measured | {"adapter": {"name_or_path": name}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_results(tmp_path, {"confidence": module_fingerprint(pair.router)}, slm={"reference": measured})
    facts = Facts.read(tmp_path)
    assert bool(facts.points) == belongs and (belongs or "SLM's adapter me/lora" in facts.foreign[0])


def test_a_mean_over_seeds_is_of_each_of_them(root, directory):
    fingerprints = [module_fingerprint(make_pair(root, seed=seed).router) for seed in (0, 1)]
    for first in (0, 1):
        runs = [
            make_results(ENDS, {"citer-plus": [point(0.5, 0.2, 0.6)]}, {"routers_sha256": {"citer-plus": one}})
            for one in fingerprints[first:]
        ]
        average_results(runs).write(directory / "results.json")
        facts = Facts.read(directory)
        assert (facts.measured_as == "citer-plus") is (first == 0) and bool(facts.foreign) is (first == 1)
        write_card(directory, "me/router")
        assert ("Means over 2 routers" in (directory / "README.md").read_text()) is (first == 0)


def test_provenance_of_another_router_is_neither_told_nor_pushed(root, directory):
    here, other = (module_fingerprint(make_pair(root, seed=seed).router) for seed in (0, 1))
    told = {"objective": "citer-plus", "rounds": 1}
    for router, belongs in ((here, True), (other, False), (None, True)):
        found = told | ({} if router is None else {"router_sha256": router})
        (directory / "provenance.json").write_text(json.dumps(found))
        write_card(directory, "me/router")
        assert ("objective `citer-plus`" in (directory / "README.md").read_text()) is belongs
    (directory / "provenance.json").write_text(json.dumps(told | {"router_sha256": other}))
    result = invoke("push", directory, "me/router")
    assert result.exit_code == 1 and other[:12] in result.stderr and here[:12] in result.stderr


class OwnRouter(torch.nn.Module):
    """A router of a user's own class."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return hidden.mean(-1).sigmoid()


def test_a_router_of_a_class_of_its_own_is_taken_at_its_results_word(root, tmp_path):
    pair = make_pair(root, OwnRouter())
    pair.save_pretrained(tmp_path)
    save_results(tmp_path, {"custom": module_fingerprint(pair.router)})
    facts = Facts.read(tmp_path)
    assert facts.points and facts.measured_as is None and not facts.foreign
