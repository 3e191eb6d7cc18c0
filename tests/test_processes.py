"""Several processes measure, label and train the same as one, and a killed one costs nothing."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ONE, TORCHRUN, TWO, run, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    run(ONE, "-m", "citer_hf.cli", "demo", "--export", file, "--problems", 12, "--split", "train")
    return file


def evaluation(data: Path, out: Path) -> list[Any]:
    sizes = ["--max-new-tokens", 40, "--batch-tokens", 700, "--device-map", "cpu"]
    data_and_out = ["--data", data, "--checker", "math", "--out", out, "--shares", "0.1,0.4"]
    return ["-m", "citer_hf.cli", "evaluate", "demo", *data_and_out, *sizes]


def measured(out: Path) -> tuple[str, int]:
    """Return everything but times, and the number of processes."""
    values = json.loads((out / "results.json").read_text())
    for one in [*values["ends"].values(), *(point for method in values["methods"].values() for point in method)]:
        assert one.pop("seconds") > 0
    processes = values["provenance"].pop("processes")
    values["provenance"].pop("date")
    values["provenance"]["machine"].pop("threads")
    return json.dumps(values), processes


@pytest.fixture(scope="module")
def results_of_one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("one") / "out"
    run(ONE, *evaluation(data, out))
    return measured(out)[0]


def test_when_a_process_is_killed_the_other_ends_and_the_run_goes_on(data, results_of_one, tmp_path):
    arguments = evaluation(data, tmp_path / "out")
    process = start(TWO, *arguments)
    work = tmp_path / "out" / ".work" / "models alone"
    while process.poll() is None and len(list(work.glob("*.pt"))) < 2:
        time.sleep(0.02)
    workers = [one for one in psutil.Process(process.pid).children() if "evaluate" in one.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in said or "Another process has ended" in said
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers)
    done = {path: path.stat().st_mtime_ns for path in work.glob("*.pt")}
    assert done and not (tmp_path / "out" / "results.json").exists()
    assert all(torch.load(path) for path in done)
    run(ONE, *arguments)
    assert measured(tmp_path / "out")[0] == results_of_one


def test_two_processes_label_and_train_what_one_does(tmp_path: Path) -> None:
    citer, train, test = ("-m", "citer_hf.cli"), tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    run(ONE, *citer, "demo", "--export", train, "--problems", 30, "--split", "train")
    run(ONE, *citer, "demo", "--export", test, "--problems", 6)
    sizes = ["--max-new-tokens", 40, "--device-map", "cpu"]
    label = [*citer, "label", "demo", "--data", train, "--checker", "math", *sizes, "--out"]
    found, labels = {}, []
    for name, launcher in (("labels", ONE), ("labels of two", TWO)):
        run(launcher, *label, tmp_path / name)
        files = (file for file in (tmp_path / name).rglob("*") if file.is_file())
        labels.append({file.relative_to(tmp_path / name): file.read_bytes() for file in files})
    assert labels[0] == labels[1]
    for name, launcher in (("one", ONE), ("two", TORCHRUN)):
        router, out = tmp_path / name / "router", tmp_path / name / "out"
        run(launcher, *citer, "train", "demo", "--labels", tmp_path / "labels", "--out", router, "--device-map", "cpu")
        baselines = ["--baselines", tmp_path / "labels", "--methods", "co-llm,random", "--checker", "math"]
        evaluate = ("evaluate", router, "--data", test, "--out", out, *sizes, *baselines, "--shares", 0.3)
        assert run(launcher, *citer, *evaluate).count("results.json, results.md and curve.png are in") == 1
        assert not (out / ".work").exists()
        found[name] = (load_file(router / "model.safetensors"), *measured(out))
    (ours, values, processes), (of_one, values_of_one, _) = found["two"], found["one"]
    assert processes == 2
    assert ours.keys() == of_one.keys() and all(torch.equal(ours[key], of_one[key]) for key in ours)
    assert values == values_of_one
