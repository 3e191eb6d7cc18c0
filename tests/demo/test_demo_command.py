"""`citer demo`: what it streams, what it counts, what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import citer_hf.demo
from citer_hf import CiterForCausalLM
from citer_hf.demo import measuring, show
from citer_hf.demo.measuring import real_tokens, spread_thresholds
from citer_hf.demo.problems import is_correct, problem
from tests.chat_pairs import invoke, save_demo_pair

SHIPPED = citer_hf.demo.PAIR


@pytest.fixture(scope="module")
def demo_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo_pair(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def in_place_of_the_shipped(demo_pair: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(citer_hf.demo, "PAIR", demo_pair)
    return demo_pair


def test_demo_streams_problems_and_prints_a_table(in_place_of_the_shipped: Path) -> None:
    result = invoke("demo", "--problems", 4)
    assert result.exit_code == 0 and not result.stderr
    assert [f"Problem {number}." in result.stdout for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert "[[" in result.stdout and "\x1b" not in result.stdout
    for part in ("SLM alone", "LLM alone", "pair at 0.5", "4 held-out problems (seed 0)", "batches of 4"):
        assert part in result.stdout
    assert result.stdout.count("pair at") == 3


def test_the_markers_agree_with_the_counts(in_place_of_the_shipped: Path) -> None:
    for threshold, share in ((0, "0 of"), (2, r"(\d+) of \1")):
        result = invoke("demo", "--problems", 1, "--router-threshold", threshold)
        assert re.search(rf"; {share}.* tokens from the LLM\)", result.stdout)
        assert result.stdout.count("[[") == 1 + (threshold == 2)
        assert result.stdout.count("pair at") == 1


def test_json_is_all_there_is_and_adds_up(in_place_of_the_shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BATCH_SIZE", 4)
    report = json.loads(invoke("demo", "--json", "--problems", 6, "--seed", 3).stdout)
    assert (report["seed"], report["problems"], report["complete"]) == (3, 6, True)
    slm, llm, *pairs = report["rows"]
    assert (slm["name"], slm["llm_share"], slm["llm_passes_per_token"]) == ("SLM alone", 0, 0)
    assert (llm["name"], llm["llm_share"], llm["llm_passes_per_token"]) == ("LLM alone", 1, 1)
    assert [row["router_threshold"] for row in pairs] == spread_thresholds(0.5)
    for row in report["rows"]:
        assert row["problems"] == 6 and 0 <= row["accuracy"] == row["correct"] / 6
        assert row["llm_share"] == row["llm_tokens"] / row["tokens"]
        assert 0 < row["tokens"] <= 6 * 160
        assert row["llm_tokens"] <= row["llm_passes"] <= row["tokens"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    shares = [row["llm_share"] for row in pairs]
    assert shares == sorted(shares) and 0 < shares[0] < shares[2] < 1


def test_the_ends_of_the_threshold_are_the_models_alone(in_place_of_the_shipped: Path) -> None:
    for threshold, alone in ((0, 0), (1.5, 1)):
        rows = json.loads(invoke("demo", "--json", "--problems", 3, "--router-threshold", threshold).stdout)["rows"]
        pair, expected = dict(rows[2]), dict(rows[alone])
        for key in ("name", "router_threshold", "seconds", "tokens_per_second"):
            del pair[key], expected[key]
        assert pair == expected


def test_one_text_at_a_time_takes_as_many_passes_as_tokens_from_the_llm(in_place_of_the_shipped: Path) -> None:
    pair = json.loads(invoke("demo", "--json", "--problems", 1).stdout)["rows"][3]
    assert 0 < pair["llm_passes"] == pair["llm_tokens"] < pair["tokens"]


def test_a_seed_gives_the_same_again_and_another_seed_something_else(in_place_of_the_shipped: Path) -> None:
    def counts(seed: int) -> list[Any]:
        rows = json.loads(invoke("demo", "--json", "--problems", 2, "--seed", seed).stdout)["rows"]
        return [(row["tokens"], row["llm_tokens"], row["llm_passes"]) for row in rows]

    assert counts(1) == counts(1) != counts(2)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_shows_what_is_done(
    in_place_of_the_shipped: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def interrupted(model: Any, tokenizer: Any, chosen: Any, name: str, *rest: Any) -> Any:
        if name == "LLM alone":
            raise KeyboardInterrupt
        return measuring.measure(model, tokenizer, chosen, name, *rest)

    monkeypatch.setattr(show, "measure", interrupted)
    result = invoke("demo", "--problems", 1, *["--json"] * as_json)
    assert result.exit_code == 130
    if as_json:
        report = json.loads(result.stdout)
        assert report["complete"] is False and [row["name"] for row in report["rows"]] == ["SLM alone"]
    else:
        assert "Stopped." in result.stdout and "SLM alone" in result.stdout and "LLM alone" not in result.stdout


def test_ctrl_c_while_a_problem_is_solved(in_place_of_the_shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CiterForCausalLM, "generate", interrupted)
    result = invoke("demo", "--problems", 1)
    assert result.exit_code == 130 and "Stopped before anything was measured." in result.stdout


def test_export_writes_the_held_out_problems(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    result = invoke("demo", "--export", file, "--problems", 5, "--seed", 7)
    assert result.exit_code == 0 and not result.stdout
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 5
    for index, line in enumerate(lines):
        assert list(line) == ["prompt", "response", "answer"]
        assert line == vars(problem("test", 7, index))
        assert is_correct(line["response"], problem("test", 7, index))
    assert list(tmp_path.iterdir()) == [file]


def test_export_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("precious")
    result = invoke("demo", "--export", file, "--problems", 5)
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert file.read_text() == "precious" and list(tmp_path.iterdir()) == [file]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = invoke("demo", "--export", tmp_path / "file", "--problems", 5)
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--problems", "0"], 2),
        (["--problems", "many"], 2),
        (["--router-threshold", "-1"], 2),
        (["--router-threshold", "nan"], 2),
        (["--nonsense"], 2),
        (["--export", "x", "--json"], 2),
        (["--export", "/nowhere/at/all"], 1),
    ],
    ids=str,
)
def test_demo_refuses_what_means_nothing(arguments: list[str], status: int) -> None:
    result = invoke("demo", *arguments)
    assert result.exit_code == status and not result.stdout
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1


def test_real_tokens_end_with_the_end_of_the_text() -> None:
    written = torch.tensor([[5, 1, 0, 0], [5, 5, 5, 5], [1, 1, 1, 1], [5, 2, 1, 0]])
    assert real_tokens(written, 1).sum(1).tolist() == [2, 4, 1, 3]
    assert real_tokens(written, [1, 2]).sum(1).tolist() == [2, 4, 1, 2]
    assert real_tokens(written, None).all()


@pytest.mark.parametrize("shipped", [0.0, 0.05, 0.5, 0.9, 0.99, 1.0, 1.5])
def test_thresholds_lie_around_the_shipped_one(shipped: float) -> None:
    low, middle, high = spread_thresholds(shipped)
    assert 0 <= low <= middle == shipped
    assert high <= 1


def test_the_shipped_pair() -> None:
    command = [sys.executable, "-m", "citer_hf.cli", "demo", "--problems", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slm, llm, _, pair, _ = json.loads(done.stdout)["rows"]
    assert not done.stderr
    assert llm["correct"] >= 7 and slm["correct"] <= 6
    assert slm["correct"] <= pair["correct"] and pair["llm_share"] < 0.6
