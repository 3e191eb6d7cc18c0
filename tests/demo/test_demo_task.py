"""The demo's task: its problems, its tokenizer, its training batches and how answers are judged."""

import random
import re
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from citer_hf.demo.problems import (
    Problem,
    Split,
    Step,
    _split_of,
    drill,
    extract_answer,
    is_correct,
    problem,
    problems,
)
from citer_hf.demo.tokenizer import CONTEXT, build_tokenizer
from citer_hf.demo.training_data import BLOCK, IGNORED, Batches, row

SPLITS: list[Split] = ["train", "validation", "test"]
MANY = list(problems("train", 0, 2000))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def steps_of(problem: Problem) -> list[Step]:
    equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem.response)
    return [Step(int(before), symbol, int(operand), int(after)) for before, symbol, operand, after in equations]


# Problems


def test_a_problem_depends_on_nothing_but_split_seed_and_index() -> None:
    assert list(problems("test", 5, 20)) == [problem("test", 5, index) for index in range(20)]
    distinct = {problem(split, seed, index).prompt for split, seed, index in product(SPLITS, range(5), range(20))}
    assert len(distinct) == 300


def test_the_problems_are_those_the_shipped_pair_was_trained_on() -> None:
    assert problem("train", 0, 1) == Problem(
        prompt="Zoe has 45 pencils. Then she uses 34 pencils. Later the number of pencils grows 4 times. "
        "What is the number of pencils at the end?\n",
        response="At first there are 45 pencils. 34 of the pencils are taken away, so 45 - 34 = 11 pencils. "
        "The number grows 4 times, so now 11 * 4 = 44 pencils. So Zoe has 44 pencils now.",
        answer="44",
    )


@pytest.mark.parametrize("split", SPLITS)
def test_no_chain_of_equations_is_in_two_splits(split: Split) -> None:
    assert {_split_of(steps_of(problem)) for problem in problems(split, 1, 300)} == {split}


def test_a_tenth_of_all_chains_is_for_tests_and_a_tenth_for_validation() -> None:
    chains = [[Step(before, "+", 1, before + 1)] for before in range(5000)]
    splits = [_split_of(chain) for chain in chains]
    assert [round(splits.count(split) / len(splits), 1) for split in SPLITS] == [0.8, 0.1, 0.1]


def test_an_unknown_split_is_an_error_that_names_the_three() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, validation or test"):
        next(problems("dev", 0, 1))  # type: ignore[arg-type]


def test_the_answer_follows_from_the_equations_and_the_equations_from_the_prompt() -> None:
    for told in MANY:
        steps = steps_of(told)
        for step in steps:
            assert step.after == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[step.symbol](
                step.before, step.operand
            )
        assert all(step.after == following.before for step, following in pairwise(steps))
        assert told.answer == str(steps[-1].after)
        given = [str(steps[0].before), *(str(step.operand) for step in steps)]
        # Without the distraction the numbers of the story are those of the equations, in their order.
        numbers = iter(re.findall(r"\d+", told.prompt))
        assert all(number in numbers for number in given)


def test_problems_have_two_to_four_steps_and_values_below_a_hundred() -> None:
    chains = [steps_of(told) for told in MANY]
    lengths = [len(chain) for chain in chains]
    assert all(0.28 < lengths.count(length) / len(lengths) < 0.39 for length in (2, 3, 4))
    steps = [step for chain in chains for step in chain]
    assert all(0 <= value <= 99 for step in steps for value in (step.before, step.operand, step.after))
    assert all(2 <= step.operand <= 5 for step in steps if step.symbol == "*")
    assert all(sum(step.symbol == symbol for step in steps) > len(steps) / 10 for symbol in "+-*")


def test_a_third_of_the_stories_holds_a_number_that_does_not_matter() -> None:
    spare = [len(re.findall(r"\d+", told.prompt)) - len(steps_of(told)) - 1 for told in MANY]
    assert set(spare) == {0, 1}
    assert 0.29 < sum(spare) / len(spare) < 0.38


def test_the_wording_varies_while_the_equations_stay() -> None:
    templates = {re.sub(r"\d+", "#", told.response) for told in MANY if len(steps_of(told)) == 2}
    assert len(templates) > 600


