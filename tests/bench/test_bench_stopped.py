"""What `citer bench` keeps and says when it is interrupted, when memory runs out, and when anything else fails."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from citer_hf import CiterForCausalLM
from citer_hf.bench import command, interruption, run
from citer_hf.bench.run import Bench
from citer_hf.model.memory import weight_bytes
from tests.chat_pairs import QUICK_BENCH as QUICK
from tests.chat_pairs import invoke

pytestmark = pytest.mark.usefixtures("small_machine")
HELP = ("--dtype bfloat16", "--batch-size", "--prompt-length", "quantized", "--device")
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals that end a program, also where the tests run in the background and ignore some."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
            try:
                return method(bench, contender)
            finally:
                running.clear()

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


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def stop_at(monkeypatch: pytest.MonkeyPatch, kind: str, stop: Any, repetition: int = 1) -> None:
    """Do something in the place of timing a contender of this kind at this repetition."""
    time_one, calls = Bench._time, []

    def time(bench: Bench, contender: Any) -> Any:
        calls.append(contender.kind)
        if contender.kind == kind and calls.count(kind) == repetition:
            stop()
        return time_one(bench, contender)

    monkeypatch.setattr(Bench, "_time", time)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    stop_at(monkeypatch, "floor", interrupt)
    file = tmp_path / "plot.svg"
    result = invoke("bench", "demo", *QUICK, "--shares", "0.5", "--plot", file, *["--json"] * as_json)
    assert result.exit_code == 130 and file.exists()
    if as_json:
        report = json.loads(result.stdout)
        assert report["interrupted"] and not report["complete"] and report["error"] is None
        *timed, floor = report["rows"]
        assert [row["name"] for row in timed] == ["LLM alone", "SLM alone", "assisted generation", "CITER, share 0.5"]
        assert all(len(row["seconds"]) == 1 for row in timed) and timed[3]["relative_to_floor"] is None
        # What an untimed run of it has shown.
        assert floor["seconds"] == [] and floor["peak_memory_bytes"] > 0 and floor["slm_passes_per_position"] == 1
        assert not any(
            floor[name] for name in ("speedup", "ms_per_token", "first_token_seconds", "bandwidth_fraction")
        )
    else:
        assert "Interrupted: this is what was measured" in result.stdout and "CITER, share 0.5" in result.stdout


def test_the_heading_says_how_many_repetitions_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--shares", "0.5", "--no-assisted", *QUICK, "--repeats", 30)
    stop_at(monkeypatch, "floor", interrupt, repetition=3)
    assert "median of 2 to 3 (smallest" in invoke("bench", "demo", *options).stdout
    stop_at(monkeypatch, "LLM alone", interrupt, repetition=3)
    assert "median of 2 (smallest" in invoke("bench", "demo", *options).stdout


@pytest.mark.parametrize("kind", ["LLM alone", "CITER"])
def test_ctrl_c_while_it_warms_up_keeps_what_was_found_out(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    options = ("--shares", "0.5", "--no-assisted", *QUICK, "--warmup", 1)
    stop_at(monkeypatch, kind, interrupt)
    said = invoke("bench", "demo", *options).stdout
    assert said.startswith("Interrupted before anything was timed") and "median" not in said
    for part in ("demo on cpu", "MB moved", "CITER, share 0.5", "Milliseconds of one forward pass"):
        assert part in said
    for part in ("tokens / s", "before anything was measured"):
        assert part not in said
    stop_at(monkeypatch, kind, interrupt)
    rows = json.loads(invoke("bench", "demo", *options, "--json").stdout)["rows"]
    assert [row["llm_share"] for row in rows] == [1, 0, rows[2]["llm_share"], rows[2]["llm_share"]]
    assert all(row["bytes_moved"] > 0 and not row["seconds"] for row in rows)


def test_ctrl_c_between_two_notes_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whenever it comes, a repetition is kept whole or not at all.
    class Times(list[Any]):
        def append(self, times: Any) -> None:
            super().append(times)
            raise KeyboardInterrupt

    real = run.Observed.__init__

    def observed(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(self, name, Times(value))

    monkeypatch.setattr(run.Observed, "__init__", observed)
    report = json.loads(invoke("bench", "demo", *QUICK, "--shares", "0.5", "--json").stdout)
    assert report["interrupted"] and [len(row["seconds"]) for row in report["rows"]] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    file, told = tmp_path / "plot.png", ["--json"] * as_json
    for place, name in ((Bench, "_observe"), (run, "describe_machine"), (command, "load"), (run, "make_batches")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupt)
            result = invoke("bench", "demo", *QUICK, *told, "--plot", file)
        assert result.exit_code == 130 and not file.exists()
        if as_json:
            report = json.loads(result.stdout)
            assert report["interrupted"] and not report["complete"] and report["rows"] == []
            assert report["model"] == "demo" and report["options"]["max_new_tokens"] == 4
        else:
            assert "Interrupted before anything was measured" in result.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_keeps_what_is_done_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    number = getattr(signal, name)
    before = [signal.getsignal(one) for one in interruption.SIGNALS]
    stop_at(monkeypatch, "CITER", lambda: signal.raise_signal(number))
    result = invoke("bench", "demo", *QUICK, "--shares", "0.5", "--json")
    assert result.exit_code == 128 + number
    report = json.loads(result.stdout)
    assert report["interrupted"] and [len(row["seconds"]) for row in report["rows"]] == [1, 1, 1, 0, 0]
    assert [signal.getsignal(one) for one in interruption.SIGNALS] == before


@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_while_results_are_told_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool) -> None:
    name = "print_json" if as_json else "print_report"
    real, file = getattr(command, name), tmp_path / "plot.png"

    def tell(report: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(report)

    monkeypatch.setattr(command, name, tell)
    result = invoke("bench", "demo", *QUICK, "--shares", "1", "--plot", file, *["--json"] * as_json)
    assert result.exit_code == 130 and "CITER, share 1" in result.stdout and not file.exists()


def test_a_second_signal_does_not_wait() -> None:
    with interruption.interruptible() as stop, pytest.raises(KeyboardInterrupt), stop.waits():
        signal.raise_signal(signal.SIGINT)
        assert stop.has_come
        signal.raise_signal(signal.SIGINT)


def test_signals_that_are_ignored_stay_ignored_and_threads_leave_all_as_they_are() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruption.interruptible():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    found: list[Any] = []

    def elsewhere() -> None:
        with interruption.interruptible():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_ctrl_c_while_the_plot_is_drawn_leaves_the_tables_and_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("citer_hf.runs.os.replace", interrupt)
    result = invoke("bench", "demo", *QUICK, "--shares", "1", "--plot", tmp_path / "speed.png")
    assert result.exit_code == 130 and "CITER, share 1" in result.stdout and list(tmp_path.iterdir()) == []
    assert "Traceback" not in result.stderr and "Interrupted" in result.stderr


# ---- errors half-way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("error", "said"),
    [(ERRORS[0], "the LLM while"), (RuntimeError("device-side assert"), "RuntimeError: device-side")],
)
def test_an_error_half_way_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str, as_json: bool
) -> None:
    fail_while(monkeypatch, "llm", "LLM alone", error, after=2)
    file = tmp_path / "plot.svg"
    options = ("--shares", "0.5", "--no-assisted", *QUICK, "--repeats", 9, "--plot", file)
    result = invoke("bench", "demo", *options, *["--json"] * as_json)
    assert result.exit_code == 1 and file.exists() and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ") and said in result.stderr
    if as_json:
        report = json.loads(result.stdout)
        assert not report["complete"] and not report["interrupted"] and said in report["error"]
        assert [len(row["seconds"]) for row in report["rows"]] == [2, 2, 2, 2]
    else:
        assert result.stdout.startswith("Ended by an error: this is what was") and "median of 2 " in result.stdout


def test_an_error_at_once_is_all_there_is_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_while(monkeypatch, "llm", "LLM alone", RuntimeError("device-side assert"))
    result = invoke("bench", "demo", *QUICK)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr == "Error: RuntimeError: device-side assert\n"
    report = json.loads(invoke("bench", "demo", *QUICK, "--json").stdout)
    assert not report["complete"] and report["rows"] == [] and "device-side" in report["error"]


def test_what_is_optional_may_also_fail_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_while(monkeypatch, "llm", "assisted generation", ERRORS[0], after=1)
    result = invoke("bench", "demo", *QUICK, "--shares", "0.5", "--repeats", 3, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["complete"]
    assert {row["kind"]: len(row["seconds"]) for row in report["rows"]} == {
        "LLM alone": 3,
        "SLM alone": 3,
        "assisted generation": 1,
        "CITER": 3,
        "floor": 3,
    }
    assert len(report["notes"]) == 1 and "not measured to the end" in report["notes"][0]
