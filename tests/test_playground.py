"""The page of `citer playground`: in headless Chromium, and what its events answer."""

import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
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
from citer_hf.playground import LLM_ALONE, LOOK, NO_CURVE, Output, Page, PlaygroundOptions, mount, page
from tests.chat_pairs import character_tokenizer, chat_pair, invoke

CHROMIUM = shutil.which("chromium")
HTML = ("<script>window.hacked=1</script>", "<img src=x onerror=hacked=1>", "${window.hacked=1}", "{{value}}", "</p>")
EMPTY: tuple[Any, str] = ((), "")


def last(outputs: Iterator[Any]) -> Any:
    *_, found = outputs
    return found


def test_the_class_of_a_token_is_what_the_record_says() -> None:
    model = chat_pair()
    twins = CiterForCausalLM(model.config, slm=model.slm, llm=model.slm, router=model.router)
    twins._tokenizer, twins.generation_config = model._tokenizer, model.generation_config
    seen = set()
    for one, veto in ((model, 0.0), (model, 1.0), (twins, 0.0)):
        output = last(Page(one, 12).generate("pair", ({"role": "user", "content": "hello"},), 0.5, veto))
        routing = output.cache.routing
        flags = zip(*(record[0].tolist() for record in (routing.to_llm, routing.vetoed)), strict=True)
        kinds = [kind for kind, _, _ in output.tokens]
        assert [(kind != "slm", kind == "vetoed") for kind in kinds] == list(flags) and len(kinds) == 12
        flagged = sum(kind in ("llm", "accepted") for kind in kinds)
        assert kinds.count("accepted") == pytest.approx(routing.accepted * flagged)
        assert f"{routing.llm_calls} passes" in output.figures()
        assert all(
            f"score {score:.3f}" in title
            for score, (_, title, _) in zip(routing.scores[0], output.tokens, strict=True)
        )
        seen |= set(kinds)
    assert seen == {"slm", "llm", "vetoed", "accepted"}


def test_side_by_side_shows_what_each_model_writes_alone() -> None:
    model = chat_pair()
    # Settings of a published generation config, which both models alone are given too.
    model.generation_config.update(router_threshold=0.3, use_cache=False, num_beams=2)
    ids = torch.tensor([model._tokenizer("u:hi\na:", add_special_tokens=False).input_ids])
    own = Page(model, 8)
    for part, generate in (("slm", model.slm.generate), ("llm", model.llm.generate), ("pair", model.generate)):
        options = {"generation_config": model.generation_config} if part != "pair" else {"router_threshold": 0.5}
        model.generation_config.update(num_beams=1, use_cache=True, max_new_tokens=8)
        expected = model._tokenizer.decode(generate(ids, **options)[0, ids.shape[1] :])
        model.generation_config.update(num_beams=2, use_cache=False)
        output = last(own.generate(part, ({"role": "user", "content": "hi"},), 0.5, 0.0))
        assert "".join(text for _, _, text in output.tokens) == expected
    columns = last(own.compare("hi", 0.5, 0.0))
    assert "0 passes" in columns[0] and "100.0% of the tokens, 8 passes" in columns[1] and "Pair" in columns[2]


def test_a_chat_goes_on_and_without_a_template_every_prompt_is_by_itself() -> None:
    for template, second in ({}, "u:one\na:{}<eos>u:two\na:"), ({"template": None}, "two"):
        model = chat_pair(**template)
        own, calls = Page(model, 4), []
        _, chat, _ = last(own.chat("one", EMPTY, 0.5, 0.0))
        given = own.inputs(
            Output("pair", None, model._tokenizer), (*chat[0], {"role": "user", "content": "two"}), 0, 0
        )
        assert model._tokenizer.decode(given["input_ids"][0]) == second.format(chat[0][1]["content"])
        assert len(chat[0][1]["content"]) == 4 and not calls
    assert list(own.chat("  ", chat, 0.5, 0.0)) == list(own.compare("", 0.5, 0.0)) == []


