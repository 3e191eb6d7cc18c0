"""`citer bench --simulate`: projections from two configurations."""

import json
from pathlib import Path
from typing import Any

import pytest

from citer_hf.bench.simulate import OVERHEAD, PassTimes, simulate, table
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


def test_a_batch_shares_the_calls_of_its_llm_and_agreement_saves_some() -> None:
    (one,), (eight,) = (simulate(SLM, LLM, **SLOW, shares=(0.2,), batch_size=size) for size in (1, 8))
    (agreed,) = simulate(SLM, LLM, **SLOW, shares=(0.2,), batch_size=8, agreement=0.9)
    assert one["llm_passes_per_position"] == pytest.approx(0.2)
    assert 0.2 < eight["llm_passes_per_position"] < 0.25 and eight["slm_steps_per_position"] > 1
    assert agreed["llm_passes_per_position"] < 0.1 and agreed["speedup"] > eight["speedup"]
    assert eight["speedup"] < one["speedup"] and eight["tokens_per_s"] > one["tokens_per_s"]


def times(slm_step: float, sequences: int = 1, per_token: float = 0.0) -> PassTimes:
    return PassTimes(sequences, slm_step, lambda tokens: 1.0 + per_token * (tokens - 1))


def test_break_even_is_what_the_slm_leaves_when_tokens_are_free() -> None:
    # slm + p·llm = llm at p = 1 - slm/llm.
    assert times(0.1).break_even() == pytest.approx(0.9, abs=2e-3)
    # Eight sequences draft some tokens each before the LLM runs for all of them.
    assert 1 - 0.1**0.125 < (times(0.1, sequences=8).break_even() or 0) < 0.9
    assert times(1.2).break_even() is None


def test_a_projection_counts_the_tokens_of_a_catch_up_and_the_drafts_that_hold() -> None:
    # With llm(k) = 1 + a·(k - 1) and mean 1/p: slm + p + a·(1 - p) = 1 at p = 1 - slm/(1 - a).
    assert times(0.1, per_token=0.2).break_even() == pytest.approx(1 - 0.1 / 0.8, abs=2e-3)
    assert times(0.1, per_token=0.2).best(0.01) == pytest.approx((0.1 + 0.01 + 0.2 * 0.99, 0.01, 1))
    assert times(0.1, per_token=0.2).best(0) == (0.1, 0, 1)
    # Every flagged token holds: the longest draft, 32 of them.
    assert times(0.1).best(0.5, agreement=1.0) == pytest.approx((0.1 + 0.5 / 32, 0.5 / 32, 1))
    # Three of four hold, as many drafts as pay: (1 - 0.75^n) / 0.25 of n.
    seconds, passes, steps = times(0.1).best(1.0, agreement=0.75)
    assert seconds == pytest.approx(min((1 + 0.1 * n) * 0.25 / (1 - 0.75**n) for n in range(1, 33)))
    assert seconds == pytest.approx(0.1 * steps + passes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--gpu: .* h100, .*--bandwidth, got None"),
        ({"gpu": "h100", "slm_bits": 0}, "slm_bits: .* got 0"),
        ({"gpu": "h100", "tensor_parallel": 0}, "tensor_parallel: .* got 0"),
        ({"gpu": "h100", "shares": (1.2,)}, "--shares, --agreement: .* got .1.2"),
        ({"gpu": "h100", "prompt_length": 200, "max_new_tokens": 57}, "--prompt-length, .* 200 tokens and 57 .* 256"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        simulate(SLM, LLM, **options)


def test_the_command_projects_a_router(saved: Path) -> None:
    arguments = ("--gpu", "cpu-ddr5", "--shares", "0.2,0.4")
    result = invoke("bench", "--simulate", saved, *arguments, "--json")
    assert [one["share"] for one in json.loads(result.stdout)] == [0.2, 0.4], result.stderr
    lines = invoke("bench", "--simulate", saved, *arguments).stdout.splitlines()
    assert "not measured" in lines[-1] and all(len(line) <= 119 for line in lines)
    assert len(table(simulate(SLM, LLM, gpu="h100")).splitlines()) == 7


def test_the_command_projects_two_models_and_follows_names_and_subfolders(saved: Path, tmp_path: Path) -> None:
    tiny_config("llama", num_hidden_layers=7).save_pretrained(tmp_path / "deep")

    def llm_step(*source: Any) -> float:
        result = invoke("bench", "--simulate", *source, "--bandwidth", 0.01, "--shares", 1, "--json")
        return json.loads(result.stdout)[0]["llm_step_s"]

    plain = llm_step(saved)
    deep = llm_step(saved, "--llm", f"name_or_path={tmp_path / 'deep'}")
    assert deep > plain == llm_step("--slm", saved.parent / "slm", "--llm", saved, "--llm", "subfolder=llm")
    assert deep == llm_step("--slm", saved.parent / "slm", "--llm", tmp_path / "deep")
