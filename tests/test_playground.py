"""The page of `citer playground`: in headless Chromium, and what its events answer."""

import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from citer_hf import CiterForCausalLM
from citer_hf.evaluation.results import Point
from citer_hf.playground import LLM_ALONE, LOOK, NO_CURVE, Page, mount, page
from tests.chat_pairs import character_tokenizer, chat_pair, invoke

CHROMIUM = shutil.which("chromium")
HTML = ("<script>window.hacked=1</script>", "<img src=x onerror=hacked=1>", "${window.hacked=1}", "{{value}}", "</p>")
HELLO = ({"role": "user", "content": "hello"},)


def last(outputs: Iterator[Any]) -> Any:
    *_, found = outputs
    return found


def text_of(output: Any) -> str:
    return "".join(text for _, _, text in output.tokens)


def test_the_class_of_a_token_is_what_the_record_says() -> None:
    model, seen = chat_pair(), set()
    twins = CiterForCausalLM(model.config, slm=model.slm, llm=model.slm, router=model.router)
    twins._tokenizer, twins.generation_config = model._tokenizer, model.generation_config
    for pair, veto in ((model, 0.0), (model, 1.0), (twins, 0.0)):
        output = last(Page(pair, 12).generate("pair", HELLO, 0.5, veto))
        routing, kinds = output.cache.routing, [kind for kind, _, _ in output.tokens]
        assert routing.to_llm[0].tolist() == [kind != "slm" for kind in kinds] and len(kinds) == 12
        assert routing.vetoed[0].tolist() == [kind == "vetoed" for kind in kinds]
        assert kinds.count("accepted") == round(routing.accepted * sum(kind in ("llm", "accepted") for kind in kinds))
        titles = [title.partition("; ")[2] for _, title, _ in output.tokens]
        assert titles == [f"score {x:.3f}" for x in routing.scores[0]]
        assert f"{routing.llm_calls} passes" in output.figures()
        seen |= set(kinds)
    assert seen == {"slm", "llm", "vetoed", "accepted"}


def test_side_by_side_shows_what_each_model_writes_alone() -> None:
    model = chat_pair()
    # Of a published generation config.
    model.generation_config.update(router_threshold=0.3, use_cache=False, num_beams=2)
    own, ids = Page(model, 8), torch.tensor([model._tokenizer("u:hello\na:", add_special_tokens=False).input_ids])
    for part, threshold in (("slm", 0.0), ("llm", 2.0), ("pair", 0.5)):
        expected = model.generate(ids, router_threshold=threshold, max_new_tokens=8, num_beams=1, use_cache=True)
        output = last(own.generate(part, HELLO, 0.5, 0.0))
        assert text_of(output) == model._tokenizer.decode(expected[0, ids.shape[1] :])
    columns = last(own.compare("hello", 0.5, 0.0))
    assert "0 passes" in columns[0] and "100.0% of the tokens, 8 passes" in columns[1] and "Pair" in columns[2]


@pytest.mark.parametrize("template", [True, False])
def test_a_chat_goes_on_and_without_a_template_every_prompt_is_by_itself(template: bool, count_calls: Any) -> None:
    model = chat_pair() if template else chat_pair(template=None)
    own, lengths = Page(model, 4), count_calls(model.slm)
    chat: tuple[Any, str] = ((), "")
    for text in ("one", "four"):
        _, chat, _ = last(own.chat(text, chat, 0.0, 0.0))
    assert [one["content"] for one in chat[0][::2]] == ["one", "four"] and len(chat[0][3]["content"]) == 4
    assert lengths[::4] == ([len("u:one\na:"), len("u:one\na:1234.u:four\na:")] if template else [3, 4])
    assert list(own.chat("  ", chat, 0.5, 0.0)) == list(own.compare("", 0.5, 0.0)) == []


