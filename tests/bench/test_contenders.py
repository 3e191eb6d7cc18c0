"""The contenders of the bench: forced shares, the loops, counted passes, prompts."""

from pathlib import Path

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.bench.contenders import (
    LOCK_STEP,
    Batch,
    Decoders,
    ForcedRouter,
    count_passes,
    forced_scores,
    greedy_without_end,
    padded_batches,
    random_batch,
    read_prompts,
    settings_of,
)
from citer_hf.bench.cost_curve import CostCurve, measure_curve
from tests.chat_pairs import character_tokenizer
from tests.conftest import make_pair, random_prompts


def run_all(
    model: CiterForCausalLM,
    batch: Batch,
    new_tokens: int,
    shares: tuple[float, ...],
    thresholds: tuple[float, ...] = (),
    cache: str | None = None,
    **options: bool,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None, list[tuple[int, int, int]], list[tuple[int, int, int]]]]:
    """Tokens, decisions, SLM passes and LLM passes of each contender, by its name."""
    found, settings, decoders = {}, settings_of(shares, thresholds), Decoders(model, new_tokens, cache)
    with greedy_without_end(model):
        for one in decoders.contenders(settings, len(batch.input_ids) > 1, released_loop=True, **options):
            with count_passes(model) as passes:
                found[one.name] = (*one.decode(batch, new_tokens), *passes)
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_a_forced_share_is_as_exact_as_the_length_allows_for_each_seed_and_batch(share: float) -> None:
    (setting,) = settings_of([share, share], [])
    for seed, tokens in enumerate((1, 7, 64, 1000)):
        flagged = forced_scores(tokens, seed)[:tokens] < setting.router_threshold
        assert abs(int(flagged.sum()) - share * tokens) <= 0.5 + 1e-6
    assert torch.equal(forced_scores(50), forced_scores(50))
    assert all(not torch.equal(forced_scores(50, *other), forced_scores(50)) for other in ((0, 1), (1, 0), (1, 1)))


