"""`label` and `evaluate` on Ray give what one process gives, also when an actor is killed."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from citer_hf import CiterForCausalLM, evaluate, label_preferences, read_examples, runs
from citer_hf.demo import DEMO_PAIR, demo
from tests.chat_pairs import invoke, save_demo_pair
from tests.repositories import contents
from tests.served import wait_until

SIZES = {"max_new_tokens": 24, "batch_tokens": 640}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two processors, and so two actors."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    demo.export(file, problems=12, split="train")
    return file


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo_pair(tmp_path_factory.mktemp("pair"))


def computing() -> list[psutil.Process]:
    """The actors that are at a unit."""
    return [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::Actor.comp")]


def without_times(out: Path) -> list[Any]:
    values = json.loads((out / "results.json").read_text())
    points = [*values["ends"].values(), *(point for method in values["methods"].values() for point in method)]
    return [{key: value for key, value in point.items() if key != "seconds"} for point in points]


@pytest.mark.slow
def test_a_killed_actor_costs_nothing_and_the_labels_are_those_of_one_process(data, repository, tmp_path) -> None:
    model = CiterForCausalLM.from_pretrained(repository)
    # Small units, and so many of them.
    sizes = {**SIZES, "batch_tokens": 160}
    label_preferences(model, data, "math", tmp_path / "one", **sizes)
    label = partial(label_preferences, model, data, "math", tmp_path / "ray", ray=True, **sizes)
    labelling = threading.Thread(target=label)
    labelling.start()
    found: list[psutil.Process] = []
    wait_until(lambda: any((tmp_path / "ray").rglob("roll-outs*/*.pt")) and (found.extend(computing()) or found), 120)
    found[0].kill()
    labelling.join(300)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


@pytest.mark.slow
def test_the_commands_measure_and_label_on_ray_what_they_do_without(data, repository, tmp_path, monkeypatch) -> None:
    # Relative paths are those of the command.
    monkeypatch.chdir(repository.parent)
    common = [repository.name, "--data", data, "--checker", "math", "--max-new-tokens", 16, "--batch-tokens", 640]
    for name, flags in (("one", []), ("ray", ["--ray"])):
        evaluation = [*common, "--out", tmp_path / name, "--methods", "random,entropy", "--shares", "0.3", *flags]
        assert invoke("evaluate", *evaluation).exit_code == 0
        assert invoke("label", *common, "--out", tmp_path / f"labels of {name}", *flags).exit_code == 0
    assert contents(tmp_path / "labels of ray") == contents(tmp_path / "labels of one")
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "one")


@pytest.mark.slow
def test_what_actors_cannot_load_or_compute_is_the_error_of_the_call(data: Path, repository: Path, tmp_path: Path):
    model = CiterForCausalLM.from_pretrained(repository)
    examples = read_examples(data, limit=2, needs=("answer",))
    measure = partial(evaluate, model, examples, "math", shares=(0.5,), **SIZES)
    with pytest.raises(ValueError, match="ray: actors load another SLM than that of the pair"):
        measure(ray=partial(CiterForCausalLM.from_pretrained, DEMO_PAIR))
    with pytest.raises(OSError, match="no-such-pair"):
        measure(ray=partial(CiterForCausalLM.from_pretrained, "/no-such-pair"))
    model._repository = None
    with pytest.raises(ValueError, match="ray: this pair was not loaded from a repository"):
        measure(ray=True)


def test_actors_under_a_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "process_state", lambda: SimpleNamespace(num_processes=2, process_index=0))
    with pytest.raises(ValueError, match=r"^ray: expected one process"):
        runs.Work(tmp_path / "out", {}, pool=object())
    assert not (tmp_path / "out").exists()
