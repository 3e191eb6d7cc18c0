"""`docs/benchmarks/gpu.py`, tried with small models on a CPU: on a GPU it fills in `docs/performance.md`."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
SMALL = "--slm tiny --llm tiny --device cpu --dtype float32 --shares 0.5 --prompt-length 4 --max-new-tokens 2"


@pytest.mark.usefixtures("small_machine")
def test_every_batch_size_is_measured_with_both_caches_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark: Any = importlib.import_module("gpu")
    file = tmp_path / "gpu.json"
    arguments = [*shlex.split(SMALL), "--repeats", "1", "--output", str(file)]
    benchmark.main([*arguments, "--rows", "4"])
    reports = json.loads(file.read_text())["reports"]
    assert list(reports) == ["static, 4", "growing, 4"]
    said = capsys.readouterr().out
    assert "| static, 4 | CITER in lock-step, share 0.5 |" in said
    for aim in ("SLM step over its time", "share 0.5, speed over the floor's", "share 0.5, speed over the LLM's"):
        assert f"| static, 4 | {aim}" in said
    monkeypatch.setattr(benchmark, "measure", lambda model, name, rows, cache, wanted: reports[f"{cache}, 4"])
    benchmark.main([*arguments, "--rows", "4,1"])
    resumed = json.loads(file.read_text())["reports"]
    assert list(resumed) == [*reports, "static, 1", "growing, 1"] and reports.items() <= resumed.items()
    with pytest.raises(ValueError, match=r"--output: .*Give another file"):
        benchmark.main([*arguments, "--shares", "0.4"])
