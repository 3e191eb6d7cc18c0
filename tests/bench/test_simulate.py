"""`citer bench --simulate`: projections from two configurations."""

import json
from pathlib import Path
from typing import Any

import pytest

from citer_hf.bench.simulate import OVERHEAD, simulate, table
from citer_hf.costs import cost_of_config
from tests.chat_pairs import invoke
from tests.families import tiny_config

SLM = tiny_config("llama")
LLM = tiny_config("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
# A machine so slow that everything else than memory takes no time.
SLOW: dict[str, Any] = {"bandwidth": 0.01, "prompt_length": 60, "max_new_tokens": 40}


def test_a_step_takes_the_time_to_move_weights_and_cache() -> None:
    one, two = simulate(SLM, LLM, **SLOW, llm_bits=8, shares=(0, 1))
    cost = cost_of_config(LLM, bits=8)
    assert one["llm_step_s"] == pytest.approx(OVERHEAD + (cost.weight_bytes + 101 * cost.kv_bytes_per_token) / 1e7)
    assert one["time_per_token_s"] == one["slm_step_s"] < one["llm_step_s"]
    assert two["time_per_token_s"] == pytest.approx(two["slm_step_s"] + two["llm_step_s"])
    assert two["speedup"] < 1 < one["speedup"] and one["break_even_share"] > 0.9


def test_fewer_bits_and_more_devices_divide() -> None:
    (whole,) = simulate(SLM, LLM, **SLOW, shares=(0.2,))
    (small,) = simulate(SLM, LLM, **SLOW, shares=(0.2,), llm_bits=4)
    (shared,) = simulate(SLM, LLM, **SLOW, shares=(0.2,), tensor_parallel=2)
    assert small["llm_step_s"] == pytest.approx(whole["llm_step_s"] / 4, rel=0.1)
    assert shared["llm_step_s"] - OVERHEAD == pytest.approx((whole["llm_step_s"] - OVERHEAD) / 2)
    assert shared["bytes_per_gpu"] == pytest.approx(whole["bytes_per_gpu"] / 2, rel=0.1)


def test_a_batch_calls_the_llm_when_any_sequence_needs_it() -> None:
    (one,), (eight,) = (simulate(SLM, LLM, **SLOW, shares=(0.2,), batch_size=size) for size in (1, 8))
    assert one["llm_passes_per_position"] == pytest.approx(0.2)
    assert eight["llm_passes_per_position"] == pytest.approx(1 - 0.8**8)
    assert eight["speedup"] < one["speedup"] and eight["tokens_per_s"] > one["tokens_per_s"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--gpu: .* h100, .*--bandwidth, got None"),
        ({"gpu": "h100", "slm_bits": 0}, "slm_bits: .* got 0"),
        ({"gpu": "h100", "tensor_parallel": 0}, "tensor_parallel: .* got 0"),
        ({"gpu": "h100", "shares": (1.2,)}, "--shares: .* got 1.2"),
        (
            {"gpu": "h100", "prompt_length": 200, "max_new_tokens": 57},
            "--prompt-length, --max-new-tokens: .* 256 .* got 257",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        simulate(SLM, LLM, **options)


def test_the_command_projects_a_router_and_two_models(saved: Path) -> None:
    arguments = ("--gpu", "cpu-ddr5", "--shares", "0.2,0.4")
    bare = ["--slm", saved.parent / "slm", "--llm", saved.parent / "llm"]
    for source in ([saved], bare):
        result = invoke("bench", "--simulate", *source, *arguments, "--json")
        assert [one["share"] for one in json.loads(result.stdout)] == [0.2, 0.4], result.stderr
    lines = invoke("bench", "--simulate", saved, *arguments).stdout.splitlines()
    assert "not measured" in lines[-1] and all(len(line) <= 119 for line in lines)
    assert len(table(simulate(SLM, LLM, gpu="h100")).splitlines()) == 7


def test_the_command_follows_names_and_revisions(saved: Path, tmp_path: Path) -> None:
    tiny_config("llama", num_hidden_layers=7).save_pretrained(tmp_path / "deep")

    def llm_step(*source: Any) -> float:
        result = invoke("bench", "--simulate", *source, "--bandwidth", 0.01, "--shares", 1, "--json")
        return json.loads(result.stdout)[0]["llm_step_s"]

    plain = llm_step(saved)
    deep = llm_step(saved, "--llm", f"name_or_path={tmp_path / 'deep'}")
    assert deep > plain == llm_step("--slm", saved.parent / "slm", "--llm", saved, "--llm", "subfolder=llm")
    assert deep == llm_step("--slm", saved.parent / "slm", "--llm", tmp_path / "deep")
