"""Sequences that come and go: each gets what the naive loop gives, whoever else is there."""

import random
from typing import Any

import pytest
import torch

from citer_hf.model.engine import Engine
from citer_hf.model.sampling import Choice, Stops
from citer_hf.model.schedule import Pace
from citer_hf.model.sequence import Sequence
from tests.conftest import make_pair, random_prompts
from tests.reference import naive_generate

EOS = (2, 9)
MODEL = make_pair("llama", "gemma3", hidden_size=48)


def sequence(prompt: list[int], new: int = 12, threshold: float = 0.5, veto: float = 0.0, **options: Any) -> Sequence:
    return Sequence(prompt, Stops(len(prompt) + new, EOS), threshold, veto, **options)


def run(engine: Engine, *sequences: Sequence) -> None:
    for one in sequences:
        engine.submit(one)
    engine.run()


def assert_naive(one: Sequence, prompt: list[int], new: int = 12) -> None:
    expected = naive_generate(MODEL, prompt, new, one.threshold, EOS, one.veto)
    assert one.finished and one.error is None and one.generated == expected.tokens
    assert [each.to_llm for each in one.record] == expected.to_llm
    assert [each.vetoed for each in one.record] == expected.vetoed


@pytest.mark.parametrize(("slots", "capacity", "chunk"), [(1, None, 512), (3, None, 5), (4, 64, 512)])
def test_a_queue_through_few_slots_gives_every_sequence_its_own_text(slots, capacity, chunk):
    rng, engine = random.Random(0), Engine(MODEL, slots, capacity=capacity, chunk=chunk, pace=Pace(fixed_ratio=3.0))
    prompts = random_prompts(tuple(rng.randint(1, 30) for _ in range(10)))
    dials = [(rng.choice([0.0, 0.3, 0.7, 2.0]), rng.choice([0.0, 0.3, 1.0])) for _ in prompts]
    sequences = [sequence(prompt, 12, *dial) for prompt, dial in zip(prompts, dials, strict=True)]
    for one in sequences[:6]:
        engine.submit(one)
    for _ in range(9):
        engine.step()
    for one in sequences[6:]:
        engine.submit(one)
    engine.run()
    for one, prompt in zip(sequences, prompts, strict=True):
        assert_naive(one, prompt)
    assert sorted(engine.free) == list(range(slots)) and not engine.active


@pytest.mark.parametrize("families", [("llama", "gemma3"), ("gpt2", "mistral")])
def test_sequences_in_slots_far_apart_are_processed_alone(families):
    model = make_pair(*families, hidden_size=48)
    engine, prompts, rows = Engine(model, 7, pace=Pace(fixed_ratio=3.0)), random_prompts((9, 5, 7, 6, 5, 8, 4)), []
    lengths = (16, 1, 1, 16, 1, 1, 16)
    both = list(zip(prompts, lengths, strict=True))
    sequences = [Sequence(prompt, Stops(len(prompt) + new), 0.6, 0.3) for prompt, new in both]
    for one in sequences:
        engine.submit(one)
    while len(engine.active) != 3:
        engine.step()
    expected = [
        naive_generate(model, row, new, 0.6, (), 0.3).tokens for row, new in zip(prompts, lengths, strict=True)
    ]
    for part in (model.slm, model.llm):
        note = lambda module, args, kwargs: rows.append(len(kwargs["input_ids"]))  # noqa: E731
        part.register_forward_pre_hook(note, with_kwargs=True)
    engine.run()
    assert max(rows) <= 3
    assert [one.generated for one in sequences] == expected


def test_a_prompt_that_begins_like_another_is_not_processed_again():
    start, engine = random_prompts((40,))[0], Engine(MODEL, 2)
    prompts = [start, start[:30], [*start, 5, 6], [*start[:20], 7, 8], start]
    sequences = [sequence(prompt, threshold=0.5, veto=0.3) for prompt in prompts]
    run(engine, *sequences)
    for one, prompt in zip(sequences, prompts, strict=True):
        assert_naive(one, prompt)
    processed = [one.passes["slm"][0][1] - one.passes["slm"][0][0] for one in sequences]
    assert processed == [40, 1, 2, 2, 1]


