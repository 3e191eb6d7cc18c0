"""Costs of outputs pass by pass; intervals, areas, costs of an accuracy and comparisons, by hand on small curves."""

from dataclasses import asdict
from pathlib import Path

import pytest
from torch import nn

from citer_hf.costs import cost_of_model
from citer_hf.evaluation import results as module
from citer_hf.evaluation.plot import draw
from citer_hf.evaluation.results import Point, Results, bootstrap_interval, cost_at, make_results, summarize
from citer_hf.model.routers import EntropyRouter, LinearRouter, MlpRouter
from citer_hf.runs import write_json
from tests.conftest import make_pair

REPOSITORY = Path(__file__).parents[2]


def point(share: float, accuracy: float, moved: float | None = None, veto: float = 0.0) -> Point:
    moved = 100 + 900 * share if moved is None else moved
    return Point(0.5, accuracy, (accuracy - 0.1, accuracy + 0.1), share, share / 2, moved, 0.01, veto)


ENDS = {"slm": point(0, 0.2), "llm": point(1, 1.0)}
CURVE = [point(0.1, 0.6), point(0.4, 0.9)]


def test_the_summary_is_that_of_straight_lines_between_the_points():
    summary = summarize(ENDS, CURVE)
    # In units of the gap between the ends: 0, 0.5, 0.875, 1 at 0, 0.1, 0.4, 1.
    area = 0.1 * 0.25 + 0.3 * 0.6875 + 0.6 * 0.9375
    assert summary["auc"] == pytest.approx(area)
    assert summary["share_at_95"] == pytest.approx(0.7)
    assert summary["share_at_98"] == pytest.approx(0.88)
    assert summary["calls_at_98"] == pytest.approx(0.44)
    assert summary["bytes_at_95"] == pytest.approx(100 + 900 * 0.7)
    assert module.accuracy_at(ENDS, CURVE, 0.25) == pytest.approx(0.75)
    assert summary["accuracy_at"] == pytest.approx({"0.05": 0.4, "0.1": 0.6, "0.2": 0.7, "0.3": 0.8})


def test_an_accuracy_is_reached_where_the_curve_first_comes_to_it_at_less_than_the_llm_costs():
    bumpy = [point(0.2, 0.95), point(0.3, 0.7), point(0.5, 0.96)]
    assert (cost_at(ENDS, bumpy, 0.95), cost_at(ENDS, bumpy, 0.1)) == (pytest.approx(0.2), 0)
    dear = [*CURVE, point(0.9, 0.99, moved=1100)]
    assert cost_at(ENDS, dear, 0.98, "bytes") == cost_at(ENDS, CURVE, 0.98, "bytes")


def test_figures_on_a_line_to_a_model_alone_are_marked():
    figures = summarize(ENDS, CURVE)["rests_on_end"]
    assert figures == ["0.05", *(f"{cost}_at_{level}" for cost in ("share", "calls", "bytes") for level in (95, 98))]
    measured = [point(0.05, 0.5), point(0.6, 0.99)]
    assert summarize(ENDS, measured)["rests_on_end"] == []
    # Nothing of a method that has no point below the LLM alone is measured.
    assert len(summarize(ENDS, [])["rests_on_end"]) == 10
    table = make_results(ENDS, {"mine": CURVE, "other": measured}, {}).table()
    assert " 70.0%* / 88.0%* " in table and " 40.0%* " in table and " 70.0% " in table
    assert "A figure with * was not measured" in table.splitlines()[-1]
    assert "*" not in make_results(ENDS, {"other": measured}, {}).table().replace("**", "")


def test_what_cannot_be_said_is_left_open():
    alike = {"slm": point(0, 0.5), "llm": point(1, 0.5)}
    assert summarize(alike, [point(0.5, 0.5)])["auc"] is None
    assert cost_at({"slm": point(0, 0.5), "llm": point(1, 0.9)}, [], 1.2) is None
    table = make_results(alike, {"mine": [point(0.5, 0.5)]}, {}).table().splitlines()
    assert table[-3].split(" | ")[:2] == ["| mine  ", "   –"]
    assert len({len(line) for line in table if line.startswith("|")}) == 2


def test_results_come_back_as_they_were_written_also_by_earlier_versions(tmp_path: Path):
    vetoed = [point(0.2, 0.9, veto=0.3)]
    results = make_results(ENDS, {"citer": CURVE[::-1], "citer, veto 0.3": vetoed}, {"problems": 9})
    assert results.methods["citer"] == CURVE
    write_json(tmp_path / "results.json", asdict(results))
    assert Results.read(tmp_path / "results.json") == results
    assert "| citer, veto 0.3 |" in results.table()
    (tmp_path / "other.json").write_text('{"ends": 3}')
    with pytest.raises(ValueError, match=r"other\.json: expected the results of `citer evaluate`"):
        Results.read(tmp_path / "other.json")
    pytest.importorskip("matplotlib")
    earlier = Results.read(REPOSITORY / "docs" / "results" / "results.json")
    assert len(earlier.provenance["runs"]) == 3
    assert earlier.table() + "\n" == (REPOSITORY / "docs" / "results" / "results.md").read_text()
    draw(earlier, tmp_path / "curve.svg")
    assert "the pair that ships, 1000 problems" in (tmp_path / "curve.svg").read_text()


def test_the_interval_of_a_share_weighs_texts_by_their_tokens():
    low, high = bootstrap_interval([10.0, 0.0] * 30, [10.0, 90.0] * 30, seed=0)
    assert low < 0.1 < high < 0.2
    assert bootstrap_interval([1.0] * 20, seed=0) == bootstrap_interval([1.0] * 20, seed=0) == (1.0, 1.0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_cost_of_an_output_is_that_of_its_passes(family: str):
    cost = cost_of_model(make_pair(llm=family, num_hidden_layers=3).llm)

    # The prompt, four tokens, and three of these again behind a draft that was replaced.
    passes = [(0, 9), (9, 13), (10, 13)]
    wanted = cost.bytes_moved(1, 9, 0) + cost.bytes_moved(1, 4, 9) + cost.bytes_moved(1, 3, 10)
    assert module.cost_of_passes(cost, passes) == pytest.approx(wanted)
    # What was copied from another sequence counts, as if the output were decoded alone.
    assert module.cost_of_passes(cost, [(7, 9), *passes[1:]]) == pytest.approx(wanted)
    assert module.cost_of_passes(cost, []) == 0


def test_the_weights_of_a_router_count_and_its_tables_do_not():
    assert module.scoring_cost(EntropyRouter(32)) == 0
    assert module.scoring_cost(LinearRouter(32)) == 33 * 4
    weights = 64 * 33 + 32 * 65 + 33
    assert module.scoring_cost(MlpRouter(32)) == weights * 4
    assert module.scoring_cost(nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 1))) == 33 * 4