def test_a_forced_router_gives_its_scores_in_order_and_begins_again() -> None:
    router, hidden = ForcedRouter(torch.arange(7.0)), torch.zeros(3, 1, 4)
    # There are too few scores left for three sequences.
    assert [router(hidden, hidden).flatten().tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert router(hidden, hidden).shape == (3, 1)


def test_all_loops_give_the_output_of_the_pair(pair: CiterForCausalLM) -> None:
    batch = random_batch(pair.vocab_size, 12, 1, seed=4)
    found = {
        name: tokens for name, (tokens, *_) in run_all(pair, batch, 6, (0, 0.3, 1), (0.5,), assisted=True).items()
    }
    assert all(tokens.shape == (1, 6) for tokens in found.values())
    assert torch.equal(found["CITER, share 0"], found["SLM alone"])
    for name in ("assisted generation", "CITER, share 1"):
        assert torch.equal(found[name], found["LLM alone"])
    for setting in ("share 0", "share 0.3", "share 1", "threshold 0.5"):
        for loop in ("floor", "released loop"):
            assert torch.equal(found[f"{loop}, {setting}"], found[f"CITER, {setting}"])


@pytest.mark.parametrize(("slm", "llm", "cache"), [("bloom", "llama", None), ("llama", "gemma2", "static")])
def test_all_loops_give_the_output_of_the_pair_in_padded_batches(slm: str, llm: str, cache: str | None) -> None:
    (batch,) = padded_batches(random_prompts(), 3)
    found = run_all(make_pair(slm, llm), batch, 6, (0.3,), cache=cache)
    for way in ("floor", "released loop", LOCK_STEP):
        for ours, theirs in zip(found[f"{way}, share 0.3"][:2], found["CITER, share 0.3"][:2], strict=True):
            assert torch.equal(ours, theirs), way


def test_the_released_loop_runs_the_llm_over_everything_again(pair: CiterForCausalLM) -> None:
    found = run_all(pair, random_batch(pair.vocab_size, 5, 1), 3, (1.0,))
    _, _, slm, llm = found["released loop, share 1"]
    steps = [(1, 5, 0), (1, 1, 5), (1, 1, 6)]
    assert llm == [(1, 5, 0), (1, 6, 0), (1, 7, 0)]
    for passes in (slm, found["floor, share 1"][3], found["CITER, share 1"][3], found["LLM alone"][3]):
        assert passes == steps


def test_passes_that_would_be_compiled_are_counted(pair: CiterForCausalLM) -> None:
    with count_passes(pair) as (slm, _):
        assert pair.generation_config.disable_compile and pair.llm.generation_config.disable_compile
        pair.generate(torch.tensor(random_prompts((5,))), max_new_tokens=4, cache_implementation="static")
    assert not pair.generation_config.disable_compile and [tokens for _, tokens, _ in slm] == [5, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts", "\ufeffTom has 3.\n\n[How many?]\n"),
        ("list.json", '["Tom has 3.", "[How many?]"]'),
        ("a.json", '[{"prompt": "Tom has 3."}, {"prompt": "[How many?]"}]'),
    ],
)
def test_prompts_come_as_lines_or_as_examples(tmp_path: Path, name: str, text: str) -> None:
    tokenizer = character_tokenizer()
    (tmp_path / name).write_text(text)
    found = read_prompts(tmp_path / name, tokenizer)
    assert found == tokenizer(["Tom has 3.", "[How many?]"]).input_ids
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty file|no rows"):
        read_prompts(tmp_path / name, tokenizer)
    (tmp_path / "prompts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="--prompts: expected a text with one prompt a line"):
        read_prompts(tmp_path / "prompts", tokenizer)


def test_batches_are_padded_on_the_left_and_filled_up() -> None:
    first, second = padded_batches([[97, 98, 99], [100], [101, 102]], 2)
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.input_ids[0].tolist() == [97, 98, 99] and first.input_ids[1, 2] == 100
    assert second.input_ids[0].tolist()[-2:] == [101, 102] and second.input_ids[1].tolist() == [97, 98, 99]
    assert (first.number, second.number) == (0, 1)


# --- The costs of a step: measured, interpolated, and the break-even share that follows ---


def curve(slm_step: float, sequences: int = 1, per_token: float = 0.0) -> CostCurve:
    llm = {size: 1.0 + per_token * (size - 1) for size in (1, 2, 3, 4, 8, 16, 32)}
    return CostCurve(128, sequences, slm_step, llm)


def test_break_even_is_what_the_slm_leaves_when_tokens_are_free() -> None:
    # slm + p·llm = llm at p = 1 - slm/llm.
    assert curve(0.1).break_even() == pytest.approx(0.9, abs=2e-3)
    # In lock-step the LLM runs when any of four sequences needs it.
    assert curve(0.1, sequences=4).break_even() == pytest.approx(1 - 0.1**0.25, abs=2e-3)


def test_break_even_counts_the_tokens_of_a_catch_up() -> None:
    # With llm(k) = 1 + a·(k - 1) and mean 1/p: slm + p + a·(1 - p) = 1 at p = 1 - slm/(1 - a).
    assert curve(0.1, per_token=0.2).break_even() == pytest.approx(1 - 0.1 / 0.8, abs=2e-3)
    assert curve(0.1, per_token=0.2).seconds_per_token(0.01) == pytest.approx(0.1 + 0.01 + 0.2 * 0.99)
    assert curve(0.1, per_token=0.2).seconds_per_token(0) == 0.1


def test_there_is_no_break_even_where_the_slm_costs_more() -> None:
    assert curve(1.2).break_even() is None and "at no LLM share" in str(curve(1.2))


def test_costs_are_linear_between_measured_lengths_and_beyond() -> None:
    costs = CostCurve(128, 1, 0.1, {1: 1.0, 2: 3.0, 8: 2.0, 32: 4.4})
    assert [costs.llm_seconds(size) for size in (1, 2, 5, 8, 20, 32, 42)] == pytest.approx(
        [1, 3, 2.5, 2, 3.2, 4.4, 5.4]
    )


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_every_length_is_timed_behind_the_same_cache(family: str) -> None:
    model = make_pair(slm=family, llm=family)
    with count_passes(model) as (slm, llm):
        measured = measure_curve(model, prompt_length=9, sequences=2)
    assert list(measured.llm) == [1, 2, 3, 4, 8, 16, 32] and all(time > 0 for time in measured.llm.values())
    prompt, *timed = llm
    assert prompt == (2, 9, 0) and {(sequences, context) for sequences, _, context in timed} == {(2, 9)}
    assert {tokens for _, tokens, _ in slm[1:]} == {1} and measured.slm_step > 0


@pytest.mark.usefixtures("small_machine")
def test_lengths_end_with_the_context(pair: CiterForCausalLM) -> None:
    assert list(measure_curve(pair, prompt_length=240, sequences=1, longest=16).llm) == [1, 2, 3, 4, 8, 16]
    # Absolute positions: there is none for another token.
    measured = measure_curve(make_pair("gpt2", "gpt2"), prompt_length=255, sequences=1, longest=1)
    assert list(measured.llm) == [1]
    assert measured.seconds_per_token(0.5) == pytest.approx(measured.slm_step + 0.5 * measured.llm[1])
