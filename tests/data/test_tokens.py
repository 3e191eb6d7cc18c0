"""Prompts and references in tokens."""

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from citer_hf.data.examples import Example
from citer_hf.data.tokens import encode, encode_prompt
from tests.chat_pairs import character_tokenizer

TEXTS = [
    "The answer is 42 because of the other thing.",
    "Question: what is the answer? Answer: B",
    "hello world, unhappiness happy\nnew line",
]
# As Qwen's: the turn ends with EOS, and a line break comes after it.
CHAT = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\\n' + m['content'] + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\\n' }}{% endif %}"
)
# As DeepSeek-R1's: the prompt opens a thought, which a turn of the past does not have.
THINKING = CHAT.replace("'<start>assistant\\n'", "'<start>assistant\\n<think>\\n'")
SPECIAL = ["<bos>", "<eos>", "<unk>", "<start>", "<end>"]


def wrapped(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **options)


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    training = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, **training)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return wrapped(tokenizer, **options)


def metaspace(kind: str) -> PreTrainedTokenizerFast:
    """As sentencepiece: words carry the space before them, and a text gets one."""
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    options = {"vocab_size": 200, "special_tokens": SPECIAL, "show_progress": False}
    unigram, bpe = trainers.UnigramTrainer(unk_token="<unk>", **options), trainers.BpeTrainer(**options)
    trainer = unigram if kind == "unigram" else bpe
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[bos])
    return wrapped(tokenizer, bos_token="<bos>", unk_token="<unk>")


@pytest.fixture(params=["byte-level", "unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return byte_level() if request.param == "byte-level" else metaspace(request.param)


def text_example(prompt: str, response: str | None = None, row: int = 1) -> Example:
    return Example(id=str(row), row=row, prompt=prompt, response=response)


def chat_example(response: str | None = None, content: str = "hello") -> Example:
    return Example(id="1", row=1, messages=({"role": "user", "content": content},), response=response)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Question:", "\nthe answer"),
        ("Answer: ", "B"),  # the space before B would be part of its token
        ("the ans", "wer is 42"),  # one token in a whole text
        ("hello", " world"),
        ("hello", "world"),
        ("a ", "  the"),
        ("a\n", "new line"),
    ],
)
def test_a_reference_continues_the_tokens_that_generation_is_given(tokenizer: Any, prompt: str, response: str) -> None:
    if "\n" in prompt + response and "<unk>" in tokenizer.convert_ids_to_tokens(tokenizer("\n").input_ids):
        pytest.skip("has no line break")
    encoded = encode(text_example(prompt, response), tokenizer, None)
    assert encoded.prompt_ids == tokenizer(prompt).input_ids == encode_prompt(text_example(prompt), tokenizer)
    assert encoded.response_ids[-1] == tokenizer.eos_token_id
    whole = tokenizer(prompt + response).input_ids
    assert text_of(tokenizer, encoded.prompt_ids + encoded.response_ids[:-1]) == text_of(tokenizer, whole)


def test_eos_comes_once(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    plain = encode(text_example("hello", " world"), tokenizer, None)
    assert plain.response_ids.count(eos) == 1
    assert encode(text_example("hello"), tokenizer, None).response_ids == []
    assert encode(text_example("hello", " world<eos>"), tokenizer, None).response_ids == plain.response_ids
    # Generation ends at the first one too.
    assert encode(text_example("hello", " world<eos> happy"), tokenizer, None).response_ids == plain.response_ids


def test_bos_comes_once_and_what_a_tokenizer_puts_after_a_text_not() -> None:
    tokenizer = metaspace("bpe")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    both = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)])
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenizer("hello").input_ids[-1] == eos
    encoded = encode(text_example("hello", " world"), tokenizer, None)
    ids = encoded.prompt_ids + encoded.response_ids
    assert (ids.count(bos), ids.count(eos), ids[0], ids[-1]) == (1, 1, bos, eos)


def test_the_generation_configs_eos_ends_a_text() -> None:
    tokenizer = byte_level()
    end, eos = tokenizer.convert_tokens_to_ids("<end>"), tokenizer.eos_token_id
    assert encode(text_example("hello", " world"), tokenizer, None, [end]).response_ids[-1] == end
    # Among several, the tokenizer's own is the one that a text ends with.
    assert encode(text_example("hello", " world"), tokenizer, None, [end, eos]).response_ids[-1] == eos
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id: neither the generation config nor the tokenizer has one"):
        encode(text_example("hello", " world"), tokenizer, None)


