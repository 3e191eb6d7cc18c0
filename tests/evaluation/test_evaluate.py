"""An evaluation: its numbers computed again naively, what it refuses, and what an interrupt leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from citer_hf.evaluation.costs import PairCosts, scoring_cost
from citer_hf.evaluation.scoring import score_texts, spread_thresholds
from torch import nn

from citer_hf.data.tokens import encode_prompt
from citer_hf.evaluation import evaluate as module
from citer_hf.evaluation import writing
from citer_hf.evaluation.evaluate import evaluate, method_name
from citer_hf.evaluation.points import bootstrap_interval
from citer_hf.evaluation.provenance import anonymous, module_fingerprint
from citer_hf.evaluation.results import Results
from citer_hf.model.routers import ConfidenceRouter, EntropyRouter, LinearRouter, RandomRouter
from tests.conftest import make_pair
from tests.evaluation_data import LetterTokenizer, examples, has_letter
from tests.reference import naive_generate, naive_logits

NEW = 8
EXAMPLES = examples()
TOKENIZER = LetterTokenizer()
PROMPTS = [encode_prompt(example, TOKENIZER) for example in EXAMPLES]


def routers() -> dict[str, nn.Module]:
    torch.manual_seed(4)
    return {"random": RandomRouter(32), "entropy": EntropyRouter(32), "query": LinearRouter(32)}


def run(pair: Any, **options: Any) -> Results:
    options = {"routers": routers(), "shares": (0.2, 0.5, 0.8), "max_new_tokens": NEW, **options}
    return evaluate(pair, EXAMPLES, options.pop("checker", has_letter), tokenizer=TOKENIZER, **options)


def comparable(results: Results) -> dict[str, Any]:
    """What does not depend on the clock."""
    values = json.loads(json.dumps(results.as_dict()))
    points = [*values["ends"].values(), *(one for method in values["methods"].values() for one in method)]
    for one in points:
        assert one.pop("seconds") > 0
    values["provenance"].pop("date")
    return values


@pytest.fixture(scope="module")
def results() -> Results:
    return run(make_pair(hidden_size=48, num_hidden_layers=3))


@pytest.mark.parametrize("name", ["random", "entropy"])
def test_points_are_what_decoding_each_problem_alone_gives(pair: Any, results: Results, name: str):
    router = routers()[name]
    other = module.with_router(pair, router)
    costs, scoring = PairCosts(pair), scoring_cost(router)
    assert len(results.methods[name]) == 3
    for point in results.methods[name]:
        rows = [naive_generate(other, prompt, NEW, point.threshold)[:2] for prompt in PROMPTS]
        texts = [TOKENIZER.decode(tokens) for tokens, _ in rows]
        correct = ["y" in text for text in texts]
        spent = [costs.routed(scoring, len(prompt), row[1]) for prompt, row in zip(PROMPTS, rows, strict=True)]
        tokens = sum(len(row[0]) for row in rows)
        assert point.accuracy == np.mean(correct)
        assert point.accuracy_ci == bootstrap_interval(correct, seed=0)
        assert point.extracted == np.mean(["a" in text for text in texts])
        assert point.llm_share == point.llm_calls == sum(sum(row[1]) for row in rows) / tokens
        assert point.bytes == pytest.approx(sum(one.bytes for one in spent) / tokens)
        assert point.flops == pytest.approx(sum(one.flops for one in spent) / tokens)


@pytest.mark.parametrize(("end", "threshold"), [("slm", 0.0), ("llm", 2.0)])
def test_the_ends_are_the_models_alone(pair: Any, results: Results, end: str, threshold: float):
    rows = [naive_generate(pair, prompt, NEW, threshold)[0] for prompt in PROMPTS]
    costs = PairCosts(pair)
    spent = [costs.alone(end == "llm", len(prompt), len(row)) for prompt, row in zip(PROMPTS, rows, strict=True)]
    point = results.ends[end]
    assert point.accuracy == np.mean(["y" in TOKENIZER.decode(row) for row in rows])
    assert point.extracted == np.mean(["a" in TOKENIZER.decode(row) for row in rows])
    assert (point.threshold, point.llm_share) == (threshold, float(end == "llm"))
    assert point.bytes == pytest.approx(sum(one.bytes for one in spent) / sum(map(len, rows)))


def test_a_query_level_router_chooses_among_the_texts_of_the_ends(pair: Any, results: Results):
    router = routers()["query"]
    scores = [naive_logits(module.with_router(pair, router), prompt, 0.0)[1] for prompt in PROMPTS]
    ends = [[naive_generate(pair, prompt, NEW, threshold)[0] for prompt in PROMPTS] for threshold in (0.0, 2.0)]
    assert results.methods["query"]
    for point in results.methods["query"]:
        by_llm = [score < point.threshold - 1e-6 for score in scores]
        texts = [ends[int(chosen)][row] for row, chosen in enumerate(by_llm)]
        llm_tokens = sum(len(text) for text, chosen in zip(texts, by_llm, strict=True) if chosen)
        assert 0 < sum(by_llm) < len(by_llm)
        assert point.accuracy == np.mean(["y" in TOKENIZER.decode(text) for text in texts])
        assert point.llm_share == llm_tokens / sum(map(len, texts))


def test_scores_along_texts_are_those_of_decoding(pair: Any):
    texts, scores = zip(*[naive_generate(pair, prompt, NEW, 0.5)[::2] for prompt in PROMPTS], strict=True)
    scored = score_texts(pair, {"own": pair.router}, PROMPTS, texts, batch_tokens=40).scores["own"]
    for row in range(len(PROMPTS)):
        assert scored[row].tolist() == pytest.approx(scores[row], abs=1e-4)


def test_thresholds_send_the_wanted_shares_of_the_scores():
    scores = np.random.default_rng(0).random(1000).astype(np.float32)
    thresholds = spread_thresholds(scores, (0.1, 0.25, 0.9))
    assert [float((scores < threshold).mean()) for threshold in thresholds] == pytest.approx([0.1, 0.25, 0.9])


def test_tied_scores_give_each_threshold_once():
    scores = np.array([0.5] * 60 + [1.0] * 40, dtype=np.float32)
    thresholds = spread_thresholds(scores, (0.1, 0.2, 0.5, 0.7, 0.9))
    assert [float((scores < threshold).mean()) for threshold in thresholds] == [0.6, 1.0]


def test_given_thresholds_are_used_as_they_are(pair: Any):
    results = run(pair, thresholds={"random": [0.7, 0.3]})
    assert {point.threshold for point in results.methods["random"]} == {0.3, 0.7}
    assert len(results.methods["entropy"]) == 3


def test_the_own_router_is_measured_under_the_name_of_its_method():
    assert method_name(make_pair(router="mlp")) == "citer"
    assert method_name(make_pair(router="linear")) == "co-llm"
    assert list(run(make_pair(router="confidence"), routers=None).methods) == ["confidence"]


class Interrupted:
    """A checker that stops the run at one of its calls."""

    def __init__(self, at: int):
        self.calls, self.at = 0, at

    def __call__(self, text: str, example: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return has_letter(text, example)


def test_a_run_that_was_interrupted_goes_on_where_it_stopped(pair: Any, tmp_path: Path, monkeypatch: Any):
    whole = run(pair, checker=Interrupted(-1), out=tmp_path / "whole")
    out = tmp_path / "out"
    decodes: list[Any] = []
    decode = writing.decode
    monkeypatch.setattr(
        writing, "decode", lambda *a, **k: decodes.append(k.get("router_threshold")) or decode(*a, **k)
    )
    for at in (8, 14, 24):
        with pytest.raises(KeyboardInterrupt):
            run(pair, checker=Interrupted(at), out=out)
    assert not (out / "results.json").exists()
    resumed = run(pair, checker=Interrupted(-1), out=out)
    assert comparable(resumed) == comparable(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    # Only the batch at which a run was interrupted is decoded again, twice in all: once it was still at the ends.
    measured = [one for one in decodes if one is not None]
    assert len(measured) == len({*measured}) + 2
    done = run(pair, checker=Interrupted(1), out=out)
    assert comparable(done) == comparable(resumed)
    assert Results.read(out / "results.json") == done


def test_a_directory_that_holds_anything_else_is_refused_and_left_alone(pair: Any, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds something else \(thesis.txt\)"):
        run(pair, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        run(pair, out=tmp_path / "thesis.txt")


def test_unfinished_work_of_other_arguments_is_refused_and_left_alone(pair: Any, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(pair, checker=Interrupted(14), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(FileExistsError, match="unfinished results of other arguments"):
        run(pair, checker=Interrupted(14), out=tmp_path, max_new_tokens=NEW + 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_results_of_other_arguments_are_refused_and_left_alone(pair: Any, tmp_path: Path):
    run(pair, out=tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="holds something else"):
        run(pair, out=tmp_path, seed=1)
    assert (tmp_path / "results.json").read_bytes() == before


class NanRouter(nn.Module):
    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return hidden[..., 0] * float("nan")


@pytest.mark.parametrize("options", [{}, {"thresholds": {"broken": [0.5]}}, {"query_level": ["broken"]}])
def test_a_router_that_gives_nan_is_named(pair: Any, options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"^router 'broken': \d+ of \d+ scores are NaN"):
        run(pair, routers={"broken": NanRouter()}, **options)


def test_a_checker_that_raises_is_named_with_the_row(pair: Any):
    def fussy(text: str, example: Any) -> Any:
        raise KeyError("no box") if example.row == 13 else ZeroDivisionError

    def choosy(text: str, example: Any) -> Any:
        return has_letter(text, example) if example.row != 13 else fussy(text, example)

    with pytest.raises(ValueError, match=r"checker .*choosy: it raised KeyError .* at row 13 ") as caught:
        run(pair, checker=choosy)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(TypeError, match="expected it to return a Verdict, got bool at row 13"):
        run(pair, checker=lambda text, example: True)


def test_data_that_nothing_can_be_judged_by_is_refused(pair: Any):
    with pytest.raises(ValueError, match=r"^examples: expected at least one"):
        evaluate(pair, [], has_letter, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"^row 11: it has no answer"):
        evaluate(pair, examples(answer=None), has_letter, tokenizer=TOKENIZER)


def test_a_prompt_that_fills_the_context_is_named_by_its_row():
    pair = make_pair(max_position_embeddings=9)
    with pytest.raises(ValueError, match=r"^row 12: its prompt has 9 tokens"):
        run(pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.5, 1.0)}, r"^shares: expected .* got 1.0"),
        ({"thresholds": {"none": [0.5]}}, r"^thresholds: there is no router named 'none'"),
        ({"thresholds": {"random": [float("nan")]}}, r"^thresholds: expected numbers from 0 up for 'random'"),
    ],
)
def test_a_senseless_sweep_is_refused(pair: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(pair, **options)


def test_the_provenance_names_neither_people_nor_places(results: Results):
    assert results.provenance["problems"] == len(EXAMPLES)
    assert results.provenance["checker"] == "tests.evaluation_data:has_letter"
    assert str(Path.home()) not in json.dumps(results.provenance)
    home = {"data": "/home/ada/sums.jsonl", "out": Path("~/out"), "model": "ada/router", "key": "hf_" + "x" * 30}
    assert anonymous({"n": 3, **home}) == {
        "n": 3,
        "data": "sums.jsonl",
        "out": "out",
        "model": "ada/router",
        "key": "hf_...",
    }


def test_routers_that_decide_otherwise_have_other_fingerprints():
    torch.manual_seed(0)
    made = [RandomRouter(32), RandomRouter(32, seed=1), ConfidenceRouter(32), LinearRouter(32), LinearRouter(32)]
    assert len({module_fingerprint(one) for one in made}) == len(made)
    assert module_fingerprint(RandomRouter(32)) == module_fingerprint(RandomRouter(32).eval())


def test_the_results_are_told_as_a_table_and_as_a_picture(pair: Any, tmp_path: Path):
    pytest.importorskip("matplotlib")
    results = run(pair, out=tmp_path)
    text = (tmp_path / "results.md").read_text()
    rows = sum(map(len, results.methods.values())) + 2 + len(results.methods)
    assert text.count("\n| ") == rows + 4
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_all_but_the_picture_is_there(pair: Any, tmp_path: Path, monkeypatch: Any, caplog: Any):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run(pair, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    assert "pip install 'citer-hf[plot]'" in caplog.text
