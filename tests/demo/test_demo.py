"""`citer demo`: its problems, its output, its measurements, its pair, and the script that trains that pair."""

import importlib.util
import json
import random
import re
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import citer_hf.demo
from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.demo import demo as module
from citer_hf.demo.demo import demo, export
from citer_hf.demo.problems import Problem, Step, _split_of, drill, is_correct, problem, problems
from tests.chat_pairs import invoke, save_demo_pair

MANY = list(problems("train", 0, 200))


def steps_of(problem: Problem) -> list[Step]:
    equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem.response)
    return [Step(int(before), symbol, int(operand), int(after)) for before, symbol, operand, after in equations]


def test_a_problem_depends_on_split_seed_and_index_alone_and_shares_no_equations_with_another_split() -> None:
    for split in ("train", "validation", "test"):
        assert {_split_of(steps_of(told)) for told in problems(split, 1, 100)} == {split}
    assert list(problems("test", 5, 20)) == [problem("test", 5, index) for index in range(20)]
    with pytest.raises(ValueError, match=r"'dev'.*train, validation or test"):
        problem("dev", 0, 1)  # type: ignore[arg-type]
    # The shipped pair was trained on these.
    told = problem("train", 0, 1)
    assert told.prompt.startswith("Zoe has 45 pencils. Then she uses 34 pencils. Later the number of pencils grows 4 ")
    assert told.response.endswith("so now 11 * 4 = 44 pencils. So Zoe has 44 pencils now.") and told.answer == "44"


def test_the_answer_follows_from_the_equations_and_is_the_last_number_of_the_response() -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for told in [*MANY, drill(random.Random(0))]:
        steps = steps_of(told)
        assert all(step.after == operations[step.symbol](step.before, step.operand) <= 99 for step in steps)
        assert all(step.after == following.before for step, following in pairwise(steps))
        assert told.answer == str(steps[-1].after)
        assert is_correct(told.response, told) and is_correct(told.prompt + told.response, told)
        for wrong in (told.prompt, "", "I do not know.", told.response + f" {int(told.answer) + 1}"):
            assert not is_correct(wrong, told)
        # Without the distraction the numbers of the story are those of the equations, in their order.
        numbers = iter(re.findall(r"\d+", told.prompt))
        assert all(number in numbers for number in [str(steps[0].before), *(str(step.operand) for step in steps)])
    assert {len(steps_of(told)) for told in MANY} == {2, 3, 4}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(citer_hf.demo, "DEMO_PAIR", save_demo_pair(tmp_path))
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 24)


@pytest.mark.usefixtures("tiny")
def test_demo_streams_problems_and_prints_a_table() -> None:
    result = invoke("demo", "--problems", 4)
    assert result.exit_code == 0 and not result.stderr
    assert [f"Problem {number}." in result.stdout for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert "[[" in result.stdout and "\x1b" not in result.stdout
    assert re.search(r"; [1-9]\d* of \d+.* tokens from the LLM\)", result.stdout)
    for part in ("SLM alone", "LLM alone", "pair at 0.5", "confidence at 0.5, veto 0.3", "lossless at 2"):
        assert part in result.stdout
    assert "4 held-out problems (seed 0), 4 at a time" in result.stdout


@pytest.mark.usefixtures("tiny")
def test_json_is_all_there_is_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 2)
    report = json.loads(invoke("demo", "--json", "--problems", 3, "--seed", 3).stdout)
    assert (report["seed"], report["problems"], report["slots"], report["complete"]) == (3, 3, 2, True)
    slm, llm, *pairs = report["rows"]
    assert (slm["name"], slm["llm_share"], slm["llm_passes_per_token"]) == ("SLM alone", 0, 0)
    assert (llm["name"], llm["llm_share"], llm["llm_passes_per_token"]) == ("LLM alone", 1, 1)
    dials = [("pair", 0.5, 0.0), ("confidence", 0.5, 0.3), ("lossless", 2.0, 0.0)]
    assert [(row["name"], row["router_threshold"], row["llm_veto"]) for row in pairs] == dials
    for row in report["rows"]:
        assert row["problems"] == 3 and 0 <= row["accuracy"] == row["correct"] / 3
        assert row["llm_share"] == row["llm_tokens"] / row["tokens"]
        assert 0 < row["tokens"] <= 3 * 24
        assert row["llm_passes_per_token"] == row["llm_passes"] / row["tokens"] <= 1
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    assert 0 < pairs[0]["llm_share"] < 1 and pairs[0]["llm_passes"] > 0
    sizes: dict[str, Any] = {"visible": False, "problems": 3, "seed": 3}
    again, at_0 = (demo(**sizes, router_threshold=threshold)["rows"][2] for threshold in (0.5, 0))
    counts = ("tokens", "llm_tokens", "llm_passes", "correct")
    for one, other in ((again, pairs[0]), (at_0, slm)):
        assert [one[name] for name in counts] == [other[name] for name in counts]
    assert [pairs[2][name] for name in ("correct", "tokens")] == [llm[name] for name in ("correct", "tokens")]


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_shows_the_complete_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = module.measure

    def interrupted(way: Any, *rest: Any) -> Any:
        if way[0] == "LLM alone":
            raise KeyboardInterrupt
        return measure(way, *rest)

    monkeypatch.setattr(module, "measure", interrupted)
    result = invoke("demo", "--problems", 1, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 130
    assert report["complete"] is False and [row["name"] for row in report["rows"]] == ["SLM alone"]
    shown = invoke("demo", "--problems", 1).stdout
    assert "Stopped." in shown and "SLM alone" in shown and "LLM alone" not in shown
    monkeypatch.setattr(CiterForCausalLM, "generate", Mock(side_effect=KeyboardInterrupt))
    assert "Nothing was measured." in invoke("demo", "--problems", 1).stdout


def test_export_writes_the_held_out_problems(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    result = invoke("demo", "--export", file, "--problems", 5, "--seed", 7)
    assert result.exit_code == 0 and not result.stdout
    before = file.read_bytes()
    assert [json.loads(line) for line in before.splitlines()] == [vars(told) for told in problems("test", 7, 5)]
    for path in (file, tmp_path / "nowhere" / "file"):
        with pytest.raises(FileExistsError, match="expected a new file in a directory that exists"):
            export(path)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_the_shipped_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 100)
    rows = demo(visible=False, problems=6, router_threshold=0.867)["rows"]
    slm, llm, pair, untrained, lossless = rows
    assert llm["correct"] >= 5 and slm["correct"] <= 4
    assert slm["correct"] <= pair["correct"] and 0 < pair["llm_share"] < 0.6
    for one in (untrained, lossless):
        assert one["correct"] == llm["correct"] and one["llm_passes_per_token"] < 0.25


SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "word_problems" / "train.py"


@pytest.fixture(scope="module")
def script() -> Any:
    specification = importlib.util.spec_from_file_location("word_problems", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "word_problems", module)
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
        for told in MANY[:100]:
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
