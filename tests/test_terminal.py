"""The streamer: every character once, painted by its writer."""

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from citer_hf import CiterCache
from citer_hf.model.cache import Routing
from citer_hf.terminal import DIM, LLM_COLOUR, PLAIN, Paint, WriterStreamer, legend, wants_colour
from tests.chat_pairs import Screen, chat_pair


@pytest.fixture(autouse=True)
def colourful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def record(to_llm: list[bool]) -> Any:
    """A cache with the record of one sequence, as far as the streamer looks at it."""
    routing, one = Routing(start=7), torch.ones((1, 1))
    for index, by_llm in enumerate(to_llm):
        routing.add(7 + index, one, torch.tensor([[by_llm]]), ~one.bool(), ~one.bool(), one.bool())
    return SimpleNamespace(routing=routing)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stream(tokenizer: Any, tokens: list[int], to_llm: list[bool], out: io.StringIO) -> list[str]:
    """Stream tokens one by one; returns what each of them added, and what the end did."""
    streamer = WriterStreamer(tokenizer, record(to_llm), Paint(out))
    streamer.put(torch.tensor([[1, 2, 3]]))
    pieces, length = [], 0
    for token in tokens:
        streamer.put(torch.tensor([token]))
        pieces.append(out.getvalue()[length:])
        length = len(out.getvalue())
    streamer.end()
    return [*pieces, out.getvalue()[length:]]


def test_a_character_of_several_bytes_is_painted_when_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("é漢🙂 aé").input_ids[:-1]
    pieces = stream(tokenizer, tokens, [False] * len(tokens), io.StringIO())
    assert pieces == ["", "é", "", "", "漢", "", "", "", "🙂", " ", "a", "", "\n"]


def test_bytes_that_are_no_character_do_not_hold_the_text_back_for_ever() -> None:
    tokenizer, out = byte_tokenizer(), io.StringIO()
    broken = tokenizer("é").input_ids[0]
    stream(tokenizer, [broken] * 9 + tokenizer("ab").input_ids, [False] * 11, out)
    assert out.getvalue() == "\ufffd" * 9 + "ab\n"


@pytest.mark.parametrize(
    ("out", "painted"),
    [(io.StringIO(), "a[[bc]]d\n"), (Screen(), f"a{LLM_COLOUR}b{PLAIN}{LLM_COLOUR}c{PLAIN}d\n")],
    ids=["markers", "colours"],
)
def test_the_llms_text_is_between_markers_or_in_colour(out: io.StringIO, painted: str) -> None:
    tokenizer = byte_tokenizer()
    stream(tokenizer, tokenizer("abcd").input_ids, [False, True, True, False], out)
    assert out.getvalue() == painted and painted[1:3] in legend(out)


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_for_who_wants_none(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    assert wants_colour(Screen())
    monkeypatch.setenv(variable, value)
    assert not wants_colour(Screen())
    assert "[[" in legend(Screen())


def test_a_model_cannot_steer_the_terminal() -> None:
    out = Screen()
    paint = Paint(out)
    paint.write("a\x1b[2Jb\rc\x9b1m\td\n", by_llm=False)
    paint.dim("aside")
    assert out.getvalue() == f"a[2Jbc1m\td\n{DIM}aside{PLAIN}\n"


def test_a_record_has_no_token_that_was_not_decided() -> None:
    with pytest.raises(IndexError):
        record([True]).routing.by_llm(1)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str)
def test_the_stream_of_generate_says_what_the_record_says(options: dict[str, Any]) -> None:
    model = chat_pair()
    tokenizer = model.load_tokenizer()
    cache, out = CiterCache(model.config), io.StringIO()
    if "prompt_lookup_num_tokens" in options:
        cache.activate_past_recording()
    streamer = WriterStreamer(tokenizer, cache, Paint(out))
    ids = tokenizer("abcabcabc", return_tensors="pt").input_ids
    written = model.generate(ids, past_key_values=cache, streamer=streamer, max_new_tokens=30, **options)[0, 9:]
    assert streamer.tokens == written.tolist()
    expected = ""
    for token, by_llm in zip(written.tolist(), cache.routing.to_llm[0].tolist(), strict=True):
        expected += f"[[{tokenizer.decode([token])}]]" if by_llm else tokenizer.decode([token])
    assert 0 < cache.routing.llm_share < 1
    assert out.getvalue() == re.sub(r"\]\]\[\[", "", expected) + "\n"
