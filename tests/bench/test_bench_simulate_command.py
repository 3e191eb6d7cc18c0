"""`citer bench --simulate` on the command line: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from citer_hf.bench.devices import DEVICES
from citer_hf.cli import app
from citer_hf.cli_bench import MEASURES, PROJECTS
from citer_hf.demo import PAIR
from tests.families import tiny_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--gpu", "abacus"], "--gpu: expected one of .*got 'abacus'. Choose one, or give --bandwidth."),
        (["demo", "--bandwidth", "-1"], "--bandwidth: .* got -1.0. Correct --bandwidth."),
        (["demo", "--gpu", "h100", "--slm-bits", "0"], "--slm-bits: .* Correct --slm-bits."),
        (["demo", "--gpu", "h100", "--llm-bits", "99"], "--llm-bits: .* Correct --llm-bits."),
        (["demo", "--gpu", "h100", "--replicas", "0"], "--replicas: .* Correct --replicas."),
        (["demo", "--gpu", "h100", "--tensor-parallel", "0"], "--tensor-parallel: .* Correct --tensor-parallel."),
        (["demo", "--gpu", "h100", "--tensor-parallel", "3"], "--tensor-parallel: expected a number of devices"),
        (["--slm", "none.json", "--llm", "none.json", "--gpu", "h100"], "--slm: .* got 'none.json'"),
        (["--slm", str(PAIR), "--llm", str(PAIR), "--gpu", "h100"], "--slm: expected one model"),
        (["demo"], "--simulate: give the machine"),
        (
            ["demo", "--gpu", "h100", "--prompt-length", "1000000"],
            "--prompt-length, --max-new-tokens: expected at most .*max_position_embeddings.* got 1000064. Correct --p",
        ),
    ],
)
def test_the_command_line_names_its_options(arguments: list[str], message: str):
    result = CliRunner().invoke(app, ["bench", "--simulate", *arguments])
    assert result.exit_code == 1
    assert re.match(f"Error: {message}", result.stderr)


def test_a_model_where_a_router_is_expected_is_called_by_its_place(tmp_path: Path):
    (tmp_path / "config.json").write_text(tiny_config("llama").to_json_string())
    result = CliRunner().invoke(app, ["bench", "--simulate", str(tmp_path), "--gpu", "h100"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: MODEL: expected a router")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--thresholds", "0.5"], "Give --shares instead"),
        (["--plot", "speed.png"], "Give --json instead"),
        (["--prompts", "prompts.txt"], "Give their length as --prompt-length instead"),
        (["--device", "cpu"], "--gpu or --bandwidth"),
        (["--dtype", "auto"], "Give --slm-bits and --llm-bits instead"),
        (["--repeats", "3"], "Leave it out"),
        (["--warmup", "1"], "Leave it out"),
        (["--seed", "0"], "Leave it out"),
        (["--cache-implementation", "static"], "Leave it out"),
        (["--released-loop"], "Leave it out"),
        (["--assisted"], "Leave it out"),
        (["--no-assisted"], "Leave it out"),
        (["--trust-remote-code"], "Leave it out"),
    ],
)
def test_a_projection_refuses_what_it_cannot_honour_even_at_its_default(
    arguments: list[str], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "demo", "--simulate", "--gpu", "h100", *arguments])
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(f"Error: {arguments[0]}: .*{remedy}.*\n", result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", ["--gpu", "--bandwidth", "--slm-bits", "--llm-bits", "--tensor-parallel", "--replicas"]
)
def test_a_measurement_refuses_what_only_a_projection_can_honour(option: str):
    value = "h100" if option == "--gpu" else "1"
    result = CliRunner().invoke(app, ["bench", "demo", option, value])
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        f"Error: {option}: this is for --simulate alone; .* Add --simulate, or leave it out.\n", result.stderr
    )


def test_every_option_of_the_bench_is_measured_projected_or_both():
    both = {"model", "slm", "llm", "shares", "prompt_length", "batch_size", "max_new_tokens", "json", "simulate"}
    command = typer.main.get_command(app).commands["bench"]
    known = both | set(MEASURES) | set(PROJECTS)
    assert {parameter.name for parameter in command.params} - {"help"} == known


def test_the_help_names_the_devices_that_there_are():
    text = " ".join(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert f"With --simulate: {', '.join(DEVICES)}." in text


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_that_is_named_can_be_projected(name: str):
    result = CliRunner().invoke(app, ["bench", "demo", "--simulate", "--gpu", name, "--shares", "0.2"])
    assert result.exit_code == 0