@pytest.mark.parametrize(
    ("text", "role", "threshold", "veto", "told"),
    [
        ("a" * 50, "user", 0.5, 0.0, "tokens are too many for the context of 40"),
        ("a", "user", 3.0, 0.0, "router_threshold"),
        ("a", "user", 0.5, -1.0, "llm_veto"),
        ("a", "system", 0.5, 0.0, "no system messages"),
    ],
)
def test_what_cannot_be_done_is_a_message_of_the_page(text, role, threshold, veto, told) -> None:
    own = Page(chat_pair(max_position_embeddings=40), 12)
    with pytest.raises(gr.Error, match=told):
        list(own.chat(text, (({"role": role, "content": "refuse"},), ""), threshold, veto))


@pytest.fixture
def slow() -> tuple[Any, list[int]]:
    """A pair whose SLM is slow, and a list that grows with its passes."""
    model, calls = chat_pair(), []
    forward = model.slm.forward

    def slowly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        time.sleep(0.02)
        return forward(*args, **kwargs)

    model.slm.forward = slowly
    return model, calls


@pytest.mark.parametrize("part", ["pair", "slm"])
def test_a_generation_ends_when_nobody_looks(slow: Any, part: str) -> None:
    outputs = Page(slow[0], 200).generate(part, HELLO, 0.5, 0.0)
    next(outputs)
    outputs.close()
    count = len(slow[1])
    time.sleep(0.2)
    assert 0 < count == len(slow[1]) < 100


def test_the_curve_is_that_of_the_router_with_the_nearest_veto(saved: Path, tmp_path: Path) -> None:
    def point(threshold: float, share: float, accuracy: float, veto: float = 0.0) -> dict[str, Any]:
        return dataclasses.asdict(Point(threshold, accuracy, (0, 1), share, share / 2, 1, 1, veto))

    def page_with(sha256: dict[str, str | None]) -> Page:
        told = {"ends": ends, "methods": methods, "provenance": {"routers_sha256": sha256}}
        (router / "results.json").write_text(json.dumps(told))
        return Page(CiterForCausalLM.from_pretrained(router), 8)

    router = shutil.copytree(saved, tmp_path / "router")
    assert Page(CiterForCausalLM.from_pretrained(router), 8).curve(0.5, 0.0) == NO_CURVE
    ends = {"slm": point(0, 0, 0.2), "llm": point(2, 1, 0.8)}
    methods = {"random": [point(0.5, 0.4, 0.6), point(0.9, 0.8, 0.7)], "linear": [point(0.5, 0.1, 0.9)]}
    methods["random, veto 0.3"] = [point(0.5, 0.6, 0.7, 0.3)]
    own = page_with({"linear": "other", "random": None, "random, veto 0.3": None})
    assert own.curves[0.0] == [(0, 0, 0, 0.2), (0.5, 0.4, 0.2, 0.6), (0.9, 0.8, 0.4, 0.7), (LLM_ALONE, 1, 0.5, 0.8)]
    for dials, told in (
        ((0.7, 0.1), "accuracy 65.0%, 60.0% of the tokens by the LLM,\n0.300 LLM passes"),
        ((0.5, 0.2), "accuracy 70.0%, 60.0% of the tokens by the LLM,\n0.300 LLM passes"),
        ((0.0, 0.0), "accuracy 20.0%, 0.0% of the tokens"),
        ((LLM_ALONE, 0.0), "accuracy 80.0%, 100.0% of the tokens"),
    ):
        assert told in own.curve(*dials)
    assert "the veto 0." in own.curve(0.7, 0.1) and "the veto 0.3." in own.curve(0.5, 0.2)
    assert page_with({"linear": "other"}).curves == {}


def test_the_command_and_a_mounted_page(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        result = invoke("playground", saved, "--port", taken.getsockname()[1])
    assert result.exit_code == 1 and "Choose others" in result.stderr and result.stderr.count("\n") == 1
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda blocks, **options: launched.append(options))
    assert invoke("playground", saved, "--port", 0).exit_code == 0
    assert launched[0].items() >= {"server_name": "localhost", "server_port": None, "share": False}.items()
    with TestClient(mount(FastAPI(), chat_pair())) as client:
        assert "citer playground" in client.get("/playground/").text


