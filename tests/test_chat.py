"""Chats: the caches live on, and what they hold is never another text than the chat's."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.chat import ChatOptions, Conversation, answer, obey
from citer_hf.terminal import Paint
from tests.chat_pairs import PUBLISHED, TEMPLATE, chat_pair

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
@pytest.mark.parametrize(
    "families", [("llama", "llama"), ("mistral_sliding", "gemma3"), ("qwen3_next", "llama")], ids=str
)
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
        told = (
            f"12 tokens: {12 - by_llm} by the SLM, {by_llm} by the LLM ({by_llm / 12:.1%}); {routing.llm_calls} LLM "
        )
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
    for line, printed in (
        ("/threshold", "threshold 0.5"),
        ("/threshold  2 ", "threshold 2"),
        ("/stats", "no answer yet"),
        ("/help", "/threshold X"),
        ("/reset", "new chat"),
    ):
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
