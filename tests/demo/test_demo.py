"""`citer demo`: its problems, its output, its measurements."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import citer_hf.demo
from citer_hf import CiterForCausalLM
from citer_hf.demo import demo as module
from citer_hf.demo.demo import demo, export, spread_thresholds
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


def test_the_answer_follows_from_the_equations_and_the_equations_from_the_prompt() -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for told in [*MANY, drill(random.Random(0))]:
        steps = steps_of(told)
        assert all(step.after == operations[step.symbol](step.before, step.operand) <= 99 for step in steps)
        assert all(step.after == following.before for step, following in pairwise(steps))
        assert told.answer == str(steps[-1].after)
        # Without the distraction the numbers of the story are those of the equations, in their order.
        numbers = iter(re.findall(r"\d+", told.prompt))
        assert all(number in numbers for number in [str(steps[0].before), *(str(step.operand) for step in steps)])
    assert {len(steps_of(told)) for told in MANY} == {2, 3, 4}


def test_the_answer_is_the_last_number_of_the_response() -> None:
    for told in MANY:
        assert is_correct(told.response, told) and is_correct(told.prompt + told.response, told)
        for wrong in (told.prompt, "", told.response + f" {int(told.answer) + 1}"):
            assert not is_correct(wrong, told)
    assert not is_correct("I do not know.", Problem("What?\n", "", ""))


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
    for part in ("SLM alone", "LLM alone", "pair at 0.5", "4 held-out problems (seed 0)", "batches of 4"):
        assert part in result.stdout
    assert result.stdout.count("pair at") == 3


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("threshold", "share", "alone"), [(0, "0 of", 0), (2, r"(\d+) of \1", 1)])
def test_at_the_ends_of_the_threshold_one_model_is_alone(threshold: float, share: str, alone: int, capsys: Any):
    rows = demo(problems=1, router_threshold=threshold).as_dict()["rows"]
    pair, expected = rows[2], rows[alone]
    for key in ("name", "router_threshold", "seconds", "tokens_per_second"):
        del pair[key], expected[key]
    assert pair == expected
    shown = capsys.readouterr().out
    assert re.search(rf"; {share}.* tokens from the LLM\)", shown)
    assert shown.count("[[") == 1 + (threshold == 2)


@pytest.mark.usefixtures("tiny")
def test_json_is_all_there_is_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    report = json.loads(invoke("demo", "--json", "--problems", 3, "--seed", 3).stdout)
    assert (report["seed"], report["problems"], report["batch_size"], report["complete"]) == (3, 3, 2, True)
    slm, llm, *pairs = report["rows"]
    assert (slm["name"], slm["llm_share"], slm["llm_passes_per_token"]) == ("SLM alone", 0, 0)
    assert (llm["name"], llm["llm_share"], llm["llm_passes_per_token"]) == ("LLM alone", 1, 1)
    assert [row["router_threshold"] for row in pairs] == spread_thresholds(0.5)
    for row in report["rows"]:
        assert row["problems"] == 3 and 0 <= row["accuracy"] == row["correct"] / 3
        assert row["llm_share"] == row["llm_tokens"] / row["tokens"]
        assert 0 < row["tokens"] <= 3 * 24
        assert row["llm_tokens"] <= row["llm_passes"] + 3 and row["llm_passes"] <= row["tokens"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    shares = [row["llm_share"] for row in pairs]
    assert shares == sorted(shares) and 0 < shares[0] < shares[2] < 1
    again = demo(visible=False, problems=3, seed=3, router_threshold=0.5).as_dict()["rows"][2]
    counts = ("tokens", "llm_tokens", "llm_passes", "correct")
    assert [again[name] for name in counts] == [pairs[1][name] for name in counts]


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_shows_the_complete_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = module.measure

    def interrupted(model: Any, tokenizer: Any, chosen: Any, name: str, *rest: Any) -> Any:
        if name == "LLM alone":
            raise KeyboardInterrupt
        return measure(model, tokenizer, chosen, name, *rest)

    monkeypatch.setattr(module, "measure", interrupted)
    result = invoke("demo", "--problems", 1, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 130
    assert report["complete"] is False and [row["name"] for row in report["rows"]] == ["SLM alone"]
    shown = invoke("demo", "--problems", 1).stdout
    assert "Stopped." in shown and "SLM alone" in shown and "LLM alone" not in shown
    monkeypatch.setattr(CiterForCausalLM, "generate", lambda *rest, **options: interrupted(0, 0, 0, "LLM alone"))
    assert "Stopped before anything was measured." in invoke("demo", "--problems", 1).stdout


def test_export_writes_the_held_out_problems(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    result = invoke("demo", "--export", file, "--problems", 5, "--seed", 7)
    assert result.exit_code == 0 and not result.stdout
    before = file.read_bytes()
    assert [json.loads(line) for line in before.splitlines()] == [vars(told) for told in problems("test", 7, 5)]
    with pytest.raises(FileExistsError, match="exists already"):
        export(file)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        export(tmp_path / "nowhere" / "file")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_options_without_a_meaning_are_errors() -> None:
    for arguments in ("--router-threshold nan", "--export x --json", "--export /nowhere/at/all"):
        result = invoke("demo", *arguments.split())
        assert result.exit_code in (1, 2) and not result.stdout and result.stderr.count("Error: ") == 1
    with pytest.raises(ValueError, match="problems: expected at least 1, got 0"):
        demo(problems=0)


def test_thresholds_lie_around_the_shipped_one() -> None:
    for shipped in (0.0, 0.5, 0.99, 1.0, 1.5):
        low, middle, high = spread_thresholds(shipped)
        assert 0 <= low <= middle == shipped and high <= 1


def test_the_shipped_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 100)
    rows = demo(visible=False, problems=6, router_threshold=0.867).as_dict()["rows"]
    slm, llm, pair = rows
    assert llm["correct"] >= 5 and slm["correct"] <= 4
    assert slm["correct"] <= pair["correct"] and 0 < pair["llm_share"] < 0.6
