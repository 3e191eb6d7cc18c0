"""`citer bench`: what it compares, what it prints, what it keeps when it is interrupted, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from citer_hf import CiterForCausalLM
from citer_hf.bench.prompts import read_prompts
from citer_hf.bench.run import Bench
from tests.chat_pairs import QUICK_BENCH as QUICK
from tests.chat_pairs import invoke

pytestmark = pytest.mark.usefixtures("small_machine")


def bench_json(*arguments: Any) -> dict[str, Any]:
    result = invoke("bench", *QUICK, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("rows", [1, 2])
def test_static_caches_are_compared_with_static_caches(rows: int) -> None:
    options = ("--shares", "0,0.5", "--cache-implementation", "static", "--batch-size", rows, "--no-assisted")
    report = bench_json("demo", *options)
    assert report["complete"] and report["options"]["cache_implementation"] == "static"
    assert {row["kind"] for row in report["rows"]} >= {"LLM alone", "SLM alone", "CITER", "floor"}
    assert report["notes"] == ["Single passes, and so the break-even, were timed without compilation."]


def test_json_is_all_there_is_and_adds_up() -> None:
    report = bench_json("demo", "--shares", "0,0.5,1", "--thresholds", "0.5", "--released-loop", "--repeats", 2)
    assert report["model"] == "demo" and report["complete"] and not report["notes"]
    settings = ["share 0", "share 0.5", "share 1", "threshold 0.5"]
    names = [f"{kind}, {setting}" for setting in settings for kind in ("CITER", "floor", "released loop")]
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["LLM alone", "SLM alone", "assisted generation", *names]
    for row in rows.values():
        assert row["tokens"] == row["positions"] == 4 and len(row["seconds"]) == 2
        for name in ("tokens_per_second", "ms_per_token", "first_token_seconds", "speedup"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["peak_memory_bytes"] > 0 and row["bytes_moved"] > 0 and row["bandwidth_fraction"] > 0
        assert (row["relative_to_floor"] is not None) == row["name"].startswith(("CITER", "released"))
    passes = {name: (row["llm_passes_per_position"], row["slm_passes_per_position"]) for name, row in rows.items()}
    assert passes["LLM alone"] == (passes["CITER, share 1"][0], 0) == (1, 0)
    assert passes["SLM alone"] == passes["CITER, share 0"] == passes["floor, share 0"] == (0, 1)
    for setting in settings:
        citer, floor = rows[f"CITER, {setting}"], rows[f"floor, {setting}"]
        assert citer["llm_share"] == floor["llm_share"] == citer["llm_passes_per_position"]
        assert passes[f"CITER, {setting}"] == passes[f"floor, {setting}"]
        assert citer["bytes_moved"] == floor["bytes_moved"]
    assert report["machine"]["memory_bandwidth"] > 0
    assert list(report["cost_curve"]["llm_ms"]) == ["1", "2", "3", "4", "8", "16", "32"]
    assert (report["break_even_llm_share"] is None) == (report["break_even_reason"] is not None)


def test_a_table_says_the_same_in_words() -> None:
    result = invoke("bench", "demo", *QUICK, "--shares", "0.5")
    assert result.exit_code == 0 and not result.stderr
    for part in ("demo on cpu", "1 row,", "LLM alone", "CITER, share 0.5", "floor, share 0.5", "Break-even", "GB/s"):
        assert part in result.stdout


def test_a_bare_pair_is_measured_with_the_shares_of_the_default(saved: Path) -> None:
    report = bench_json("--slm", saved / "slm", "--llm", saved / "llm", "--no-assisted")
    shares = [row["share"] for row in report["rows"] if row["kind"] == "CITER"]
    assert shares == [0, 0.2, 0.5, 1]
    assert report["model"] == f"{saved / 'slm'} + {saved / 'llm'}"
    assert "assisted generation" not in [row["name"] for row in report["rows"]]


def test_a_batch_is_measured_in_lock_step_too_and_without_assistance() -> None:
    report = bench_json("demo", "--shares", "0.5", "--batch-size", 3)
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds == ["LLM alone", "SLM alone", "CITER", "CITER in lock-step", "floor"]
    citer, lock_step, floor = report["rows"][2:]
    assert lock_step["llm_passes_per_position"] == floor["llm_passes_per_position"]
    assert citer["llm_share"] == lock_step["llm_share"] == floor["llm_share"]
    assert all(row["tokens"] == 3 * row["positions"] for row in report["rows"])
    assert "assisted generation was not measured" in report["notes"][0]


def test_the_same_seed_makes_the_same_decisions() -> None:
    def decided(seed: int) -> list[Any]:
        options = ("--shares", "0.3,0.5", "--seed", seed, "--no-assisted", "--max-new-tokens", 20)
        # How much is read tells where the LLM has written; how often it does, all seeds have in common.
        return [(row["llm_share"], row["bytes_moved"]) for row in bench_json("demo", *options)["rows"]]

    first, other = decided(1), decided(2)
    assert decided(1) == first != other
    assert [share for share, _ in first] == [share for share, _ in other] == [1, 0, 0.3, 0.3, 0.5, 0.5]


@pytest.mark.parametrize("kind", ["lines", "JSON lines", "JSON list of texts", "JSON list of objects"])
def test_prompts_come_from_a_file_in_full_batches(tmp_path: Path, kind: str) -> None:
    prompts = ["Tom has 3 apples.", "Then he has 2 times as many apples.", "How many?"]
    file = tmp_path / "prompts"
    objects = [{"prompt": text} for text in prompts]
    file.write_text(
        {
            "lines": "\n\n".join(prompts) + "\n",
            "JSON lines": "\n\n".join(map(json.dumps, objects)) + "\n",
            "JSON list of texts": json.dumps(prompts),
            "JSON list of objects": json.dumps(objects, indent=2),
        }[kind]
    )
    assert read_prompts(file) == prompts
    report = bench_json("demo", "--prompts", file, "--batch-size", 2, "--shares", "0.5")
    assert len(report["options"]["prompt_length"]) == 2
    assert all(row["positions"] == 2 * 4 and row["tokens"] == 16 for row in report["rows"])


def test_the_model_is_left_as_it_was(saved: Path) -> None:
    model = CiterForCausalLM.from_pretrained(saved)
    before = (model.router, model.generation_config, model.slm.generation_config, model.llm.generation_config)
    from citer_hf.bench.options import BenchOptions

    Bench(model, BenchOptions(shares=(0.5,), prompt_length=4, max_new_tokens=2, repeats=1, warmup=0), "pair").run()
    after = (model.router, model.generation_config, model.slm.generation_config, model.llm.generation_config)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert not any(part._forward_pre_hooks for part in (model.slm, model.llm))


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_plot_writes_the_kind_of_file_that_its_name_says(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"speed.{kind}"
    assert invoke("bench", "demo", *QUICK, "--shares", "0,1", "--thresholds", "0.5", "--plot", file).exit_code == 0
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind]
    assert file.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [file]


def test_a_plot_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("citer_hf.runs.os.replace", full)
    result = invoke("bench", "demo", *QUICK, "--shares", "1", "--plot", tmp_path / "speed.png")
    assert result.exit_code == 1 and "No space left" in result.stderr and "CITER, share 1" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--shares", "0,1.5"], ("--shares", "0", "1.5")),
        (["demo", "--shares", "-0.1"], ("--shares", "-0.1")),
        (["demo", "--shares", "nan"], ("--shares", "nan")),
        (["demo", "--shares", "half"], ("--shares", "'half'")),
        (["demo", "--thresholds", "-1"], ("--thresholds", "-1")),
        (["demo", "--device", "cuda:99"], ("--device", "cuda:99", "There is: cpu")),
        (["demo", "--device", "toaster"], ("--device", "toaster", "There is: cpu")),
        (["demo", "--dtype", "float17"], ("--dtype", "float17", "bfloat16")),
        (["demo", "--dtype", "float8_e4m3fn"], ("--dtype", "float8_e4m3fn", "bfloat16")),
        (["demo", "--seed", str(1 << 63)], ("--seed", str(1 << 63))),
        (["demo", "--plot", "/proc/speed.png"], ("--plot", "speed.png", "/proc")),
        (
            ["demo", "--device", "cpu", "--cache-implementation", "offloaded"],
            ("--cache-implementation", "offloaded", "CPU"),
        ),
        (
            ["demo", "--prompt-length", "300", "--max-new-tokens", "300"],
            ("shorter prompts, and less than 256 for --max-new-tokens",),
        ),
        (["demo", "--prompt-length", "300"], ("--prompt-length", "300", "256")),
        (["demo", "--prompt-length", "250", "--max-new-tokens", "20"], ("--max-new-tokens", "270", "256", "6")),
        (["demo", "--batch-size", "0"], ("--batch-size", "0")),
        (["demo", "--repeats", "0"], ("--repeats", "0")),
        (["demo", "--warmup", "-1"], ("--warmup", "-1")),
        (["demo", "--prompts", "/nowhere/at/all"], ("--prompts", "/nowhere/at/all")),
        (["demo", "--plot", "speed.bmp"], ("--plot", "speed.bmp", ".png")),
        (["demo", "--plot", "/nowhere/at/all.png"], ("--plot", "/nowhere/at")),
        (["demo", "--cache-implementation", "paged"], ("cache_implementation", "paged")),
        ([], ("MODEL", "--slm", "--llm")),
        (["--slm", "x"], ("--llm", "--slm alone")),
        (["demo", "--slm", "x", "--llm", "y"], ("MODEL", "both")),
        (["./nowhere"], ("./nowhere",)),
    ],
    ids=str,
)
def test_bench_refuses_in_one_line_what_means_nothing(arguments: list[str], said: tuple[str, ...]) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr


def test_bench_refuses_a_plot_that_is_a_directory_before_it_measures(tmp_path: Path) -> None:
    file = tmp_path / "speed.png"
    file.mkdir()
    result = invoke("bench", "demo", "--plot", file)
    assert result.exit_code == 1 and not result.stdout and "is a directory" in result.stderr


def test_bench_refuses_a_router_as_one_of_two_models(saved: Path) -> None:
    for slm, llm, said in ((saved, saved / "llm", "--slm"), (saved / "slm", saved, "--llm")):
        result = invoke("bench", "--slm", slm, "--llm", llm, "--device", "cpu")
        assert result.exit_code == 1 and not result.stdout and result.stderr.count("\n") == 1
        assert f"{said}: expected one language model" in result.stderr


def test_what_only_looks_like_json_is_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    for text in ("[1, 2, 3]", "[Tom] has 3 apples.", "[]", '"quoted"'):
        file.write_text(text)
        assert read_prompts(file) == [text]


def test_large_seeds_are_seeds() -> None:
    assert bench_json("demo", "--seed", 99999999999999, "--shares", "0.5", "--no-assisted")["complete"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n \n", ("is empty",)),
        ('{"prompt": "a"}\n{"text": "b"}\n', ("line 2", '"prompt"')),
        ('{"prompt": 3}\n', ("line 1", '"prompt"')),
        ('{"prompt": "a"}\n\n\n{"text": "b"}\n', ("line 4 ", '"text"')),
        ('["a", {"text": "b"}]', ("entry 2", '"text"')),
        ('["a", ""]', ("entry 2",)),
        (b"\xff\xfe\x00", ("no UTF-8",)),
    ],
    ids=["empty", "no prompt", "no text", "blank lines", "list", "empty text", "binary"],
)
def test_bench_refuses_prompts_it_cannot_read(tmp_path: Path, text: str | bytes, said: tuple[str, ...]) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = invoke("bench", "demo", "--prompts", file)
    assert result.exit_code == 1 and "--prompts" in result.stderr and result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr
