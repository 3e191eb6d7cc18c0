"""`citer check`: the report of tiny pairs, its advice, what is left out for time, and what makes no pair."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from citer_hf import CiterForCausalLM, check
from citer_hf.bench.contenders import ALONE, ASSISTED, LOSSLESS, SLM
from citer_hf.evaluation import check as module
from citer_hf.evaluation.check import advice
from tests.chat_pairs import invoke
from tests.families import tiny_model
from tests.llm_server import serving_llm
from tests.repositories import word_tokenizer

PROMPTS = [{"prompt": f"w7 w{index} w{index + 9}", "answer": f"w{index}"} for index in range(5, 8)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return tmp_path / "data.jsonl"


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a report by their kinds; the lossless end is the LLM's own text."""
    rows = {row["kind"]: row for row in report["rows"]}
    assert list(rows) == [ALONE, SLM, ASSISTED, LOSSLESS, "confidence", "entropy"]
    assert rows[LOSSLESS]["own_share"] == rows[ALONE]["own_share"] == rows[ALONE]["speedup"] == 1
    assert all(list(report["seconds"][role]) == ["1", "4", "8", "16", "32"] for role in ("slm", "llm"))
    parts = [value for name, value in report["memory"].items() if name.startswith(("slm", "llm", "kv"))]
    assert report["pair"]["fits"] and report["memory"]["needed_bytes"] == sum(parts)
    return rows


@pytest.mark.parametrize("table", [61, 70])
def test_the_lossless_end_is_the_llms_own_text_also_with_a_longer_table(bases: Path, tmp_path: Path, table: int):
    tiny_model("llama", seed=2, vocab_size=table, num_hidden_layers=3).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    report = check(bases / "slm", tmp_path, PROMPTS, max_new_tokens=9)
    rows = rows_of(report)
    assert rows[ASSISTED]["error"] is None and rows[ASSISTED]["own_share"] == 1 and 0 < report["overruled"] <= 1
    assert report["prompts"] == {"given": 3, "measured": 3, "max_new_tokens": 9} and report["notes"] == []
    assert report["pair"]["tables"] == {"slm": 61, "llm": table} and rows[SLM]["accuracy"] is None


def test_a_model_never_overrules_itself_and_what_is_left_out_for_time_is_said(bases: Path):
    report = check(bases / "llm", bases / "llm", PROMPTS, minutes=0)
    assert report["overruled"] == 0 and {row["own_share"] for row in rows_of(report).values()} == {1}
    assert report["prompts"] == {"given": 3, "measured": 1, "max_new_tokens": 16}
    first, second = report["notes"]
    assert first.startswith("1 of 3 prompts were ") and second.startswith("Outputs end after 16 ")


def test_the_shipped_pair_is_judged(tmp_path: Path):
    invoke("demo", "--export", tmp_path / "data.jsonl", "--problems", 1)
    result = invoke("check", "demo", "--data", tmp_path / "data.jsonl", "--checker", "math", "--json")
    rows = rows_of(json.loads(result.stdout))
    assert rows[ALONE]["accuracy"] == rows[LOSSLESS]["accuracy"] == 1 and rows[ALONE]["accuracy_ci"] == [1, 1]
    assert "1 problems say little of accuracy." in json.loads(result.stdout)["notes"]


def test_an_llm_on_a_server_is_compared_with_what_its_server_writes(bases: Path, data: Path):
    llm = CiterForCausalLM.from_pair(bases / "slm", bases / "llm").llm
    with serving_llm(llm, word_tokenizer()) as served:
        models = (bases / "slm", f"{served.url}#large", "--llm", f"config={bases / 'llm'}")
        result = invoke("check", *models, "--data", data, "--max-new-tokens", 4, "--json")
    report = json.loads(result.stdout)
    assert rows_of(report)[ASSISTED]["error"] and "llm_weight_bytes" not in report["memory"]
    printed = module.table(report).splitlines()
    assert printed[3].startswith("The LLM overrules the SLM at ") and printed[-1] == report["advice"]


def test_two_models_that_are_no_pair_are_a_verdict(bases: Path, data: Path, tmp_path: Path, monkeypatch: Any):
    tiny_model("llama", seed=2).save_pretrained(tmp_path / "other")
    word_tokenizer(prefix="v").save_pretrained(tmp_path / "other")
    for more in ((), ("--json",)):
        result = invoke("check", bases / "slm", tmp_path / "other", "--data", data, *more)
        assert result.exit_code == 1 and "no: the two do not make a pair. slm, llm: their tokenizers" in result.stdout
    assert json.loads(result.stdout)["pair"]["fits"] is False
    monkeypatch.setattr(module, "get_max_memory", lambda: {"cpu": 1000})
    monkeypatch.setattr(CiterForCausalLM, "from_pair", lambda *_, **__: pytest.fail("loaded"))
    assert "GB, and 1e-06 GB are free" in check(bases / "slm", bases / "llm", PROMPTS)["advice"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{slm}", "expected a CITER router repository, got model_type 'llama'"),
        ("", "SLM, LLM: expected the names or paths of two models"),
        ("{slm} {llm} --llm nothing=1", "unexpected keyword argument 'nothing'"),
        ("{slm} {llm} --llm logprobs=1", "they need an LLM on a server"),
        ("{slm} {llm} --checker none", "checker"),
        ("{slm} {llm} --map answer=response --checker exact", "--map prompt=COLUMN"),
    ],
)
def test_wrong_input_is_one_line(bases: Path, data: Path, arguments: str, message: str):
    given = arguments.format(slm=bases / "slm", llm=bases / "llm").split()
    result = invoke("check", *given, "--data", data)
    assert result.exit_code == 1 and result.stdout == "" and message in result.stderr.splitlines()[-1], result.stderr
    with pytest.raises(ValueError, match=r"^examples: expected at least one"):
        check(bases / "slm", bases / "llm", [])


@pytest.mark.parametrize(
    ("lossless", "confidence", "assisted", "share", "step", "sentence"),
    [
        (2.6, 2.7, 1.2, 0.9, 0.1, "yes, 2.6 times as fast at the LLM's own text."),
        (0.9, 1.0, 0.8, 0.9, 0.4, "no: the SLM costs 40% of the LLM."),
        (0.9, 3.0, 0.8, 0.2, 0.1, "no: it is 0.90 times as fast as the LLM, which overrules 20% of the tokens."),
        (2.0, 4.0, 1.0, 0.9, 0.1, "yes, 2.0 .* own text, and 4.0 .* 90% of the answers stay the LLM's own."),
        (1.0, 1.0, 1.4, 0.9, 0.1, "no: .*; .* transformers' assisted generation is faster, 1.4 times."),
    ],
)
def test_the_advice_is_one_sentence(lossless, confidence, assisted, share, step, sentence):
    speeds = {ALONE: 1.0, ASSISTED: assisted, LOSSLESS: lossless, "confidence": confidence}
    row = {"error": None, "own_share": share, "accuracy": None}
    rows = [row | {"kind": kind, "name": kind, "speedup": one} for kind, one in speeds.items()]
    rows[0]["own_share"] = 1.0
    found = {"rows": rows, "seconds": {"slm": {"1": step}, "llm": {"1": 1.0}}, "overruled": 0.2}
    assert re.fullmatch(sentence, advice(found)), advice(found)
