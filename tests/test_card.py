"""The model card: what it tells, and that it tells nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from citer_hf.belonging import saved_fingerprint
from citer_hf.card import GENERATED, make_card, write_card
from citer_hf.evaluation.points import Point
from citer_hf.evaluation.results import make_results
from citer_hf.facts import Facts

CONFIG = {
    "model_type": "citer",
    "router": {"type": "mlp"},
    "router_threshold": 0.75,
    "slm_reference": {"name_or_path": "team/small", "revision": "a" * 40},
    "llm_reference": {"name_or_path": "team/large"},
}
PROVENANCE = {
    "objective": "citer-plus",
    "rounds": 2,
    "labels": {"examples": 1234, "checker": "math", "data": "feedbeef" * 8},
    "validation": {"questions": 99, "auc": 0.8765, "calibration_error": 0.0213},
}


def point(threshold: float | None, share: float, accuracy: float) -> Point:
    return Point(threshold, accuracy, (accuracy - 0.05, accuracy + 0.05), share, share, 1.0, 1.0, 0.1, 1.0)


ENDS = {"slm": point(0.0, 0.0, 0.31), "llm": point(2.0, 1.0, 0.92)}


def save_results(directory: Path, method: str = "citer-plus") -> None:
    methods = {method: [point(0.5, 0.08, 0.7), point(0.7654, 0.21, 0.88)], "random": [point(0.3, 0.3, 0.4)]}
    facts = {"problems": 200, "checker": "math", "data_sha256": "0123456789abcdef" * 4}
    make_results(ENDS, methods, facts).write(directory / "results.json")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_card_tells_what_the_files_say(directory):
    (directory / "provenance.json").write_text(json.dumps(PROVENANCE))
    (directory / "curve.png").write_bytes(b"")
    save_results(directory)
    write_card(directory, "me/my-router")
    card = ModelCard.load(directory / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.base_model == ["team/small", "team/large"] and data.base_model_relation == "adapter"
    assert data.license is None and "citer" in data.tags
    # The measured point that is nearest to the saved threshold.
    assert data.model_name == "my-router"
    assert {one.metric_type: one.metric_value for one in data.eval_results} == {"accuracy": 0.88, "llm_share": 0.21}
    assert {one.dataset_name for one in data.eval_results} == {"sha256:0123456789ab"}
    text = card.text
    assert "| 0.7654 | 21.0% | 88.0% | 83.0% to 93.0% |" in text
    assert "| SLM alone | 0.0% | 31.0% |" in text and "| LLM alone | 100.0% | 92.0% |" in text
    assert "(curve.png)" in text and "200 problems" in text and "0.3 |" not in text
    assert "1234 examples" in text and "AUC of 0.876" in text and "objective `citer-plus`, rounds: 2" in text
    assert f"[team/small](https://huggingface.co/team/small) at `{'a' * 12}`" in text
    assert 'name = "me/my-router"' in text and "router_threshold=0.75" in text and "@inproceedings" in text


def test_what_is_not_known_is_not_told(directory):
    write_card(directory, "me/my-router")
    card = ModelCard.load(directory / "README.md")
    assert card.data.eval_results is None and "model-index" not in card.content
    assert "Not measured" in card.text and "does not say how" in card.text
    assert "curve.png" not in card.text and "AUC" not in card.text


def test_models_in_the_repository_are_no_base_models(directory):
    config = CONFIG | {"slm_reference": {"subfolder": "slm"}, "llm_reference": None}
    (directory / "config.json").write_text(json.dumps(config))
    card = make_card(Facts.read(directory), "me/my-router")
    assert card.data.base_model is None and "in the folder `slm`" in card.text and "`model.safetensors`" in card.text


def test_a_model_in_the_repository_that_came_from_a_published_one_names_it(directory):
    slm = {"subfolder": "slm", "origin": "team/small", "origin_revision": "c" * 40}
    config = CONFIG | {"router": {"type": "confidence"}, "slm_reference": slm, "llm_reference": {"subfolder": "llm"}}
    config |= {"slm_config": {"model_type": "llama"}, "llm_config": {"model_type": "llama"}}
    (directory / "config.json").write_text(json.dumps(config))
    card = make_card(Facts.read(directory), "me/my-router")
    assert card.data.base_model == ["team/small"] and card.data.base_model_relation == "adapter"
    assert f"folder `slm`, loaded from [team/small](https://huggingface.co/team/small) at `{'c' * 12}`" in card.text
    # Results of this very router say what was measured; without a commit it may have been a directory.
    router = saved_fingerprint(directory, config)
    measured = {"name_or_path": "team/large", "revision": "d" * 40}
    for reference, bases in (
        (measured, ["team/small", "team/large"]),
        ({"name_or_path": "models/large"}, ["team/small"]),
        ({"name_or_path": "large"}, ["team/small"]),
        (None, ["team/small"]),
    ):
        facts = {"routers_sha256": {"confidence": router}, "llm": {"reference": reference}}
        make_results(ENDS, {"confidence": [point(0.5, 0.1, 0.5)]}, facts).write(directory / "results.json")
        assert make_card(Facts.read(directory), "me/my-router").data.base_model == bases


def test_a_repository_that_holds_both_models_is_named_once(directory):
    references = {f"{role}_reference": {"name_or_path": "me/held", "subfolder": role} for role in ("slm", "llm")}
    (directory / "config.json").write_text(json.dumps(CONFIG | references))
    assert make_card(Facts.read(directory), "me/my-router").data.base_model == ["me/held"]


def test_results_of_other_routers_are_not_told_as_this_ones(directory):
    save_results(directory, method="confidence")
    card = make_card(Facts.read(directory), "me/my-router")
    assert card.data.eval_results is None and "do not measure this router (`citer`)" in card.text


def test_a_card_that_a_person_wrote_is_left_alone(directory):
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    write_card(directory, "me/my-router")
    assert (directory / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_a_card_is_written_again_and_keeps_what_a_person_put_into_its_metadata(directory):
    write_card(directory, "me/my-router", tags=["maths"])
    written = (directory / "README.md").read_text()
    (directory / "README.md").write_text(written.replace("---\n", "---\nlicense: mit\nlanguage: de\n", 1))
    save_results(directory, method="citer")
    write_card(directory, "me/my-router")
    card = ModelCard.load(directory / "README.md")
    assert (card.data.license, card.data.language) == ("mit", "de") and "maths" in card.data.tags
    assert card.text.count(GENERATED) == 1 and "88.0%" in card.text
    again = (directory / "README.md").read_text()
    write_card(directory, "me/my-router")
    assert (directory / "README.md").read_text() == again


def test_a_file_that_is_no_json_is_named(directory):
    (directory / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match=r"provenance.json: expected a JSON object"):
        Facts.read(directory)
