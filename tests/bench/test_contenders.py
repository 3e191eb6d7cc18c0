"""The contenders of the bench: forced shares, the loops, counted passes, prompts."""

from dataclasses import replace

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.bench.contenders import (
    PLAIN,
    Decoders,
    Plan,
    count_passes,
    greedy_without_end,
    padded_batches,
    random_prompts,
    settings_of,
)
from tests.conftest import make_pair
from tests.conftest import random_prompts as prompts_of_lengths


def random_batch(vocab_size, length, sequences, seed=0):
    return padded_batches(random_prompts(vocab_size, length, sequences, seed), sequences)[0]


def run_all(model, batch, new_tokens, shares, thresholds=(), cache=None, agreement=None, **options):
    """Tokens, decisions, SLM passes and LLM passes of each contender, by its name."""
    decoders = Decoders(model, new_tokens, cache, agreement=agreement)
    found, settings = {}, settings_of(shares, thresholds)
    with greedy_without_end(model):
        for one in decoders.contenders(settings, **options):
            with count_passes(model) as passes:
                found[one.name] = (*one.decode(batch), *passes)
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_share_and_agreement_are_as_exact_as_the_length_allows_for_each_seed_and_batch(share: float) -> None:
    for seed, tokens in enumerate((1, 7, 64, 1000)):
        plan = Plan.of(random_batch(99, 3, 2), tokens, share, 0.8, 99, seed)
        differ = plan.tokens["slm"] != plan.tokens["llm"]
        assert abs(int(plan.flagged.sum()) - share * 2 * tokens) <= 0.5 + 1e-3 and not (differ & ~plan.flagged).any()
        assert abs(int(differ.sum()) - 0.2 * share * 2 * tokens) <= 0.5 + 1e-3
    batches = [replace(random_batch(99, 3, 2), number=number) for number in (0, 1)]
    first, again, *others = (
        Plan.of(batches[number], 50, 0.5, None, 99, seed).flagged
        for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0), (1, 1))
    )
    assert torch.equal(first, again) and not any(torch.equal(first, one) for one in others)


def test_the_floor_gives_the_output_of_the_pair(pair: CiterForCausalLM) -> None:
    batch = random_batch(pair.vocab_size, 12, 1, seed=4)
    found = {name: one[0] for name, one in run_all(pair, batch, 6, (0, 0.3, 1), (0.5,), assisted=True).items()}
    assert all(tokens.shape == (1, 6) for tokens in found.values())
    assert torch.equal(found["CITER, share 0"], found["SLM alone"])
    for name in ("assisted generation", "CITER, lossless", "CITER, share 1"):
        assert torch.equal(found[name], found["LLM alone"])
    for setting in ("share 0", "share 0.3", "share 1", "threshold 0.5"):
        assert torch.equal(found[f"floor, {setting}"], found[f"CITER, {setting}"])


@pytest.mark.parametrize(
    ("slm", "llm", "cache", "agreement"),
    [
        ("bloom", "llama", None, None),
        ("llama", "gpt2", None, 0.75),
        ("qwen3_next", "llama", None, 0.75),
        ("llama", "llama", "static", 0.75),
    ],
)
def test_padded_batches_follow_one_plan_however_often_a_place_is_drafted(slm, llm, cache, agreement):
    (batch,), pair = padded_batches(prompts_of_lengths(), 3), make_pair(slm, llm)
    found = run_all(pair, batch, 12, (0.4,), cache=cache, agreement=agreement)
    plan, tokens = Plan.of(batch, 12, 0.4, agreement, pair.vocab_size, 0), found["CITER, share 0.4"][0]
    for way in (PLAIN, "floor"):
        assert torch.equal(found[f"{way}, share 0.4"][1], plan.flagged), way
        # The floor has the bare models' tokens.
        assert torch.equal(found[f"{way}, share 0.4"][0], tokens) or (agreement is not None and way != PLAIN)
    if agreement is not None:
        assert torch.equal(tokens, torch.where(plan.flagged, plan.tokens["llm"], plan.tokens["slm"]))


def test_every_way_reads_a_token_once(pair: CiterForCausalLM) -> None:
    found = run_all(pair, random_batch(pair.vocab_size, 5, 1), 3, (1.0,))
    for name in ("floor, share 1", f"{PLAIN}, share 1", "LLM alone"):
        assert found[name][3] == [(1, 5, 0), (1, 1, 5), (1, 1, 6)]


def test_passes_that_would_be_compiled_are_counted(pair: CiterForCausalLM) -> None:
    with count_passes(pair) as (slm, _):
        assert pair.generation_config.disable_compile and pair.llm.generation_config.disable_compile
        pair.generate(
            torch.tensor(prompts_of_lengths((5,))), max_new_tokens=4, cache_implementation="static", max_drafts=0
        )
    assert not pair.generation_config.disable_compile and [tokens for _, tokens, _ in slm] == [5, 1, 1, 1]


def test_batches_are_padded_on_the_left_and_filled_up() -> None:
    first, second = padded_batches([[97, 98, 99], [100], [101, 102]], 2)
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.input_ids[0].tolist() == [97, 98, 99] and first.input_ids[1, 2] == 100
    assert second.input_ids[0].tolist()[-2:] == [101, 102] and second.input_ids[1].tolist() == [97, 98, 99]
    assert (first.number, second.number) == (0, 1)
