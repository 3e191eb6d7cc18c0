"""What all tests share: tiny pairs, scripted routers, and a watch for deprecation notices."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from citer_hf import CiterConfig, CiterForCausalLM
from tests.families import PAD, VOCAB, tiny_model
from tests.repositories import save_base_models

torch.set_num_threads(1)

# transformers says this of its own assisted generation.
NOT_OURS = ("Passing `generation_config` together with generation-related arguments",)


class DeprecationNotices(logging.Handler):
    """Collects what a library logs, rather than warns, about deprecated use."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(NOT_OURS):
            self.found.append(message)


@pytest.fixture(autouse=True)
def no_deprecated_use() -> Iterator[None]:
    """Fail a test during which transformers, torch or huggingface_hub log that something is deprecated."""
    handler = DeprecationNotices()
    loggers = [logging.getLogger(name) for name in ("transformers", "torch", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not handler.found, handler.found


class ScriptedRouter(nn.Module):
    """Sends chosen tokens to the LLM: call number k decides column k of the script, again and again."""

    def __init__(self, script: torch.Tensor):
        super().__init__()
        self.script = script.bool()
        self.calls = 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        columns = hidden.shape[1]
        index = torch.arange(self.calls, self.calls + columns) % self.script.shape[1]
        self.calls += columns
        return (~self.script[:, index]).float().expand(hidden.shape[0], columns)


def make_pair(
    slm: str = "llama", llm: str = "llama", router: Any = "random", threshold: float = 0.5, **llm_options: Any
):
    """A pair of tiny random models; a router is a kind, a dictionary or a module."""
    small = tiny_model(slm, seed=1)
    large = tiny_model(llm, seed=2, **llm_options)
    module = router if isinstance(router, nn.Module) else None
    kind = "custom" if module is not None else router
    config = CiterConfig(small.config, large.config, kind, router_threshold=threshold)
    return CiterForCausalLM(config, slm=small, llm=large, router=module).eval()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Returns a function that gives the warnings about static caches, as a process sees them that has just begun."""
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if "static" in record.getMessage()]


@pytest.fixture(scope="session")
def pair() -> CiterForCausalLM:
    """A Llama pair of different widths whose router decides at random, half and half. Not to be changed."""
    return make_pair(hidden_size=48, num_hidden_layers=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny pair like the one that ships."""
    from tests.chat_pairs import save_demo_pair

    return save_demo_pair(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small and a large model and their tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("bases")
    save_base_models(folder)
    return folder


@pytest.fixture
def small_machine(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `citer bench demo` take the tiny pair, and measure the bandwidth of memory in no time."""
    import citer_hf.demo
    from citer_hf.bench import bench

    monkeypatch.setattr(citer_hf.demo, "DEMO_PAIR", saved)
    monkeypatch.setattr(bench, "BUFFER", 1 << 20)


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Returns a list to which every forward pass of a model adds the number of tokens that it reads."""

    def watch(model: Any) -> list[int]:
        lengths: list[int] = []
        forward = model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            lengths.append(kwargs["input_ids"].shape[1])
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
        return lengths

    return watch


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which the weights of a base model are loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded weights"))


def random_prompts(lengths: tuple[int, ...] = (5, 9, 12), seed: int = 3) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of a batch, padded on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
