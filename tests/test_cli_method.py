"""`citer label`, `train`, `evaluate` and `calibrate`, from the command line."""

import json
from functools import partial
from pathlib import Path

import pytest

from citer_hf.hub import method_of
from citer_hf.runs import file_sha256, read_json
from citer_hf.training import train as train_module
from citer_hf.training.train import TrainOptions
from tests.chat_pairs import invoke, save_demo_pair

BASELINES = {"citer", "citer-s", "co-llm", "query", "confidence", "entropy", "random", "bild", "speculative"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair, its data, labels and a router that was trained on them."""
    folder = tmp_path_factory.mktemp("work")
    save_demo_pair(folder)
    invoke("demo", "--export", folder / "train.jsonl", "--problems", 10, "--split", "train")
    invoke("demo", "--export", folder / "test.jsonl", "--problems", 4)
    data = ("--data", folder / "train.jsonl", "--checker", f"{__name__}:has_digit")
    result = invoke("label", folder / "pair", *data, "--out", folder / "labels", "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    assert "tokens of 10 answers" in result.stdout and "roll-outs of the SLM: " in result.stderr
    result = invoke("train", folder / "pair", "--labels", folder / "labels", "--out", folder / "router", "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert "held-out questions" in result.stdout
    return folder


def has_digit(response: str, answer: str) -> bool | None:
    """Whether a response has the answer's last digit."""
    return answer[-1] in response if response else None


def test_three_commands_give_curves_of_every_method(work, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "TrainOptions", partial(TrainOptions, learning_rates=(1e-2,), epochs=1))
    out = tmp_path / "results"
    data = ("--data", work / "test.jsonl", "--checker", f"{__name__}:has_digit", "--max-new-tokens", 20)
    measured = ("--baselines", work / "labels", "--shares", "0.2,0.5")
    arguments = ("evaluate", work / "router", *data, "--out", out, *measured)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    values = json.loads((out / "results.json").read_text())
    assert set(values["methods"]) == BASELINES | {"citer-plus"} and set(values["ends"]) == {"slm", "llm"}
    keys = {"threshold", "veto", "accuracy", "accuracy_ci", "llm_share", "llm_calls", "bytes", "seconds"}
    points = [one for method in values["methods"].values() for one in method]
    assert all(keys <= set(one) for one in points) and values["ends"]["llm"]["llm_share"] == 1
    assert {one["veto"] for one in points if one not in values["methods"]["bild"]} == {0}
    assert {file.name for file in out.iterdir()} == {"results.json", "results.md", "curve.png"}
    assert invoke(*arguments).exit_code == 0


def test_routers_of_other_directories_are_compared(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "co-llm"
    train = ("train", work / "pair", "--labels", work / "labels", "--objective", "co-llm", "--epochs", 1)
    assert invoke(*train, "--out", other).exit_code == 0
    data = ("--data", work / "test.jsonl", "--checker", "math", "--max-new-tokens", 8, "--shares", "0.5")
    out = tmp_path / "results"
    others = ("--compare", other, "--methods", "bild,speculative", "--vetoes", "0,0.3")
    result = invoke("evaluate", work / "router", *data, "--out", out, *others)
    assert result.exit_code == 0, result.output
    results = read_json(out / "results.json")
    names = {"citer-plus", "citer-plus, veto 0.3", "co-llm", "co-llm, veto 0.3", "bild", "speculative"}
    assert set(results["methods"]) == names
    assert {one["veto"] for name in names for one in results["methods"][name] if "0.3" in name or name == "bild"} == {
        0.3
    }
    # The card of each router shows the points of its own, and none those of other routers.
    for directory, method in ((work / "router", "citer-plus"), (other, "co-llm"), (work / "pair", None)):
        assert method_of(results, file_sha256(directory / "model.safetensors"), "mlp") == method
    told = {"routers_sha256": {"bild": None, "confidence, veto 0.3": None}}
    assert method_of(told, None, "confidence") == "confidence, veto 0.3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("label {work}/pair --data {work}/no.jsonl --checker math --out {tmp}/x", "no.jsonl"),
        ("label {work}/pair --data {work}/test.jsonl --checker math --out {work}", "exists already"),
        ("train {work}/pair --labels {work} --out {tmp}/x", "holds no labels"),
        (
            "evaluate {work}/pair --data {work}/test.jsonl --checker math --out {tmp}/x --compare {work}/pair",
            "--compare",
        ),
        (
            "evaluate {work}/pair --data {work}/test.jsonl --checker math --out {tmp}/x --methods bild,co-llm",
            "got bild, co-llm. The others need labels (--baselines)",
        ),
        ("calibrate {work}/pair --data {work}/test.jsonl", "expected exactly one"),
        ("calibrate demo --data {work}/test.jsonl --llm-share 0.2 --write", "calibrate the copy"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(work: Path, tmp_path: Path, arguments: str, message: str) -> None:
    before = sorted(str(file) for file in work.rglob("*"))
    result = invoke(*arguments.format(work=work, tmp=tmp_path).split())
    assert result.exit_code == 1 and message.format(work=work) in " ".join(result.stderr.split())
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.stderr
    assert sorted(str(file) for file in work.rglob("*")) == before
