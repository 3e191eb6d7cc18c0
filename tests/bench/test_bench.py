"""`citer bench`: the comparison, its report, interruptions, failures, and the options that it takes."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.bench import bench as module
from citer_hf.bench.bench import as_device, bench
from citer_hf.bench.contenders import Decoders
from citer_hf.bench.plot import draw
from tests.chat_pairs import QUICK_BENCH, invoke
from tests.conftest import make_pair

pytestmark = pytest.mark.usefixtures("small_machine")
QUICK: dict[str, Any] = {"max_new_tokens": 4, "prompt_length": 6, "repeats": 1, "warmup": 0}


def bench_json(*arguments: Any, status: int = 0) -> dict[str, Any]:
    result = invoke("bench", "demo", *QUICK_BENCH, *arguments, "--json")
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout)


def test_the_report_adds_up() -> None:
    report = bench_json("--shares", "0,0.5,1", "--thresholds", "0.5", "--released-loop", "--repeats", 2)
    assert report["model"] == "demo" and report["complete"] and not report["notes"] and report["error"] is None
    settings = ["share 0", "share 0.5", "share 1", "threshold 0.5"]
    names = [f"{kind}, {setting}" for setting in settings for kind in ("CITER", "floor", "released loop")]
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["LLM alone", "SLM alone", "assisted generation", *names]
    for name, row in rows.items():
        assert row["tokens"] == row["positions"] == 4 and len(row["seconds"]) == 2 and row["error"] is None
        for value in ("tokens_per_second", "ms_per_token", "speedup"):
            assert 0 < row[value]["low"] <= row[value]["median"] <= row[value]["high"]
        assert row["bytes_moved"] > 0 and row["bandwidth_fraction"] > 0
        assert (row["relative_to_floor"] is not None) == name.startswith(("CITER", "released"))
    passes = {name: (row["llm_passes_per_position"], row["slm_passes_per_position"]) for name, row in rows.items()}
    assert passes["LLM alone"] == (passes["CITER, share 1"][0], 0) == (1, 0)
    assert passes["SLM alone"] == passes["CITER, share 0"] == passes["floor, share 0"] == (0, 1)
    for setting in settings:
        citer, floor = rows[f"CITER, {setting}"], rows[f"floor, {setting}"]
        assert citer["llm_share"] == floor["llm_share"] == citer["llm_passes_per_position"]
        assert passes[citer["name"]] == passes[floor["name"]] and citer["bytes_moved"] == floor["bytes_moved"]
        assert (citer["share"] is None) == (citer["threshold"] is not None) == setting.startswith("threshold")
    assert report["machine"]["memory_bandwidth"] > 0
    assert list(report["cost_curve"]["llm_ms"]) == ["1", "2", "3", "4", "8", "16", "32"]
    assert (report["break_even_llm_share"] is None) == (report["break_even_reason"] is not None)


def test_a_bare_pair_has_the_default_shares(saved: Path) -> None:
    bare = ("--slm", saved / "slm", "--llm", saved / "llm")
    report = json.loads(invoke("bench", *bare, "--no-assisted", *QUICK_BENCH, "--json").stdout)
    assert [row["share"] for row in report["rows"] if row["kind"] == "CITER"] == [0, 0.2, 0.5, 1]
    assert "assisted generation" not in [row["name"] for row in report["rows"]]


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_is_measured_in_lock_step_too_and_without_assistance(
    pair: CiterForCausalLM, cache: str | None
) -> None:
    report = bench(pair, shares=(0.5,), batch_size=2, cache_implementation=cache, **QUICK).as_dict()
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds == ["LLM alone", "SLM alone", "CITER", "CITER in lock-step", "floor"]
    citer, lock_step, floor = report["rows"][2:]
    assert lock_step["llm_passes_per_position"] == floor["llm_passes_per_position"]
    assert citer["llm_share"] == lock_step["llm_share"] == floor["llm_share"]
    assert all(row["tokens"] == 2 * row["positions"] and row["error"] is None for row in report["rows"])
    assert "assisted generation was not measured" in report["notes"][0]
    assert [("without compilation" in note) for note in report["notes"][1:]] == [True] * (cache == "static")


def test_prompts_of_a_file_fill_batches(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text("Tom has 3 apples.\n\nThen he has 2 times as many apples.\nHow many?\n")
    report = bench_json("--prompts", file, "--batch-size", 2, "--shares", "0.5")
    assert len(report["options"]["prompt_length"]) == 2 and report["options"]["prompts"] == str(file)
    assert all(row["positions"] == 2 * 4 and row["tokens"] == 16 for row in report["rows"])


def test_table_and_plot_are_complete_and_the_pair_is_left_as_it_was(tmp_path: Path) -> None:
    pair = make_pair()
    parts = (pair, pair.slm, pair.llm)
    # Outputs are of equal length, though every token would end them.
    pair.generation_config.eos_token_id = pair.llm.generation_config.eos_token_id = list(range(pair.vocab_size))
    before = [pair.router, *(part.generation_config for part in parts)]
    found = bench(pair, shares=(0, 1), thresholds=(0.5,), **QUICK)
    assert found.error is None
    for kind, start in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        draw(found.as_dict(), tmp_path / f"speed.{kind}")
        assert (tmp_path / f"speed.{kind}").read_bytes().startswith(start)
    draw({**found.as_dict(), "rows": []}, tmp_path / "nothing.png")
    assert len(list(tmp_path.iterdir())) == 3
    after = [pair.router, *(part.generation_config for part in parts)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert not any(part._forward_pre_hooks for part in parts)
    table = found.table()
    for part in ("on cpu", "batch size 1", "LLM alone", "CITER, share 1", "floor, threshold 0.5", "Break-even"):
        assert part in table
    assert "peak" not in table


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", "demo", *QUICK_BENCH, "--plot", tmp_path / "speed.png")
    assert result.exit_code == 1 and "citer-hf[plot]" in result.stderr and not result.stdout


def fail_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, error: BaseException) -> None:
    """Let the n-th call of a method of `Decoders` fail, and all later ones."""
    real, calls = getattr(Decoders, method), []

    def decode(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(Decoders, method, decode)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    # The floor is counted once; its first timed run is its second call.
    fail_at(monkeypatch, "floor", 2, KeyboardInterrupt())
    file = tmp_path / "plot.svg"
    arguments = ("--shares", "0.5", "--plot", file, *["--json"] * as_json)
    result = invoke("bench", "demo", *QUICK_BENCH, *arguments)
    assert result.exit_code == 130 and file.exists()
    if not as_json:
        assert "Interrupted: this is what was measured" in result.stdout and "CITER, share 0.5" in result.stdout
        return
    report = json.loads(result.stdout)
    assert report["interrupted"] and not report["complete"] and report["error"] is None
    *timed, floor = report["rows"]
    assert [len(row["seconds"]) for row in timed] == [1] * 4 and timed[3]["relative_to_floor"] is None
    assert floor["seconds"] == [] and floor["slm_passes_per_position"] == 1
    assert floor["speedup"] is floor["ms_per_token"] is floor["bandwidth_fraction"] is None


@pytest.mark.parametrize("place", ["describe_machine", "measure_curve"])
def test_ctrl_c_keeps_what_there_is_at_any_time(
    pair: CiterForCausalLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(module, place, Mock(side_effect=KeyboardInterrupt))
    report = bench(pair, "pair", shares=(0.5,), **QUICK)
    assert report.interrupted and not report.as_dict()["complete"]
    assert report.table().startswith("Interrupted: ")
    assert [row["llm_share"] for row in report.as_dict()["rows"]][:2] == ([1, 0] if place == "measure_curve" else [])


@pytest.mark.parametrize(
    ("error", "call"), [(torch.OutOfMemoryError("CUDA out of memory"), 1), (MemoryError("no memory"), 2)], ids=repr
)
def test_a_contender_that_fails_is_reported_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, error: Exception, call: int
) -> None:
    fail_at(monkeypatch, "citer", call, error)
    report = bench_json("--shares", "0.5", "--no-assisted", status=1)
    llm, slm, citer, floor = report["rows"]
    assert not report["complete"] and report["error"] == f"CITER, share 0.5: {citer['error']}"
    assert citer["error"] == f"{type(error).__name__}: {error}" and llm["error"] is slm["error"] is None
    assert len(llm["seconds"]) == len(slm["seconds"]) == 1
    # The floor repeats the decisions of the pair: without any it has none to repeat.
    assert ("which failed" in floor["error"]) if call == 1 else floor["error"] is None


def test_a_failure_of_assisted_generation_leaves_the_report_complete(
    pair: CiterForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.llm, "_get_candidate_generator", None, raising=False)
    report = bench(pair, shares=(0.5,), **QUICK)
    assert [row["name"] for row in report.as_dict()["rows"] if row["error"]] == ["assisted generation"]
    assert report.error is None and report.as_dict()["complete"] and "assisted generation failed: " in report.table()


def test_the_default_device_exists() -> None:
    assert torch.device(as_device(None)) and as_device("auto") == "auto"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--shares", "half"], ("--shares", "half")),
        (["demo", "--shares", "0,1.5"], ("--shares", "1.5")),
        (["demo", "--thresholds", "70"], ("--thresholds", "70")),
        (["demo", "--batch-size", "0"], ("--batch-size",)),
        (["demo", "--cache-implementation", "paged"], ("--cache-implementation", "paged")),
        (["demo", "--device", "toaster"], ("--device", "toaster")),
        (["demo", "--prompt-length", "300"], ("--prompt-length", "300", "256")),
        (["demo", "--plot", "speed.bmp"], ("--plot", "speed.bmp", ".png")),
        (["demo", "--plot", "/nowhere/at/all.png"], ("--plot", "/nowhere/at")),
        ([], ("MODEL", "--slm", "--llm")),
        (["demo", "--gpu", "h100"], ("--gpu", "--simulate")),
        (["demo", "--simulate", "--gpu", "h100", "--thresholds", "0.5"], ("--thresholds", "--simulate")),
    ],
    ids=str,
)
def test_the_command_refuses_before_it_measures(arguments: list[str], said: tuple[str, ...]) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code != 0 and not result.stdout
    for part in said:
        assert part in result.stderr
