"""An evaluation: its numbers computed again naively, its errors, and its work after an interrupt."""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from citer_hf import CiterForCausalLM, runs
from citer_hf.costs import cost_of_model
from citer_hf.data.checkers import Verdict
from citer_hf.data.tokens import encode_prompt
from citer_hf.evaluation import evaluate as module
from citer_hf.evaluation.decode import decode, with_router
from citer_hf.evaluation.evaluate import evaluate, method_name
from citer_hf.evaluation.results import Results, bootstrap_interval, cost_of_passes, scoring_cost
from citer_hf.model.routers import ConfidenceRouter, EntropyRouter, LinearRouter, RandomRouter
from tests.conftest import make_pair
from tests.reference import naive_generate, naive_logits
from tests.training_data import LetterTokenizer, examples, has_letter

NEW = 8
EXAMPLES = examples()
TOKENIZER = LetterTokenizer()
PROMPTS = [encode_prompt(example, TOKENIZER) for example in EXAMPLES]


def routers() -> dict[str, nn.Module]:
    torch.manual_seed(4)
    return {"random": RandomRouter(32), "entropy": EntropyRouter(32), "query": LinearRouter(32)}


def run(pair: Any, checker: Any = has_letter, examples: Any = EXAMPLES, **options: Any) -> Results:
    options = {"routers": routers(), "shares": (0.2, 0.5, 0.8), "max_new_tokens": NEW, **options}
    pair._tokenizer = TOKENIZER
    return evaluate(pair, examples, checker, **options)


def comparable(results: Results) -> Any:
    """Return everything but times."""
    return re.sub(r'"(seconds|date)": [^,]+', "", json.dumps(asdict(results)))


@pytest.fixture(scope="module")
def results() -> Results:
    return run(make_pair(hidden_size=48, num_hidden_layers=3))


def test_an_output_that_many_thresholds_give_is_judged_once():
    judged: list[tuple[str, str]] = []

    def check(response: str, example: Any) -> Any:
        judged.append((example.id, response))
        return has_letter(response, example)

    run(make_pair(), check)
    assert len(judged) == len(set(judged)) > len(EXAMPLES)


@pytest.mark.parametrize("name", ["random", "entropy", "slm", "llm"])
def test_points_are_what_decoding_each_problem_alone_gives(pair: Any, results: Results, name: str):
    alone, router = name if name in results.ends else None, routers().get(name, pair.router)
    other = with_router(pair, router)
    slm, llm = cost_of_model(pair.slm), cost_of_model(pair.llm)
    scoring = 0 if alone else scoring_cost(router)
    points = [results.ends[name]] if alone else results.methods[name]
    assert len(points) == 3 or [(one.threshold, one.veto) for one in points] == [(2.0 * (name == "llm"), 0.0)]
    for point in points:
        rows = [naive_generate(other, prompt, NEW, point.threshold)[:2] for prompt in PROMPTS]
        texts = [TOKENIZER.decode(tokens) for tokens, _ in rows]
        correct = ["y" in text for text in texts]
        dials = {"alone": alone} if alone else {"router_threshold": point.threshold}
        passes = [one.passes for one in decode(other, PROMPTS, **dials, max_new_tokens=NEW)]
        spent = [
            cost_of_passes(slm, one["slm"]) + cost_of_passes(llm, one["llm"]) + scoring * len(one["slm"])
            for one in passes
        ]
        tokens = sum(len(row[0]) for row in rows)
        assert point.accuracy == np.mean(correct)
        assert point.accuracy_ci == bootstrap_interval(correct, seed=0)
        assert point.llm_share == sum(sum(row[1]) for row in rows) / tokens
        assert point.llm_calls == sum(len(one["llm"]) for one in passes) / tokens <= point.llm_share
        assert (point.llm_calls > 0) == (name != "slm")
        assert point.bytes == pytest.approx(sum(spent) / tokens)