def test_a_drill_asks_for_one_calculation() -> None:
    told = drill(random.Random(0))
    assert told.prompt == f"What is {told.response.partition(' =')[0]}?\n"
    assert [str(step.after) for step in steps_of(told)] == [told.answer]


# Judging


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 1 + 2 = 3 books. So the answer is 3.", "3"), ("12 and 7", "7"), ("no number", None), ("", None)],
)
def test_the_answer_is_the_last_number(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_the_reference_response_is_right_and_the_prompt_or_nothing_never_is() -> None:
    for told in MANY:
        assert is_correct(told.response, told)
        assert is_correct(told.prompt + told.response, told)
        assert not is_correct(told.prompt, told)
        assert not is_correct("", told)
        assert not is_correct(told.response + f" {int(told.answer) + 1}", told)


def test_a_response_without_a_number_is_wrong_even_for_a_problem_without_an_answer() -> None:
    assert not is_correct("I do not know.", Problem("What?\n", "", ""))


# Tokenizer


def test_every_text_comes_back_from_its_tokens_and_joins_where_the_prompt_ends(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for told in MANY[:500]:
        prompt, response, text = tokenizer([told.prompt, told.response, told.prompt + told.response]).input_ids
        assert prompt + response == text
        assert tokenizer.unk_token_id not in text
        assert tokenizer.decode(text) == told.prompt + told.response


def test_problems_are_as_long_as_the_models_were_sized_for(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = tokenizer([told.prompt for told in MANY]).input_ids
    responses = tokenizer([told.response for told in MANY]).input_ids
    assert 42 < sum(map(len, prompts)) / len(prompts) < 48
    assert 66 < sum(map(len, responses)) / len(responses) < 74
    assert 140 <= len(tokenizer) <= 180


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("Tom has 47 books.") == ["Tom", " has", " 4", "7", " books", "."]


def test_special_tokens_are_set_and_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == CONTEXT
    padded = tokenizer(["Tom", "Tom has"], padding=True)
    assert set(padded) == {"input_ids", "attention_mask"}
    assert padded.attention_mask == [[0, 1], [1, 1]]


def test_a_saved_tokenizer_reads_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = MANY[0].prompt + MANY[0].response
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
    assert loaded.model_max_length == CONTEXT


# Chats and batches


def test_a_chat_reads_as_the_training_rows_do(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = MANY[:2]
    chat = [
        {"role": "user", "content": first.prompt},
        {"role": "assistant", "content": first.response},
        {"role": "user", "content": second.prompt.strip()},
    ]
    options = {"return_dict": False}
    opening = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **options)
    assert opening == tokenizer(first.prompt).input_ids
    tokens, _ = row(tokenizer, [first])
    assert tokenizer.apply_chat_template(chat[:2], **options) == tokens
    both, _ = row(tokenizer, [first, second])
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)
    assert prompt == both[: len(prompt)]
    assert both[len(prompt) :] == tokenizer(second.response + tokenizer.eos_token).input_ids


def test_only_responses_and_their_ends_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, labels = row(tokenizer, MANY[:2])
    learned = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(learned) == "".join(told.response + tokenizer.eos_token for told in MANY[:2])
    assert all(label in (token, IGNORED) for token, label in zip(tokens, labels, strict=True))


def test_a_batch_is_made_from_its_number_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    forward, backward = (Batches(tokenizer, seed=3, count=2 * BLOCK, size=4) for _ in range(2))
    made = {index: backward[index] for index in reversed(range(2 * BLOCK))}
    for index in range(2 * BLOCK):
        for key, value in forward[index].items():
            assert torch.equal(value, made[index][key])
    assert len({tuple(batch["input_ids"][0].tolist()) for batch in made.values()}) == 2 * BLOCK
    with pytest.raises(IndexError):
        forward[2 * BLOCK]


def test_batches_hold_single_problems_chats_and_drills(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = Batches(tokenizer, seed=3, count=BLOCK, size=4)
    ends = [(batches[index]["input_ids"] == tokenizer.eos_token_id).sum(-1).tolist() for index in range(BLOCK)]
    turns = [turn for batch in ends for turn in batch]
    assert {1, 2, 3, 6} <= set(turns)
    assert turns.count(1) == 60
    assert turns.count(6) == 4
