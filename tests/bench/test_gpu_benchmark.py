"""`docs/benchmarks/gpu.py`, which fills in `docs/performance.md` where there is a GPU, tried with small models on a
CPU."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
SMALL = shlex.split(
    "--slm tiny --llm tiny --device cpu --dtype float32 --shares 0.5 --prompt-length 4 --max-new-tokens 4 --repeats 1"
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("citer_hf.bench.machine.CPU_BUFFER", 1 << 20)
    return importlib.import_module("gpu")


def test_every_batch_size_is_measured_with_both_caches(benchmark, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    benchmark.main([*SMALL, "--rows", "1,4", "--output", str(file)])
    reports = json.loads(file.read_text())["reports"]
    assert list(reports) == ["static, 1", "growing, 1", "static, 4", "growing, 4"]
    said = capsys.readouterr().out
    assert "| static, 4 | CITER in lock-step, share 0.5 |" in said
    for aim in ("SLM step over its time", "share 0.5, speed over the floor's", "share 0.5, speed over the LLM's"):
        assert f"| static, 4 | {aim}" in said


def test_what_was_measured_before_an_interruption_is_not_measured_again(benchmark, tmp_path, monkeypatch):
    file = tmp_path / "gpu.json"
    benchmark.main([*SMALL, "--rows", "1", "--output", str(file)])
    before = json.loads(file.read_text())["reports"]
    monkeypatch.setattr(benchmark, "measure", lambda model, name, rows, cache, wanted: before["static, 1"])
    benchmark.main([*SMALL, "--rows", "1,2", "--output", str(file)])
    after = json.loads(file.read_text())["reports"]
    assert [after[name] for name in before] == list(before.values()) and len(after) == 4


def test_runs_of_other_settings_are_not_mixed(benchmark, tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"setting": {"slm": "tiny"}, "reports": {}}))
    with pytest.raises(ValueError, match=r"--output: .*Give another file"):
        benchmark.main([*SMALL, "--rows", "1", "--output", str(file)])