def test_a_query_level_router_chooses_among_the_texts_of_the_ends(pair: Any, results: Results):
    router = routers()["query"]
    scores = [naive_logits(with_router(pair, router), prompt, 0.0)[1] for prompt in PROMPTS]
    ends = [[naive_generate(pair, prompt, NEW, threshold)[0] for prompt in PROMPTS] for threshold in (0.0, 2.0)]
    assert results.methods["query"]
    for point in results.methods["query"]:
        by_llm = [score < point.threshold - 1e-6 for score in scores]
        texts = [ends[int(chosen)][row] for row, chosen in enumerate(by_llm)]
        llm_tokens = sum(len(text) for text, chosen in zip(texts, by_llm, strict=True) if chosen)
        assert 0 < sum(by_llm) < len(by_llm)
        assert point.accuracy == np.mean(["y" in TOKENIZER.decode(text) for text in texts])
        assert point.llm_share == llm_tokens / sum(map(len, texts))


def test_thresholds_are_swept_at_every_veto_and_two_baselines_have_their_own(pair: Any):
    names = {"own": pair.router, "query": routers()["query"], "bild": ConfidenceRouter(32)}
    results = run(pair, vetoes=(0.0, 0.4), routers=names | {"speculative": ConfidenceRouter(32)})
    vetoes = {"own": 0.0, "own, veto 0.4": 0.4, "query": 0.0, "bild": 0.3, "speculative": 0.0}
    assert results.methods.keys() == vetoes.keys()
    assert all({point.veto for point in results.methods[name]} == {veto} for name, veto in vetoes.items())
    assert results.provenance["routers_sha256"].keys() == vetoes.keys()
    plain, vetoed = results.methods["own"], results.methods["own, veto 0.4"]
    assert {point.threshold for point in plain} == {point.threshold for point in vetoed}
    assert all(one.llm_share < other.llm_share for one, other in zip(plain, vetoed, strict=True))
    # The text is the LLM's own, in fewer passes where the models agree.
    (lossless,), llm = results.methods["speculative"], results.ends["llm"]
    assert (lossless.threshold, lossless.accuracy, lossless.llm_share) == (2.0, llm.accuracy, 1.0)
    assert 0 < lossless.llm_calls <= 1 == llm.llm_calls
    # The pair's own veto is the default.
    vetoing = CiterForCausalLM.from_pair(pair.slm, pair.llm, router="random", llm_veto=0.4)
    own = run(vetoing, routers={"own": pair.router}).methods
    assert [replace(one, seconds=0) for one in own["own, veto 0.4"]] == [replace(one, seconds=0) for one in vetoed]


def test_given_thresholds_are_those_of_the_own_router(pair: Any):
    results = run(pair, thresholds=(0.6, 0.3), routers={"own": pair.router, "entropy": EntropyRouter(32)})
    assert {point.threshold for point in results.methods["own"]} == {0.3, 0.6}
    assert len(results.methods["entropy"]) == 3


def test_an_untrained_router_is_not_listed_as_the_method_of_its_kind(pair: Any, tmp_path: Path):
    assert method_name(make_pair(router="confidence")) == "confidence"
    for kind in ("mlp", "linear"):
        fresh = CiterForCausalLM.from_pair(pair.slm, pair.llm, router=kind)
        fresh.save_pretrained(tmp_path / kind, save_base_models=True)
        loaded = CiterForCausalLM.from_pretrained(tmp_path / kind)
        assert method_name(fresh) == method_name(loaded) == "untrained"
        assert method_name(fresh.train()) == {"mlp": "citer", "linear": "co-llm"}[kind]
    assert list(run(loaded, routers=None, shares=(0.5,)).methods) == ["untrained"]