def test_the_llm_processes_a_prompt_when_it_is_first_needed_and_never_at_threshold_0():
    engine, one = Engine(MODEL, 1), sequence(random_prompts((20,))[0], threshold=0.0, veto=1.0)
    run(engine, one)
    assert engine.calls["llm"] == 0 and one.veto == 0.0


def test_long_prompts_are_processed_in_chunks_between_which_the_others_go_on():
    engine, settled = Engine(MODEL, 2, chunk=8), []
    first = sequence(random_prompts((6,))[0], 30, 0.0, on_settled=lambda one: settled.append(one))
    first.stops = Stops(36)
    second = sequence(random_prompts((80,))[0], 4, 2.0, on_settled=lambda one: settled.append(one))
    engine.submit(first)
    engine.step()
    engine.submit(second)
    engine.run()
    assert settled.index(second) >= 20 - 2, "one token of the first between two chunks of either model"


def test_a_cancelled_sequence_frees_its_slot_and_cancelling_again_does_nothing():
    prompts = random_prompts((5, 6, 7))
    engine, sequences = Engine(MODEL, 1), [sequence(prompt, veto=0.3) for prompt in prompts]
    for one in sequences:
        engine.submit(one)
    for _ in range(3):
        engine.step()
    for one in (sequences[0], sequences[1], sequences[0]):
        engine.cancel(one)
    assert sequences[0].finished and sequences[1].finished and sequences[0].error is None
    engine.run()
    assert_naive(sequences[2], prompts[2])
    engine.cancel(sequences[2])
    assert engine.free == [0]


def breaks(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("the lights went out")


@pytest.mark.parametrize("what", ["callback", "processor", "criterion", "memory for the prompt"])
def test_what_raises_ends_its_own_sequence_and_the_others_go_on(what, monkeypatch):
    prompts, run_slm = random_prompts((5, 60, 7)), MODEL.run_slm

    def small(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if ids.shape[1] > 40:
            raise torch.OutOfMemoryError("the lights went out")
        return run_slm(ids, *args, **kwargs)

    engine, sequences = Engine(MODEL, 3), [sequence(prompt, veto=0.3) for prompt in prompts]
    if what == "callback":
        sequences[1].on_settled = breaks
    elif what == "processor":
        sequences[1].choice.processors = type(Choice().processors)([breaks])
    elif what == "criterion":
        sequences[1].stops.others.append(breaks)
    else:
        monkeypatch.setattr(MODEL, "run_slm", small)
    run(engine, *sequences)
    assert sequences[1].finished and str(sequences[1].error) == "the lights went out"
    for index in (0, 2):
        assert_naive(sequences[index], prompts[index])


def test_what_does_not_fit_in_a_slot_is_an_error_that_says_so():
    engine = Engine(MODEL, 1, capacity=16)
    with pytest.raises(ValueError, match=r"tokens: this sequence may have 17 tokens, .* a slot holds 16"):
        engine.submit(sequence(random_prompts((5,))[0], 12))
    with pytest.raises(ValueError, match="tokens: expected at least one"):
        engine.submit(sequence([], 12))
    run(engine, sequence(random_prompts((4,))[0], 12))


def test_a_sequence_gets_its_verdict_however_long_others_go_on_without_the_llm():
    prompts = random_prompts((6, 9))
    engine = Engine(MODEL, 2, pace=Pace(fixed_ratio=1000.0))
    alone, asking = (sequence(prompt, 300, threshold) for prompt, threshold in zip(prompts, (0.0, 2.0), strict=True))
    alone.stops, asking.stops = Stops(400), Stops(12)
    for one in (alone, asking):
        engine.submit(one)
    for _ in range(200):
        engine.step()
    assert asking.finished and not alone.finished and engine.calls["llm"] <= 5
