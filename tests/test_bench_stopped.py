"""What `citer bench` keeps and says when it is interrupted, when memory runs out, and when anything else fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import citer_hf.demo
from citer_hf import CiterForCausalLM
from citer_hf.bench import command, machine
from citer_hf.bench.run import Bench
from citer_hf.memory_citer import weight_bytes

from .chat_pairs import invoke, save_demo_pair

QUICK = ("--device", "cpu", "--max-new-tokens", 4, "--prompt-length", 6, "--repeats", 1, "--warmup", 0)
HELP = ("--dtype bfloat16", "--batch-size", "--prompt-length", "quantized", "--device")
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo_pair(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def small_machine(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(citer_hf.demo, "PAIR", saved)
    monkeypatch.setattr(machine, "CPU_BUFFER", 1 << 20)


def fail_while(monkeypatch: pytest.MonkeyPatch, part: str, kind: str, error: Exception, after: int = 0) -> None:
    """Let the forward pass of one model, or `generate` of the pair, fail while a contender of this kind runs."""
    real_load, observe, time = command.load, Bench._observe, Bench._time
    running: list[str] = []

    def load(*args: Any) -> Any:
        model = real_load(*args)
        failing, name = (model, "generate") if part == "pair" else (getattr(model, part), "forward")
        forward = getattr(failing, name)

        def fail(*inputs: Any, **kwargs: Any) -> Any:
            if running[-1:] == [kind]:
                raise error
            return forward(*inputs, **kwargs)

        monkeypatch.setattr(failing, name, fail)
        return model

    def watched(method: Any) -> Any:
        calls: list[str] = []

        def run(bench: Bench, contender: Any) -> Any:
            calls.append(contender.kind)
            running.append(contender.kind if calls.count(kind) > after else "")
            return method(bench, contender)

        return run

    monkeypatch.setattr(command, "load", load)
    monkeypatch.setattr(Bench, "_observe" if after == 0 else "_time", watched(observe if after == 0 else time))


# ---- out of memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LLM alone", "SLM alone", "CITER", "floor"])
@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "cpu", "python"])
def test_out_of_memory_names_the_model_that_was_running(
    monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception
) -> None:
    for part in ("slm", "llm"):
        if kind == f"{'llm' if part == 'slm' else 'slm'} alone".replace("llm", "LLM").replace("slm", "SLM"):
            continue
        with monkeypatch.context() as patch:
            fail_while(patch, part, kind, error)
            result = invoke("bench", "demo", *QUICK, "--shares", "0.5,1", "--no-assisted")
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert "both models" not in result.stderr
        # The pair has said it already; of a bare model the bench finds it out.
        said = f"{part.upper()}: out of memory while" if kind == "CITER" else f"the {part.upper()} while generating"
        for words in (said, "GB", "of weights" if kind != "CITER" else "for its weights", "There were", *HELP):
            assert words in result.stderr


def test_out_of_memory_of_neither_model_tells_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_while(monkeypatch, "pair", "CITER", ERRORS[0])
    result = invoke("bench", "demo", *QUICK, "--no-assisted")
    assert result.exit_code == 1 and "both models while generating" in result.stderr


@pytest.mark.parametrize("part", ["slm", "llm"])
def test_out_of_memory_of_assisted_generation_is_a_note(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    fail_while(monkeypatch, part, "assisted generation", ERRORS[0])
    result = invoke("bench", "demo", *QUICK, "--shares", "0.5", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [row["kind"] for row in report["rows"]] == ["LLM alone", "SLM alone", "CITER", "floor"]
    assert "assisted generation was not measured" in report["notes"][0]
    assert f"the {part.upper()} while" in report["notes"][0]


@pytest.mark.parametrize("role", ["slm", "llm"])
@pytest.mark.parametrize(
    "error", [*ERRORS, OSError(12, "Cannot allocate memory")], ids=["accelerator", "cpu", "python", "system"]
)
def test_out_of_memory_while_loading_names_the_model(
    monkeypatch: pytest.MonkeyPatch, saved: Path, role: str, error: Exception
) -> None:
    real = AutoModelForCausalLM.from_pretrained

    def load(source: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(source).name == role:
            raise error
        return real(source, *args, **kwargs)

    needed = weight_bytes(getattr(CiterForCausalLM.from_pretrained(saved), role)) / 1e9
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for source in (["demo"], ["--slm", saved / "slm", "--llm", saved / "llm"]):
        result = invoke("bench", *source, "--device", "cpu")
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        for said in (f"{role.upper()}: out of memory while it was loaded", f"about {needed:.3g} GB", *HELP):
            assert said in result.stderr
    with pytest.raises(type(error)) as caught:
        CiterForCausalLM.from_pretrained(saved)
    for said in (f"{role}_quantization_config", "device_map", "dtype", str(error)):
        assert said in str(caught.value)


# ---- interrupted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    time_one = Bench._time

    def interrupted(bench: Bench, contender: Any) -> Any:
        if contender.kind == "floor":
            raise KeyboardInterrupt
        return time_one(bench, contender)

    monkeypatch.setattr(Bench, "_time", interrupted)
    file = tmp_path / "plot.svg"
    result = invoke("bench", "demo", *QUICK, "--shares", "0.5", "--plot", file, *["--json"] * as_json)
    assert result.exit_code == 130 and file.exists()
    if as_json:
        report = json.loads(result.stdout)
        assert report["interrupted"] and not report["complete"]
        names = [row["name"] for row in report["rows"]]
        assert names == ["LLM alone", "SLM alone", "assisted generation", "CITER, share 0.5"]
        assert report["rows"][3]["relative_to_floor"] is None and len(report["rows"][3]["seconds"]) == 1
    else:
        assert "Interrupted" in result.stdout and "CITER, share 0.5" in result.stdout and "floor," not in result.stdout


def test_ctrl_c_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    file = tmp_path / "plot.png"
    monkeypatch.setattr(Bench, "_observe", interrupted)
    result = invoke("bench", "demo", *QUICK, "--json", "--plot", file)
    assert result.exit_code == 130 and json.loads(result.stdout)["rows"] == [] and not file.exists()
    assert "Interrupted before" in invoke("bench", "demo", *QUICK).stdout
    monkeypatch.setattr(command, "load", interrupted)
    assert invoke("bench", "demo", *QUICK).exit_code == 130
