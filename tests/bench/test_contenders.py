"""The contenders of the bench: forced shares, the loops, counted passes, prompts."""

from __future__ import annotations

import json
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
        for one in decoders.contenders(settings, batch.sequences > 1, released_loop=True, **options):
            with count_passes(model) as passes:
                found[one.name] = (*one.decode(batch, new_tokens), *passes)
            first, _ = one.decode(batch, 1)
            assert torch.equal(first, found[one.name][0][:, :1])
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
def test_a_forced_share_is_as_exact_as_the_length_allows(share: float, tokens: int) -> None:
    (setting,) = settings_of([share], [])
    for seed in range(3):
        flagged = forced_scores(tokens, seed)[:tokens] < setting.router_threshold
        assert abs(int(flagged.sum()) - share * tokens) <= 0.5 + 1e-6


def test_forced_scores_depend_on_seed_and_batch_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = forced_scores(50)
    assert torch.equal(torch.rand(3), expected) and torch.equal(forced_scores(50), first)
    assert all(not torch.equal(forced_scores(50, *other), first) for other in ((0, 1), (1, 0), (1, 1)))


def test_a_forced_router_gives_its_scores_in_order_and_begins_again() -> None:
    router, hidden = ForcedRouter(torch.arange(7.0)), torch.zeros(3, 1, 4)
    # There are too few scores left for three sequences.
    assert [router(hidden, hidden).flatten().tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert router(hidden, hidden).shape == (3, 1)


def test_each_setting_comes_once() -> None:
    assert [one.label for one in settings_of([0.2, 0.2, 1], [0.5])] == ["share 0.2", "share 1", "threshold 0.5"]


# --- The loops ------------------------------------------------------------------------------------------------------


def test_all_loops_give_the_output_of_the_pair(pair: CiterForCausalLM) -> None:
    batch = random_batch(pair.vocab_size, 12, 1, seed=4)
    found = run_all(pair, batch, 10, (0, 0.3, 1), (0.5,), assisted=True)
    assert all(tokens.shape == (1, 10) for tokens, *_ in found.values())
    assert torch.equal(found["CITER, share 0"][0], found["SLM alone"][0])
    for name in ("assisted generation", "CITER, share 1"):
        assert torch.equal(found[name][0], found["LLM alone"][0])
    for setting in ("share 0", "share 0.3", "share 1", "threshold 0.5"):
        for loop in ("floor", "released loop"):
            assert torch.equal(found[f"{loop}, {setting}"][0], found[f"CITER, {setting}"][0])


@pytest.mark.parametrize(
    ("slm", "llm", "cache"),
    [("llama", "gemma2", None), ("bloom", "llama", None), ("llama", "gemma2", "static"), ("gpt2", "qwen2", "static")],
)
def test_all_loops_give_the_output_of_the_pair_in_padded_batches(slm: str, llm: str, cache: str | None) -> None:
    model = make_pair(slm, llm)
    (batch,) = padded_batches(random_prompts(), 3)
    found = run_all(model, batch, 8, (0.3,), cache=cache)
    tokens, to_llm, *_ = found["CITER, share 0.3"]
    for way in ("floor", "released loop", LOCK_STEP):
        assert torch.equal(found[f"{way}, share 0.3"][0], tokens), way
        assert torch.equal(found[f"{way}, share 0.3"][1], to_llm), way


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


# --- Prompts --------------------------------------------------------------------------------------------------------

PROMPTS = ["Tom has 3 apples.", "Then he has 2 times as many.", "How many?"]
OBJECTS = [{"prompt": text} for text in PROMPTS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\n".join(PROMPTS) + "\n", PROMPTS),
        ("\n\n".join(map(json.dumps, OBJECTS)) + "\n", PROMPTS),
        (json.dumps(PROMPTS), PROMPTS),
        (json.dumps(OBJECTS, indent=2), PROMPTS),
        # These only look like JSON.
        *((text, [text]) for text in ("[1, 2, 3]", "[Tom] has 3 apples.", "[]", '"quoted"')),
    ],
)
def test_prompts_come_as_lines_json_lines_or_a_list(tmp_path: Path, text: str, expected: list[str]) -> None:
    file = tmp_path / "prompts"
    file.write_text(text)
    assert read_prompts(file) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "an empty file"),
        (b'{"prompt": "a"}\n\n{"text": "b"}\n', "entry 2.*text"),
        (b'{"prompt": 3}\n', "entry 1"),
        (b'["a", ""]', "entry 2"),
        (b"\xff\xfe\x00", "expected a text file"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"--prompts: .*{message}"):
        read_prompts(file)


def test_batches_are_padded_on_the_left_and_filled_up() -> None:
    first, second = padded_batches([[97, 98, 99], [100], [101, 102]], 2)
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.input_ids[0].tolist() == [97, 98, 99] and first.input_ids[1, 2] == 100
    assert second.input_ids[0].tolist()[-2:] == [101, 102] and second.input_ids[1].tolist() == [97, 98, 99]
    assert (first.number, second.number) == (0, 1)