class Interrupted:
    """A checker that stops the run at one of its calls."""

    def __init__(self, at: int):
        self.calls, self.at = 0, at

    def __call__(self, text: str, example: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return has_letter(text, example)


def test_an_interrupted_run_resumes_and_a_finished_one_is_returned(pair: Any, tmp_path: Path, monkeypatch: Any):
    whole, out = run(pair, checker=Interrupted(-1), out=tmp_path / "whole"), tmp_path / "out"
    thresholds, decode = [], module.decoding.decode

    def watched(*arguments: Any, **options: Any) -> Any:
        if options["max_new_tokens"] == NEW:
            thresholds.append(options["alone"] or options["router_threshold"])
        return decode(*arguments, **options)

    monkeypatch.setattr(module.decoding, "decode", watched)
    for at in (8, 14, 24):
        with pytest.raises(KeyboardInterrupt):
            run(pair, checker=Interrupted(at), out=out)
    assert [path.name for path in out.iterdir()] == [".work"]
    resumed = run(pair, checker=Interrupted(-1), out=out)
    assert comparable(resumed) == comparable(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    # Only the units at which the run was interrupted are decoded again.
    assert len(thresholds) == len({*thresholds}) + 3
    assert run(pair, checker=Interrupted(1), out=out) == resumed == Results.read(out / "results.json")


def test_results_of_other_arguments_stay_as_they_are_and_the_difference_is_named(pair: Any, tmp_path: Path):
    run(pair, checker=Interrupted(-1), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    for change, named in (
        ({"max_new_tokens": NEW + 1}, "max_new_tokens was 8 and is 9"),
        ({"routers": {"random": LinearRouter(32)}}, "routers_sha256 was {"),
        ({"thresholds": (0.5,), "routers": None}, "thresholds was [] and is [0.5]"),
        ({"checker": has_letter}, "checker was "),
        ({"pair": make_pair(hidden_size=48)}, "llm_sha256 was "),
        ({"examples": EXAMPLES[1:]}, "data_sha256 was "),
    ):
        options: dict[str, Any] = {"pair": pair, "checker": Interrupted(-1), "out": tmp_path, **change}
        with pytest.raises(ValueError, match=r"begun with other arguments: .*" + re.escape(named)):
            run(**options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.5, 1.0)}, r"^shares: expected .* got \(0.5, 1.0\)"),
        ({"thresholds": (float("nan"),)}, r"^router_threshold: expected a number from 0 .* got nan"),
        ({"thresholds": (0.5,)}, r"^thresholds: they are those of the pair's own router"),
        ({"vetoes": (0.3, 1.1)}, r"^llm_veto: expected a number from 0 .* got 1.1"),
        ({"examples": []}, r"^examples: expected at least one"),
        ({"examples": examples(answer=None)}, r"^row 11: no answer"),
        ({"examples": examples(answer="a few"), "checker": "math"}, r"^answer: .* math finds no .*'a few' in row 11"),
        ({"examples": examples(answer="A"), "checker": "choice"}, r"^checker choice: row 11 has no choices"),
    ],
)
def test_options_out_of_range_are_errors(pair: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(pair, **options)


def test_a_prompt_is_printed_and_a_warning_where_the_llm_is_hardly_ever_right(pair: Any, capsys: Any):
    for checker, warnings in ((lambda text, example: Verdict(False, None), 1), (lambda *_: Verdict(True, None), 0)):
        run(pair, checker, shares=(0.5,))
        printed = capsys.readouterr().err
        assert f"exactly as the models see it:\n---\n{EXAMPLES[0].prompt}\n---\n" in printed
        assert printed.count("Warning: the LLM alone is right on 0.0% of 6 problems, less than 20%.") == warnings


def test_the_provenance_names_router_base_models_and_data(pair: Any, tmp_path: Path):
    pair = make_pair(router="linear", hidden_size=48)
    pair._commits = {"slm": "a" * 40}
    pair.save_pretrained(tmp_path / "pair", save_base_models=True)
    origin = run(pair, routers=None, shares=(0.5,)).provenance
    assert origin["router_sha256"] == runs.file_sha256(tmp_path / "pair" / "model.safetensors") is not None
    assert origin["routers_sha256"] == {"co-llm": origin["router_sha256"]}
    assert origin["slm"]["commit"] == "a" * 40 and origin["llm"]["commit"] is None
    assert (origin["problems"], origin["processes"], origin["options"]["shares"]) == (len(EXAMPLES), 1, [0.5])
    assert origin["checker"] == "tests.training_data:has_letter" and len(origin["data_sha256"]) == 64
    assert str(Path.home()) not in json.dumps(origin) and str(tmp_path) not in json.dumps(origin)


def test_results_are_written_as_a_table_and_a_plot(pair: Any, tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("matplotlib")
    results = run(pair, out=tmp_path / "all")
    assert (tmp_path / "all" / "results.md").read_text() == results.table() + "\n"
    assert (tmp_path / "all" / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'citer-hf\[plot\]'"):
        run(pair, out=tmp_path / "no plot")
    assert not (tmp_path / "no plot").exists()
