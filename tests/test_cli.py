"""`citer` and `citer chat`, as a user and as a script meet them."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import citer_hf.demo
from tests.chat_pairs import chat_pair, invoke, save_demo_pair

CITER = [sys.executable, "-m", "citer_hf.cli"]


@pytest.fixture(scope="module")
def demo_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo_pair(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def chat_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pair to chat with, one token per character."""
    folder = tmp_path_factory.mktemp("chat")
    chat_pair().save_pretrained(folder / "pair", save_base_models=True)
    return folder / "pair"


@pytest.fixture
def in_place_of_the_shipped(demo_pair: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(citer_hf.demo, "PAIR", demo_pair)
    return demo_pair


def test_chat_from_a_pipe(chat_directory: Path) -> None:
    lines = "hello\n\n/stats\n/threshold 2\nhello again\n/stats\n/reset\n/stats\n/nonsense\n"
    result = invoke("chat", chat_directory, "--max-new-tokens", 8, text=lines)
    assert result.exit_code == 0
    assert "[[" in result.stdout and "\x1b" not in result.stdout and "> " not in result.stdout
    last = re.findall(r"last answer  (\d+) tokens: (\d+) by the SLM, (\d+) by the LLM", result.stdout)
    total = re.findall(r"whole chat   (\d+) tokens", result.stdout)
    assert [turn[0] for turn in last] == ["8", "8", "0"] and total == ["8", "16", "0"]
    assert last[1] == ("8", "0", "8") and last[0][2] != "0"
    assert re.search(r"\b[1-9]\d* kept in the cache", result.stdout)
    assert result.stderr == "Error: there is no command /nonsense; /help lists them.\n"


def test_what_follows_exit_is_not_read(chat_directory: Path) -> None:
    result = invoke("chat", chat_directory, text="/exit\n/nonsense\n")
    assert result.exit_code == 0 and not result.stderr


def test_the_threshold_of_the_command_line(chat_directory: Path) -> None:
    result = invoke("chat", chat_directory, "--router-threshold", 0, "--max-new-tokens", 8, text="hello\n/stats\n")
    assert "Threshold 0." in result.stdout and "8 by the SLM, 0 by the LLM" in result.stdout


def test_demo_is_the_name_of_the_shipped_pair(in_place_of_the_shipped: Path) -> None:
    result = invoke("chat", "demo", "--max-new-tokens", 4, text="Eva has 2 apples.\n/stats\n")
    assert result.exit_code == 0 and "4 tokens" in result.stdout


def test_chat_refuses_what_is_no_router(demo_pair: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in (demo_pair / "slm", tmp_path, tmp_path / "nothing", tmp_path / "file", "./nothing"):
        result = invoke("chat", name)
        assert result.exit_code == 1 and not result.stdout
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--router-threshold", "-0.1"], 2),
        (["--max-new-tokens", "0"], 2),
        (["--dtype", "float99"], 1),
        (["--device-map", "abacus"], 1),
    ],
    ids=str,
)
def test_chat_refuses_what_means_nothing(chat_directory: Path, arguments: list[str], status: int) -> None:
    result = invoke("chat", chat_directory, *arguments)
    assert result.exit_code == status
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1


def test_a_pair_without_a_tokenizer_cannot_chat(tmp_path: Path) -> None:
    model = chat_pair()
    model._tokenizer = None
    model.save_pretrained(tmp_path / "mute", save_base_models=True)
    result = invoke("chat", tmp_path / "mute")
    assert result.exit_code == 1 and "has no tokenizer" in result.stderr


def test_a_shipped_pair_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(citer_hf.demo, "PAIR", tmp_path / "gone")
    result = invoke("demo")
    assert result.exit_code == 1 and "gone" in result.stderr and result.stderr.count("\n") == 1


def test_help_names_the_commands() -> None:
    done = subprocess.run([*CITER, "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout and "chat" in done.stdout and not done.stderr


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *command: str):
        self.screen, terminal = os.openpty()
        environment = {**os.environ, "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            start_new_session=True,
            # Tests that run in the background of a script inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(terminal)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Read until a text is shown, which is then forgotten with all before it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert select.select([self.screen], [], [], max(end - time.monotonic(), 0))[0], self.shown
            self.shown += os.read(self.screen, 4096).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def press_ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)


def test_a_chat_on_a_terminal(tmp_path: Path) -> None:
    # An answer long enough for Ctrl-C to come before its end, however busy the machine is.
    model = chat_pair(max_position_embeddings=50_000)
    model.slm.config.max_position_embeddings = 50_000
    model.save_pretrained(tmp_path / "pair", save_base_models=True)
    terminal = Terminal(*CITER, "chat", str(tmp_path / "pair"), "--max-new-tokens", "40000")
    terminal.wait_for("/help lists the commands.")
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("\x1b[1;33m")
    terminal.press_ctrl_c()
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    # Between showing the prompt and waiting for keys, readline does not hear Ctrl-C before the next key.
    time.sleep(1)
    terminal.press_ctrl_c()
    terminal.wait_for("/exit or Ctrl-D leaves.")
    terminal.type("/threshold 0.25\n")
    terminal.wait_for("threshold 0.25\r\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.shown
