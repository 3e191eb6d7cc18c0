"""Chats: the caches hold the chat's text and nothing else; the streamer: every character once, by its writer."""

import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from citer_hf import CiterCache, CiterForCausalLM
from citer_hf.chat import ChatOptions, Conversation, answer, obey
from citer_hf.model.cache import Routing
from citer_hf.terminal import DIM, LLM_COLOUR, PLAIN, Paint, WriterStreamer, legend, wants_colour
from tests.chat_pairs import PUBLISHED, TEMPLATE, Screen, chat_pair

MESSAGES = ["how are you?", "tell me more.", "and then?"]
TRIMMING = TEMPLATE.replace("message['content'] }}", "(message['content'] | replace('e', '') ) }}")


def converse(model: CiterForCausalLM, **options: Any) -> Conversation:
    return Conversation(model, model.load_tokenizer(), ChatOptions(**{"max_new_tokens": 12, **options}))


def ask(conversation: Conversation, text: str) -> str:
    conversation.ask(text, Paint(io.StringIO()))
    return conversation.messages[-1]["content"]


def fresh_answer(model: Any, messages: list[dict[str, str]], threshold: float) -> str:
    """The answer of a plain `generate` that reads the whole chat."""
    tokenizer = model.load_tokenizer()
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    output = model.generate(ids, max_new_tokens=12, router_threshold=threshold)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING], ids=["template", "template that rewrites"])
@pytest.mark.parametrize("families", [("llama", "llama"), ("mistral_sliding", "gemma3"), ("qwen3_next", "llama")])
def test_every_answer_is_that_of_the_whole_chat_read_afresh(families: tuple[str, str], template: str) -> None:
    model = chat_pair(*families, template=template)
    conversation = converse(model)
    for text, threshold in zip(MESSAGES, (0.5, 0.0, 0.7), strict=True):
        conversation.router_threshold = threshold
        before = [*conversation.messages, {"role": "user", "content": text}]
        assert ask(conversation, text) == fresh_answer(model, before, threshold)
        assert conversation.messages[:-1] == before


def test_what_the_caches_hold_is_not_read_again(count_calls: Callable[[Any], list[int]]) -> None:
    model = chat_pair()
    conversation = converse(model, router_threshold=2.0)
    ask(conversation, MESSAGES[0])
    cache, length = conversation.cache, conversation.cache.get_seq_length()
    slm, llm = count_calls(model.slm), count_calls(model.llm)
    ask(conversation, MESSAGES[1])
    assert conversation.cache is cache
    # All but the last token of the answer is in the cache.
    new = cache.get_seq_length() - 11 - length
    assert new < 25 and slm[0] == new and set(slm[1:]) == {1}
    # The LLM processes the drafts too.
    assert new <= llm[0] < new + 12


def test_caches_are_dropped_when_text_was_rewritten_or_nothing_is_left_to_read() -> None:
    conversation = converse(chat_pair(), router_threshold=2.0)
    ask(conversation, MESSAGES[0])
    cache, conversation.messages[-1]["content"] = conversation.cache, "something else"
    ask(conversation, MESSAGES[1])
    assert conversation.cache is not cache
    conversation = converse(chat_pair(), max_new_tokens=1)
    first, cache = ask(conversation, "abc"), conversation.cache
    conversation.messages = []
    assert ask(conversation, "abc") == first and conversation.cache is not cache


def test_stats_are_those_of_the_record_and_a_reset_keeps_the_system_message_alone() -> None:
    conversation = converse(chat_pair(), system="be kind")
    for text in MESSAGES[:2]:
        ask(conversation, text)
        routing = conversation.cache.routing
        by_llm = int(routing.to_llm.sum())
        told = f"12 tokens: {12 - by_llm} by the SLM, {by_llm} by the LLM ({by_llm / 12:.1%}); {routing.llm_calls} LLM"
        assert conversation.stats.startswith(told) and 0 < routing.llm_calls <= by_llm < 12
    assert [one["role"] for one in conversation.messages] == ["system", *["user", "assistant"] * 2]
    conversation.reset()
    assert conversation.stats == "no answer yet" and [one["role"] for one in conversation.messages] == ["system"]
    assert conversation.cache.get_seq_length() == 0


def test_a_template_that_refuses_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse(chat_pair(), system="refuse")
    answer(conversation, "a")
    assert capsys.readouterr().err.count("\n") == 1
    assert len(conversation.messages) == 1


def test_the_end_of_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse(chat_pair(max_position_embeddings=40), max_new_tokens=30)
    answer(conversation, "a" * 20)
    left = 40 - len("u:\na:") - 20
    assert conversation.stats.startswith(f"{left} tokens")
    messages = list(conversation.messages)
    answer(conversation, "b")
    assert "/reset" in capsys.readouterr().err
    assert conversation.messages == messages
    obey(conversation, "/reset")
    answer(conversation, "b")
    assert conversation.stats.startswith("30 tokens")


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt, "(stopped;"), (torch.OutOfMemoryError("no"), "Out of memory")], ids=str
)
def test_an_interrupted_answer_stays_in_the_chat_which_goes_on(monkeypatch, capsys, error, told):
    model = chat_pair()
    conversation, forward, calls = converse(model, router_threshold=0.0), model.slm.forward, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise error
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.slm, "forward", fail)
        answer(conversation, MESSAGES[0])
    assert told in "".join(capsys.readouterr()) and len(conversation.messages[-1]["content"]) == 3
    before = [*conversation.messages, {"role": "user", "content": MESSAGES[1]}]
    assert ask(conversation, MESSAGES[1]) == fresh_answer(model, before, 0.0)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse(chat_pair())
    told = {"/threshold": "threshold 0.5", "/threshold  2 ": "threshold 2", "/stats": "no answer yet"}
    for line, printed in {**told, "/help": "/threshold X", "/reset": "new chat"}.items():
        obey(conversation, line)
        assert printed in capsys.readouterr().out
    for line in ("/threshold x", "/threshold -1", "/nothing"):
        obey(conversation, line)
        captured = capsys.readouterr()
        assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1 and not captured.out
    assert conversation.router_threshold == 2


def test_a_chat_does_not_need_the_configuration_to_name_a_context() -> None:
    model = chat_pair("bloom", "bloom")
    model.slm.config.max_position_embeddings = model.llm.config.max_position_embeddings = None
    assert len(ask(converse(model), MESSAGES[0])) == 12


@pytest.mark.parametrize("published", PUBLISHED, ids=str)
def test_a_published_generation_config_does_not_change_the_chat(published: dict[str, Any]) -> None:
    model, plain = chat_pair(), chat_pair()
    model.generation_config.update(**published)
    conversation = converse(model)
    for text in MESSAGES[:2]:
        before = [*conversation.messages, {"role": "user", "content": text}]
        expected = fresh_answer(plain, before, 0.5)
        if stop := published.get("stop_strings"):
            expected = expected.partition(stop[0])[0] + stop[0] if stop[0] in expected else expected
        assert ask(conversation, text) == expected


# ---- on a terminal ----


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