@pytest.mark.parametrize("eos", [["<end>"], ["<eos>", "<end>"], ["<end>", "<eos>"]])
def test_a_chats_reference_is_what_the_template_renders_up_to_eos(eos: list[str]) -> None:
    tokenizer = byte_level(chat_template=CHAT)
    stops = tokenizer.convert_tokens_to_ids(eos)
    encoded = encode(chat_example(" the answer"), tokenizer, None, stops)
    messages = list(chat_example().messages or ())
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoded.prompt_ids == given == encode_prompt(chat_example(), tokenizer)
    assert text_of(tokenizer, encoded.response_ids) == " the answer<end>"


def test_a_plain_prompt_becomes_a_chat_where_there_is_a_template_unless_it_is_to_stay_a_text() -> None:
    tokenizer, plain = byte_level(chat_template=CHAT), byte_level()
    end = [tokenizer.convert_tokens_to_ids("<end>")]
    given = text_example("hello", " world")
    chat = encode(chat_example("world"), tokenizer, None, end)
    assert replace(encode(given, tokenizer, None, end), example=chat.example) == chat
    kept = replace(given, is_text=True)
    assert replace(encode(kept, tokenizer, None, end), example=given) == encode(given, plain, None, end)


def test_tools_and_the_reasoning_of_a_turn_reach_the_template() -> None:
    thought = "{{ '<think>' + m['reasoning_content'] if 'reasoning_content' in m else '' }}"
    turns = CHAT.replace("{{ '<start>'", "{{ '<start>' }}" + thought + "{{ ''")
    template = "{{ tools | length if tools else '' }}" + turns.replace("+ m['role'] + '\\n' ", "").replace(
        "assistant\\n", ""
    )
    turn = {"role": "assistant", "content": "B", "reasoning_content": "hm"}
    example = replace(chat_example("B"), turn=turn, tools=({"name": "f"},))
    for one, prompt, response in (
        (template, "1<start>", "<think>hmB<end>"),
        (THINKING, "<start>", "hm\n</think>\n\nB<end>"),
    ):
        tokenizer = byte_level(chat_template=one)
        encoded = encode(example, tokenizer, None, [tokenizer.convert_tokens_to_ids("<end>")])
        assert text_of(tokenizer, encoded.prompt_ids).startswith(prompt)
        assert text_of(tokenizer, encoded.response_ids) == response


def test_a_template_that_rewrites_past_turns_still_gives_the_reference() -> None:
    tokenizer = byte_level(chat_template=THINKING)
    end = tokenizer.convert_tokens_to_ids("<end>")
    encoded = encode(chat_example("It is.</think>B"), tokenizer, None, [end])
    assert text_of(tokenizer, encoded.prompt_ids).endswith("assistant\n<think>\n")
    assert text_of(tokenizer, encoded.response_ids) == "It is.</think>B<end>"


def test_a_chat_that_cannot_be_rendered_is_explained() -> None:
    refused = Example(id="4", row=4, messages=({"role": "system", "content": "refuse"},), response="b")
    shouting = byte_level(chat_template=THINKING.replace("m['content']", "m['content'] | upper"))
    for example, tokenizer, message in (
        (chat_example("B"), byte_level(), r"row 1: the chat template cannot .*chat_template is not set"),
        (chat_example("Because"), shouting, "row 1: the chat template does not render the reference as it is"),
        (refused, character_tokenizer(), "row 4: the chat template cannot render the messages: no system messages"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(example, tokenizer, None)


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (text_example("abc", "de", row=7), {"max_length": 5}, "row 7: 6 tokens exceed the context of 5"),
        (text_example("abc", row=7), {"max_length": 3}, "row 7: 4 tokens exceed the context of 3"),
        (text_example("a", "b"), {"vocab_size": 4}, r"row 1: token 4 in 'ab.*' is unknown"),
    ],
)
def test_tokens_beyond_context_or_vocabulary_are_an_error(example: Example, options: dict[str, int], message: str):
    limits: dict[str, Any] = {"max_length": None, **options}
    with pytest.raises(ValueError, match=message):
        encode(example, character_tokenizer(template=None), **limits)
    if limits["max_length"]:
        encode(example, character_tokenizer(template=None), limits["max_length"] + 1)


def test_text_and_a_boundary_that_no_tokens_have_are_an_error() -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "answer": 2, "ans": 3, "wer": 4}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"row 1: the tokenizer joins .*'the ans', .*'wer'.* Put white space between"):
        encode(text_example("the ans", "wer"), wrapped(words), None)
    with pytest.raises(ValueError, match=r"row 1: token 2 in .* is unknown"):
        encode(text_example("hello", " w\u00f6rld"), metaspace("bpe"), None)