def test_what_cannot_be_done_is_a_message_of_the_page() -> None:
    own = Page(chat_pair(max_position_embeddings=40), 12)
    for text, chat, threshold, veto, told in (
        ("a" * 50, (), 0.5, 0.0, "55 tokens are too many for the context of 40"),
        ("a", (), 3.0, 0.0, "router_threshold"),
        ("a", (), 0.5, -1.0, "llm_veto"),
        ("a", ({"role": "system", "content": "refuse"},), 0.5, 0.0, "no system messages"),
    ):
        with pytest.raises(gr.Error, match=told):
            list(own.chat(text, (chat, ""), threshold, veto))
    nameless = chat_pair()
    nameless._tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        page(nameless)


def test_a_generation_ends_when_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_pair()
    calls = slowly(model, monkeypatch)
    for part in ("pair", "slm"):
        outputs = Page(model, 500).generate(part, ({"role": "user", "content": "hi"},), 0.5, 0.0)
        next(outputs)
        outputs.close()
        count = len(calls)
        time.sleep(0.2)
        assert 0 < count == len(calls) < 100


def slowly(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the SLM slow; the list that is returned grows with its passes."""
    forward, calls = model.slm.forward, []

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.slm, "forward", slow)
    return calls


def test_the_curve_is_that_of_the_router_with_the_nearest_veto(saved: Path, tmp_path: Path) -> None:
    def point(threshold: float | None, share: float, accuracy: float, veto: float = 0.0) -> dict[str, Any]:
        return dataclasses.asdict(Point(threshold, accuracy, (0, 1), share, share / 2, 1, 1, veto))

    router = shutil.copytree(saved, tmp_path / "router")
    assert Page(CiterForCausalLM.from_pretrained(router), 8).curve(0.5, 0.0) == NO_CURVE
    methods = {
        "random": [point(0.5, 0.4, 0.6), point(0.9, 0.8, 0.7)],
        "random, veto 0.3": [point(0.5, 0.6, 0.7, 0.3)],
        "linear": [point(0.5, 0.1, 0.9)],
    }
    results = {"ends": {"slm": point(0, 0, 0.2), "llm": point(2, 1, 0.8)}, "methods": methods, "summary": {}}
    results["provenance"] = {"routers_sha256": {"random": None, "random, veto 0.3": None, "linear": "other"}}
    (router / "results.json").write_text(json.dumps(results))
    own = Page(CiterForCausalLM.from_pretrained(router), 8)
    assert own.curves[0.0] == [(0, 0, 0, 0.2), (0.5, 0.4, 0.2, 0.6), (0.9, 0.8, 0.4, 0.7), (LLM_ALONE, 1, 0.5, 0.8)]
    told = own.curve(0.7, 0.1)
    assert "accuracy 65.0%, 60.0% of the tokens" in told and "0.300 LLM passes" in told and "the veto 0." in told
    assert "accuracy 70.0%, 60.0%" in own.curve(0.5, 0.2) and "the veto 0.3." in own.curve(0.5, 0.2)
    assert "accuracy 20.0%" in own.curve(0.0, 0.0) and "accuracy 80.0%" in own.curve(LLM_ALONE, 0.0)
    del results["provenance"]["routers_sha256"]["random"], results["provenance"]["routers_sha256"]["random, veto 0.3"]
    (router / "results.json").write_text(json.dumps(results))
    assert not Page(CiterForCausalLM.from_pretrained(router), 8).curves


def test_the_command_and_a_mounted_page(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        result = invoke("playground", saved, "--port", taken.getsockname()[1])
        assert result.exit_code == 1 and "Choose others" in result.stderr and result.stderr.count("\n") == 1
    assert invoke("playground", saved, "--max-new-tokens", 0).exit_code == 2
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda blocks, **options: launched.append(options))
    assert invoke("playground", saved, "--port", 0).exit_code == 0
    assert launched[0]["server_name"] == PlaygroundOptions.host and launched[0]["server_port"] is None
    app = FastAPI()
    app.get("/health")(lambda: "ok")
    with TestClient(mount(app, chat_pair())) as client:
        assert client.get("/health").json() == "ok" and "citer playground" in client.get("/playground/").text


# ---- in a browser -------------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium` on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def shown(browser: Any, model: Any, new_tokens: int = 40, **options: Any) -> Iterator[Any]:
    """The page of a pair in a browser; fails when the console has errors or anything comes from elsewhere."""
    blocks = page(model, new_tokens)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, share=False, **LOOK)
    wrong: list[str] = []
    try:
        tab = browser.new_page(**options)
        tab.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("response", lambda one: wrong.append(one.url) if one.status >= 400 else None)
        tab.on("request", lambda one: wrong.append(one.url) if not one.url.startswith((address, "data:")) else None)
        tab.goto(address)
        tab.get_by_label("Prompt").wait_for()
        yield tab
        tab.close()
    finally:
        blocks.close(verbose=False)
    assert not wrong


def until(condition: Callable[[], Any]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 10 s")


def count(tab: Any, selector: str) -> int:
    return tab.locator(selector).count()


@in_a_browser
def test_with_the_keyboard_alone_a_prompt_is_answered_in_both_colours_and_a_slider_moves(browser: Any) -> None:
    with shown(browser, chat_pair()) as tab:
        tab.get_by_label("Prompt").focus()
        tab.keyboard.type("hello")
        tab.keyboard.press("Enter")
        until(lambda: "40 tokens" in tab.inner_text("#chat"))
        assert count(tab, "#chat .slm") and count(tab, "#chat .llm") and not tab.get_by_label("Prompt").input_value()
        colours = {
            tab.locator(f"#chat .{kind}").first.evaluate("e => getComputedStyle(e).background")
            for kind in ("slm", "llm")
        }
        assert len(colours) == 2
        for key, kinds in (("Home", {"slm"}), ("End", {"llm", "accepted"})):
            tab.locator("input[type=range]").first.focus()
            tab.keyboard.press(key)
            tab.get_by_label("Prompt").fill("again")
            for _ in range(10):
                tab.keyboard.press("Tab")
                if tab.evaluate("document.activeElement.innerText") == "Side by side":
                    break
            tab.keyboard.press("Enter")
            until(lambda: "40 tokens" in tab.inner_text("#pair"))
            found = set(tab.locator("#pair span").evaluate_all("all => all.map(one => one.className)"))
            assert found <= kinds
            tab.reload()


@in_a_browser
def test_outputs_and_prompts_are_text_on_a_phone_too(browser: Any) -> None:
    model = chat_pair()
    model._tokenizer = character_tokenizer(characters=[*HTML, *sorted({*"".join(HTML), *"ua:\n"})])
    model.generation_config.update(suppress_tokens=[index for index in range(model.vocab_size) if not 3 <= index < 8])
    with shown(browser, model, viewport={"width": 390, "height": 844}) as tab:
        tab.get_by_label("Prompt").fill("".join(HTML))
        tab.get_by_role("button", name="Side by side").click()
        until(lambda: "40 tokens" in tab.inner_text("#pair"))
        tab.get_by_role("button", name="Send").click()
        until(lambda: "40 tokens" in tab.inner_text("#chat"))
        assert "".join(HTML) in tab.inner_text("#chat .prompt")
        assert set(tab.locator("#chat span").all_inner_texts()) <= set(HTML)
        assert tab.evaluate("window.hacked") is None and not count(tab, "#chat img")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@in_a_browser
def test_stopping_leaving_and_errors(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_pair()
    calls = slowly(model, monkeypatch)

    def begins(tab: Any) -> None:
        calls.clear()
        tab.get_by_label("Prompt").fill("hello")
        tab.keyboard.press("Enter")
        until(lambda: count(tab, "#chat span") > 3)

    def ends() -> bool:
        before = len(calls)
        time.sleep(0.3)
        return len(calls) == before < 150

    with shown(browser, model, 500) as tab:
        begins(tab)
        tab.get_by_role("button", name="Stop").click()
        until(ends)
        kept = tab.inner_text("#chat .citer")
        tab.get_by_label("Prompt").fill("x" * 300)
        tab.keyboard.press("Enter")
        tab.get_by_text("too many for the context of 256").wait_for()
        assert tab.inner_text("#chat .citer") == kept
        tab.get_by_role("button", name="New chat").click()
        until(lambda: not tab.inner_text("#chat").strip())
        begins(tab)
    until(ends)
