"""What `citer bench` is made of: forced shares, the loops to compare with, the cost curve, counting, prompts."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

import citer_hf.demo
from citer_hf import CiterForCausalLM
from citer_hf.bench import machine
from citer_hf.bench.clock import Clock
from citer_hf.bench.contenders import CITER, LOCK_STEP, Decisions, contenders, greedy_without_end
from citer_hf.bench.costs import ModelCost
from citer_hf.bench.counting import Pass, Passes, count_passes
from citer_hf.bench.curve import CostCurve, break_even, measure_curve
from citer_hf.bench.forced import ForcedRouter, decides_by, forced_numbers, replayed_numbers
from citer_hf.bench.machine import watch_memory
from citer_hf.bench.options import BenchOptions, Setting, check_context, check_plot, parse_numbers
from citer_hf.bench.prompts import Batch, file_batches, pad, synthetic_batch
from citer_hf.bench.results import Spread, ratios
from citer_hf.bench.run import Bench
from tests.conftest import make_pair, random_prompts


@pytest.fixture(scope="module")
def shipped() -> Iterator[Any]:
    model = CiterForCausalLM.from_pretrained(citer_hf.demo.PAIR)
    with greedy_without_end(model):
        yield model


def texts(model: Any, batch: Batch, options: BenchOptions) -> dict[str, torch.Tensor]:
    """What each contender writes, by its name."""
    decisions, written = Decisions(), {}
    with greedy_without_end(model):
        for contender in contenders(model, options, decisions):
            text = contender.decode(batch, 0, False)
            decisions.note(contender, 0, text)
            written[contender.name] = text.tokens
    return written


# ---- forced shares ----------------------------------------------------------------------------------------------


def deferred(tokens: int, share: float, seed: int = 0, text: int = 0) -> torch.Tensor:
    return forced_numbers(tokens, seed, text)[:tokens] < Setting(share=share).router_threshold


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("tokens", [1, 7, 24, 64, 1000])
def test_a_forced_share_is_as_exact_as_the_text_is_long(share: float, tokens: int) -> None:
    for seed in range(5):
        assert abs(int(deferred(tokens, share, seed).sum()) - share * tokens) <= 0.5 + 1e-6


@pytest.mark.parametrize("rows", [1, 4])
def test_a_forced_share_is_what_the_pair_has_of_the_llm(shipped: Any, rows: int) -> None:
    batch = synthetic_batch(shipped.vocab_size, 8, rows, seed=0)
    for seed in range(3):
        options = BenchOptions(shares=(0.2,), seed=seed, batch_size=rows, max_new_tokens=64, assisted=False)
        to_llm = contenders(shipped, options, Decisions())[2].decode(batch, 0, False).to_llm
        # Rows that wait use up numbers of which they need none.
        assert float(to_llm.float().mean()) == pytest.approx(0.2, abs=0.5 / 64 if rows == 1 else 0.08)


def test_forced_decisions_are_independent_between_rows_and_tokens() -> None:
    # One call gives each row a number.
    rows = forced_numbers(2 * 20_000).view(-1, 2).T
    for lag in (1, 2, 8, 20_000):
        for one, other in ((rows[0], rows[1]), (rows[0, lag:], rows[0, :-lag]), (rows[0, lag:], rows[1, :-lag])):
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.03


def test_forced_decisions_come_again_and_differ_between_texts_and_seeds() -> None:
    first = forced_numbers(50, 3, 1)
    assert torch.equal(forced_numbers(50, 3, 1), first)
    for seed, text in ((3, 2), (4, 1), (4, 0), (1 << 62, 1), (-3, 1)):
        assert not torch.equal(forced_numbers(50, seed, text), first)


def test_forced_decisions_neither_use_nor_change_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    numbers = forced_numbers(3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    assert torch.equal(forced_numbers(3), numbers)


def test_a_forced_router_gives_its_numbers_one_after_the_other_and_begins_again() -> None:
    router, hidden = ForcedRouter(torch.arange(7.0)), torch.zeros(3, 1, 4)
    calls = [router(hidden, hidden) for _ in range(3)]
    assert all(scores.shape == (3, 1) for scores in calls)
    # Of the last numbers there are too few for all rows.
    assert [scores.flatten().tolist() for scores in calls] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    router.reset()
    assert torch.equal(router(hidden, hidden), calls[0])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
def test_decisions_are_repeated_at_the_threshold_of_any_share(share: float) -> None:
    to_llm = deferred(12, share).view(3, 4)
    router, hidden = ForcedRouter(replayed_numbers(to_llm)), torch.zeros(3, 1, 4)
    threshold = Setting(share=share).router_threshold
    assert torch.equal(torch.cat([router(hidden, hidden) < threshold for _ in range(4)], dim=1), to_llm)


def test_the_own_router_comes_back_whatever_happens(pair: CiterForCausalLM) -> None:
    own, forced = pair.router, ForcedRouter(torch.zeros(1))
    with pytest.raises(KeyboardInterrupt), decides_by(pair, forced):
        assert pair.router is forced
        raise KeyboardInterrupt
    assert pair.router is own
    with decides_by(pair, None):
        assert pair.router is own


# ---- the loops --------------------------------------------------------------------------------------------------


def test_the_loops_write_the_text_of_the_pair(shipped: Any) -> None:
    options = BenchOptions(
        shares=(0, 0.3, 1), thresholds=(0.8,), max_new_tokens=24, released_loop=True, assisted=False
    )
    written = texts(shipped, synthetic_batch(shipped.vocab_size, 12, 1, seed=4), options)
    assert all(tokens.shape == (1, 24) for tokens in written.values())
    assert torch.equal(written["CITER, share 0"], written["SLM alone"])
    assert torch.equal(written["CITER, share 1"], written["LLM alone"])
    for setting in options.settings:
        for loop in ("floor", "released loop"):
            assert torch.equal(written[f"{loop}, {setting.label}"], written[f"CITER, {setting.label}"])


@pytest.mark.parametrize(("slm", "llm"), [("llama", "gemma2"), ("gpt2", "qwen2"), ("bloom", "llama")])
def test_the_loops_write_the_text_of_the_pair_also_in_padded_batches(slm: str, llm: str) -> None:
    model = make_pair(slm, llm)
    options = BenchOptions(shares=(0.3,), batch_size=3, max_new_tokens=10, released_loop=True, assisted=False)
    written = texts(model, pad(random_prompts()), options)
    for way in ("floor", "released loop", LOCK_STEP):
        assert torch.equal(written[f"{way}, share 0.3"], written["CITER, share 0.3"]), way


@pytest.mark.parametrize("cache", [None, "static"])
def test_rows_that_wait_their_lock_step_and_their_floor_make_the_same_decisions(
    shipped: Any, cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured times, on a busy machine, may tell of an SLM as dear as the LLM, for which no row waits.
    monkeypatch.setattr("citer_hf.model.batch.Pace.ratio", 0.1)
    monkeypatch.setattr("citer_hf.model.batch.Pace.growth", 0.0)
    options = BenchOptions(
        shares=(0.2, 0.5), batch_size=6, max_new_tokens=48, cache_implementation=cache, assisted=False
    )
    decisions, decided, written = Decisions(), {}, {}
    batch = synthetic_batch(shipped.vocab_size, 8, 6, seed=1)
    for contender in contenders(shipped, options, decisions)[2:]:
        with count_passes(shipped) as passes:
            text = contender.decode(batch, 0, False)
        decisions.note(contender, 0, text)
        decided[contender.name], written[contender.name] = text.to_llm, text.tokens
        if contender.kind == CITER:
            assert len(passes.slm) > 48, "no row has waited"
    for setting in options.settings:
        first, *others = (f"{way}, {setting.label}" for way in (CITER, LOCK_STEP, "floor"))
        for other in others:
            assert torch.equal(decided[other], decided[first]) and torch.equal(written[other], written[first])


@pytest.mark.parametrize(("slm", "llm"), [("llama", "gemma2"), ("gpt2", "qwen2")])
@pytest.mark.parametrize("lengths", [(9,), (5, 9, 12)])
def test_everything_writes_the_same_with_static_caches(slm: str, llm: str, lengths: tuple[int, ...]) -> None:
    model, batch = make_pair(slm, llm), pad(random_prompts(lengths))
    options = BenchOptions(shares=(0, 0.3), batch_size=len(lengths), max_new_tokens=10, assisted=len(lengths) == 1)
    growing = texts(model, batch, options)
    static = texts(model, batch, replace(options, cache_implementation="static"))
    assert list(static) == list(growing)
    ways = ("floor", CITER) if len(lengths) == 1 else ("floor", CITER, LOCK_STEP)
    assert all(torch.equal(static[f"{way}, share 0.3"], static["CITER, share 0.3"]) for way in ways)
    for name in growing:
        # How long rows wait, and so what they decide, depends on measured times.
        if len(lengths) == 1 or "share 0.3" not in name:
            assert torch.equal(static[name], growing[name]), name


def test_passes_are_counted_though_they_would_be_compiled(pair: CiterForCausalLM) -> None:
    with greedy_without_end(pair):
        parts = (pair, pair.slm, pair.llm)
        with count_passes(pair) as passes:
            assert all(part.generation_config.disable_compile for part in parts)
            pair.generate(torch.tensor(random_prompts((5,))), max_new_tokens=4, cache_implementation="static")
        assert not any(part.generation_config.disable_compile for part in parts)
    assert [one.tokens for one in passes.slm] == [5, 1, 1, 1]


def test_the_released_loop_reads_the_whole_text_at_every_deferral(pair: CiterForCausalLM) -> None:
    options = BenchOptions(shares=(1.0,), max_new_tokens=3, released_loop=True, assisted=False)
    decisions = Decisions()
    batch = synthetic_batch(pair.vocab_size, 5, 1, seed=0)
    noted = {}
    with greedy_without_end(pair):
        for contender in contenders(pair, options, decisions):
            with count_passes(pair) as passes:
                decisions.note(contender, 0, contender.decode(batch, 0, False))
            noted[contender.kind] = passes
    assert noted["released loop"].llm == [Pass(1, 5, 0), Pass(1, 6, 0), Pass(1, 7, 0)]
    steps = [Pass(1, 5, 0), Pass(1, 1, 5), Pass(1, 1, 6)]
    assert noted["released loop"].slm == noted["floor"].llm == noted[CITER].llm == noted["LLM alone"].llm == steps


def test_all_texts_are_of_equal_length_and_stop_at_once_when_only_the_first_token_is_timed() -> None:
    model = make_pair(slm="llama", llm="llama")
    # A pair all of whose tokens would end the text.
    model.llm.generation_config.eos_token_id = model.generation_config.eos_token_id = list(range(model.vocab_size))
    options = BenchOptions(shares=(0.5,), max_new_tokens=6, released_loop=True)
    decisions, batch = Decisions(), synthetic_batch(model.vocab_size, 4, 1, seed=0)
    with greedy_without_end(model):
        for contender in contenders(model, options, decisions):
            text = contender.decode(batch, 0, False)
            decisions.note(contender, 0, text)
            assert text.tokens.shape == (1, 6), contender.name
            first = contender.decode(batch, 0, True).tokens
            assert torch.equal(first, text.tokens[:, : first.shape[1]])
            # A step of assisted generation writes as many tokens as were guessed right.
            assert first.shape[1] == 1 or contender.kind == "assisted generation"


# ---- what steps cost --------------------------------------------------------------------------------------------


def curve(slm_step: float, rows: int = 1, per_token: float = 0.0) -> CostCurve:
    return CostCurve(128, rows, slm_step, {size: 1.0 + per_token * (size - 1) for size in (1, 2, 3, 4, 8, 16, 32)})


def test_break_even_is_what_the_step_of_the_slm_leaves_when_catch_ups_cost_nothing_more() -> None:
    # L_s + p·L_l = L_l at p = 1 - L_s/L_l.
    assert break_even(curve(0.1)).share == pytest.approx(0.9, abs=1e-4)
    # In lock-step the LLM runs when any of four rows needs it.
    assert break_even(curve(0.1, rows=4)).share == pytest.approx(1 - 0.1**0.25, abs=1e-4)


def test_break_even_counts_what_a_longer_catch_up_costs() -> None:
    # With L(k) = 1 + a·(k - 1) and mean 1/p: L_s + p + a·(1 - p) = 1 at p = 1 - L_s/(1 - a).
    assert break_even(curve(0.1, per_token=0.2)).share == pytest.approx(1 - 0.1 / 0.8, abs=1e-4)
    assert curve(0.1, per_token=0.2).seconds_per_token(0.01) == pytest.approx(0.1 + 0.01 + 0.2 * 0.99)


def test_the_curve_is_straight_between_what_was_measured_and_beyond() -> None:
    costs = CostCurve(128, 1, 0.1, {1: 1.0, 2: 3.0, 8: 2.0, 32: 4.4})
    assert [costs.llm_seconds(size) for size in (1, 1.5, 2, 5, 8, 20, 32, 42)] == pytest.approx(
        [1, 2, 3, 2.5, 2, 3.2, 4.4, 5.4]
    )


@pytest.mark.parametrize(("slm_step", "said"), [(1.2, "slower than the LLM alone at every"), (-0.1, "faster")])
def test_break_even_says_why_there_is_none(slm_step: float, said: str) -> None:
    found = break_even(curve(slm_step))
    assert found.share is None and said in found.reason


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_next", "lfm2"])
def test_the_curve_times_every_length_behind_the_same_cache(family: str) -> None:
    model = make_pair(slm=family, llm=family)
    with count_passes(model) as passes:
        measured = measure_curve(model, prompt_length=9, rows=2)
    assert sorted(measured.llm) == [1, 2, 3, 4, 8, 16, 32] and all(time > 0 for time in measured.llm.values())
    assert measured.slm_step > 0
    prompt, *timed = passes.llm
    assert prompt == Pass(2, 9, 0) and {(one.rows, one.context) for one in timed} == {(2, 9)}
    assert {one.tokens for one in passes.slm[1:]} == {1}


def test_catch_ups_that_the_context_has_no_room_for_are_left_out(pair: CiterForCausalLM) -> None:
    assert sorted(measure_curve(pair, prompt_length=240, rows=1, longest=16).llm) == [1, 2, 3, 4, 8, 16]


def test_the_curve_ends_with_the_context() -> None:
    # Absolute positions: a token more would have none.
    model = make_pair(slm="gpt2", llm="gpt2")
    measured = measure_curve(model, prompt_length=255, rows=1, longest=1)
    assert list(measured.llm) == [1] and measured.last_slope == 0
    assert measured.seconds_per_token(0.5) == pytest.approx(measured.slm_step + 0.5 * measured.llm[1])
    assert break_even(measured).share is not None or break_even(measured).reason


def test_bytes_are_weights_once_per_pass_and_the_cache() -> None:
    slm, llm = ModelCost(100, 2, 0), ModelCost(1000, 10, 0)
    passes = Passes(slm=[Pass(2, 5, 0), Pass(2, 1, 5)], llm=[Pass(2, 6, 0)])
    expected = (100 + 2 * 10) + (100 + 2 * 2 * 5 + 2 * 2) + (1000 + 10 * 12)
    assert passes.bytes_moved(slm, llm) == expected


def test_a_clock_gives_seconds() -> None:
    assert Clock(torch.device("cpu")).seconds(lambda: sum(range(1000))) > 0


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="memory cannot be asked back here"
)
def test_memory_that_ran_free_before_is_not_counted() -> None:
    process = psutil.Process()
    blocks = [bytearray(b"x" * 60_000) for _ in range(4000)]
    full = process.memory_info().rss
    # The C library gives back what is free at the end of its heap by itself.
    blocks[:-1] = []
    with watch_memory(torch.device("cpu")) as memory:
        pass
    assert memory.peak < full - 2000 * 60_000
    assert blocks


def test_what_imports_modules_for_good_is_observed_last(
    pair: CiterForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPU_BUFFER", 1 << 20)
    observe, kinds = Bench._observe, []
    monkeypatch.setattr(Bench, "_observe", lambda bench, one: (kinds.append(one.kind), observe(bench, one)))
    options = BenchOptions(shares=(0.5,), prompt_length=4, max_new_tokens=2, repeats=1, warmup=0)
    report = Bench(pair, options, "pair").run()
    assert kinds == ["LLM alone", "SLM alone", "CITER", "floor", "assisted generation"]
    assert [row.kind for row in report.rows] == ["LLM alone", "SLM alone", "assisted generation", "CITER", "floor"]


# ---- options and prompts ----------------------------------------------------------------------------------------


def test_numbers_are_read_between_commas() -> None:
    assert parse_numbers("--shares", "0, 0.2,1") == (0, 0.2, 1)
    assert parse_numbers("--shares", None) == parse_numbers("--shares", " ") == ()


def test_settings_come_once_each() -> None:
    assert [one.label for one in BenchOptions(shares=(0.2, 0.2, 1), thresholds=(0.5,)).settings] == [
        "share 0.2",
        "share 1",
        "threshold 0.5",
    ]


def test_the_context_is_filled_but_not_overfilled() -> None:
    check_context(256, [200, 10], 56)
    check_context(None, [10**6], 1)
    with pytest.raises(ValueError, match="at most --max-new-tokens 56"):
        check_context(256, [200, 10], 57)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"citer-hf\[plot\]"):
        check_plot(tmp_path / "speed.png")


def test_batches_are_padded_on_the_left_and_filled_up(tmp_path: Any) -> None:
    tokenizer = lambda text: {"input_ids": [ord(letter) for letter in text]}  # noqa: E731
    first, second = file_batches(["abc", "d", "ef"], tokenizer, 2, tmp_path)
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]] and first.padded
    assert first.input_ids[0].tolist() == [97, 98, 99] and first.input_ids[1, 2] == 100
    assert second.input_ids[0].tolist()[-2:] == [101, 102] and second.input_ids[1].tolist() == [97, 98, 99]
    with pytest.raises(ValueError, match=r"prompt 2 .* has no tokens"):
        file_batches(["a", ""], tokenizer, 1, tmp_path)


def test_ratios_compare_neighbours() -> None:
    assert ratios([2.0, 4.0, 9.0], [1.0, 1.0]) == Spread(3.0, 2.0, 4.0)


def test_an_optional_contender_that_fails_is_noted(pair: CiterForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_BUFFER", 1 << 20)
    options = BenchOptions(shares=(0.5,), batch_size=2, prompt_length=4, max_new_tokens=2, repeats=1, warmup=0)
    report = Bench(pair, options, "pair").run()
    assert len(report.notes) == 1 and "batch_size = 1" in report.notes[0]
