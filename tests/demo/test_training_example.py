"""The script that trains the shipped pair, and the pair itself."""

import importlib.util
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import citer_hf.demo
from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.demo.problems import problems

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "word_problems" / "train.py"
MANY = list(problems("train", 0, 100))


@pytest.fixture(scope="module")
def script() -> Any:
    specification = importlib.util.spec_from_file_location("word_problems", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "word_problems", module)
        specification.loader.exec_module(module)
    return module


def test_the_tokenizer_is_that_of_the_shipped_pair_and_lossless(script: Any) -> None:
    built, shipped = script.build_tokenizer(), AutoTokenizer.from_pretrained(citer_hf.demo.DEMO_PAIR)
    assert built.get_vocab() == shipped.get_vocab()
    assert built.chat_template == shipped.chat_template
    assert (built.padding_side, built.model_max_length) == (shipped.padding_side, shipped.model_max_length)
    assert len({built.pad_token_id, built.eos_token_id, built.unk_token_id}) == 3
    for tokenizer in (built, shipped):
        assert tokenizer.tokenize("Tom has 47 books.") == ["Tom", " has", " 4", "7", " books", "."]
        for told in MANY:
            prompt, response, text = tokenizer([told.prompt, told.response, told.prompt + told.response]).input_ids
            assert prompt + response == text and tokenizer.unk_token_id not in text
            assert tokenizer.decode(text) == told.prompt + told.response


def test_trained_and_shipped_pairs_use_a_cache(script: Any, tmp_path: Path, monkeypatch: Any, count_calls: Any):
    small = script.Recipe(hidden_size=8, layers=1, heads=2, intermediate_size=8, steps=2, learning_rate=1e-3)
    monkeypatch.setattr(script, "RECIPES", {"slm": small, "llm": small})
    train, report = script.train, script.report
    monkeypatch.setattr(script, "train", lambda recipe, out: train(recipe, out, batch_size=2))
    monkeypatch.setattr(script, "report", lambda name, model: report(name, model, count=2))
    monkeypatch.setattr(script, "accuracy", lambda *rest: 0.5)
    script.main(["--out", str(tmp_path)])
    assert CiterForCausalLM.from_pretrained(tmp_path / "router").config.router_threshold == script.THRESHOLD
    # Each model alone keeps keys and values, in forward passes and in `generate`.
    for role, pair in product(("slm", "llm"), (tmp_path / "router", citer_hf.demo.DEMO_PAIR)):
        prompt = AutoTokenizer.from_pretrained(pair)(MANY[0].prompt, return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(pair / role)
        assert {"past_key_values", "cache"} & set(model(**prompt))
        lengths = count_calls(model)
        model.generate(**prompt, max_new_tokens=4, eos_token_id=-1)
        assert lengths == [prompt.input_ids.shape[1], 1, 1, 1]
        assert model.config.use_cache and getattr(CiterConfig.from_pretrained(pair), f"{role}_config").use_cache