# ---- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no `chromium` on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextmanager
def shown(browser: Any, model: Any, new_tokens: int = 40, **options: Any) -> Iterator[Any]:
    """The page of a pair in a browser; fails when the console has errors or anything comes from elsewhere."""
    blocks, wrong = page(model, new_tokens), list[str]()
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, share=False, **LOOK)
    tab = browser.new_page(**options)
    tab.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("response", lambda one: wrong.append(one.url) if one.status >= 400 else None)
    tab.on("request", lambda one: wrong.append(one.url) if not one.url.startswith((address, "data:")) else None)
    try:
        tab.goto(address)
        yield tab
        tab.close()
    finally:
        blocks.close(verbose=False)
    assert not wrong


def send(tab: Any, text: str, *keys: str) -> None:
    tab.get_by_label("Prompt").fill(text)
    for key in keys or ("Enter",):
        tab.keyboard.press(key)


def wait_for_tokens(tab: Any, place: str) -> set[str]:
    """Wait for 40 tokens in a place of the page, and return their classes."""
    tab.locator(place, has_text="40 tokens").wait_for()
    return set(tab.locator(f"{place} span").evaluate_all("all => all.map(one => one.className)"))


def test_with_the_keyboard_alone_both_colours_appear_and_a_slider_moves(browser: Any) -> None:
    with shown(browser, chat_pair()) as tab:
        send(tab, "hello")
        assert {"slm", "llm"} <= wait_for_tokens(tab, "#chat") and not tab.get_by_label("Prompt").input_value()
        colour = "one => getComputedStyle(one).backgroundColor + getComputedStyle(one).textDecorationLine"
        assert len({tab.locator(f"#chat .{kind}").first.evaluate(colour) for kind in ("slm", "llm")}) == 2
        for key, kinds in (("Home", {"slm"}), ("End", {"llm", "accepted"})):
            tab.locator("input[type=range]").first.press(key)
            send(tab, "again", "Tab", "Tab", "Enter")
            assert wait_for_tokens(tab, "#pair") <= kinds
            tab.reload()


def test_outputs_and_prompts_are_text_on_a_phone_too(browser: Any) -> None:
    model = chat_pair()
    model._tokenizer = character_tokenizer(characters=[*HTML, *sorted({*"".join(HTML), *"ua:\n"})])
    model.generation_config.update(suppress_tokens=[index for index in range(model.vocab_size) if not 3 <= index < 8])
    with shown(browser, model, viewport={"width": 390, "height": 844}) as tab:
        send(tab, "".join(HTML), "Tab", "Tab", "Enter")
        wait_for_tokens(tab, "#pair")
        send(tab, "".join(HTML))
        wait_for_tokens(tab, "#chat")
        assert tab.inner_text("#chat .prompt") == "".join(HTML)
        assert set(tab.locator("#chat span").all_inner_texts()) <= set(HTML)
        assert tab.evaluate("window.hacked") is None and not tab.locator("#chat img").count()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_stopping_leaving_and_errors(browser: Any, slow: Any) -> None:
    def ends() -> bool:
        count = len(slow[1])
        time.sleep(0.3)
        return len(slow[1]) == count

    with shown(browser, slow[0], 200) as tab:
        send(tab, "hello")
        tab.locator("#chat .llm").first.wait_for()
        tab.get_by_role("button", name="Stop").click()
        assert any(ends() for _ in range(5))
        kept = tab.inner_text("#chat .citer")
        send(tab, "x" * 300)
        tab.get_by_text("too many for the context of 256").wait_for()
        assert tab.inner_text("#chat .citer") == kept and "200 tokens" not in kept
        tab.get_by_role("button", name="New chat").click()
        tab.locator("#chat .citer").wait_for(state="detached")
        send(tab, "hello")
        tab.locator("#chat .llm").first.wait_for()
        slow[1].clear()
    assert any(ends() for _ in range(5)) and len(slow[1]) < 100
