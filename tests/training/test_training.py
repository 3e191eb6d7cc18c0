"""Training routers: objectives by hand, the weights that are kept, rounds, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Trainer, TrainerCallback

from citer_hf import CiterForCausalLM
from citer_hf.evaluation.decoding import with_router
from citer_hf.model.routers import MlpRouter, build_router, marginal
from citer_hf.training import rounds as rounds_module
from citer_hf.training import router_trainer
from citer_hf.training.baselines import train_baselines
from citer_hf.training.labelling import label_preferences
from citer_hf.training.labels import Labels
from citer_hf.training.objectives import OBJECTIVES, QUERY, co_llm_loss, preference_loss
from citer_hf.training.report import calibration_error, report_on
from citer_hf.training.router_trainer import TrainingSettings, router_inputs, split_by_question, train_router
from citer_hf.training.train import train
from tests.training.test_labelling import naive_outcome
from tests.training_data import has_letter, made_up_labels, task, task_pair

QUICK = TrainingSettings(learning_rates=(1e-2,), epochs=6, batch_size=64, patience=2)
LABELS = made_up_labels()


# ---- objectives -----------------------------------------------------------------------------------------------------


def by_hand(name: str, token: int) -> int | None:
    """What an objective wants of a token, written down from the method's description."""
    case, rollout, other = (int(getattr(LABELS, key)[token]) for key in ("case", "rollout", "llm_rollout"))
    if name == "co-llm":
        return int(case == 1)
    if case == 1:
        return 1
    if name == "citer":
        return 0 if case == 2 else rollout
    if name == "citer-s":
        return 0 if case == 2 else int(LABELS.slm_logprob[token] >= LABELS.llm_logprob[token])
    return 1 if rollout == 0 and other == 0 else rollout


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_wants_what_the_method_says(name: str) -> None:
    targets = OBJECTIVES[name].targets(LABELS)
    assert targets.tokens.tolist() == list(range(len(LABELS.case)))
    assert targets.label.tolist() == [by_hand(name, token) for token in range(len(LABELS.case))]


def test_tokens_without_a_rollout_do_not_count() -> None:
    some = replace(LABELS, rollout=torch.where(LABELS.position % 2 == 0, LABELS.rollout, -1))
    for name, unknown in (("citer", some.case == 3), ("citer-plus", some.case != 1)):
        left_out = unknown & (some.rollout < 0)
        assert set(OBJECTIVES[name].targets(some).tokens.tolist()) == set((~left_out).nonzero()[:, 0].tolist())


def test_query_level_routing_decides_at_the_prompts_last_token() -> None:
    targets = QUERY.targets(LABELS)
    assert targets.tokens.tolist() == [20 * question for question in range(24)]
    assert targets.label.tolist() == [float(correct) for correct in LABELS.slm_correct.tolist()]


def test_losses_are_those_of_the_equations() -> None:
    log_odds, label = torch.randn(7), torch.tensor([1.0, 0, 1, 0, 1, 1, 0])
    slm, llm = torch.randn(5, 7, 11).log_softmax(-1)[0], torch.randn(5, 7, 11).log_softmax(-1)[1]
    p_slm = log_odds.sigmoid()
    expected = -(label * p_slm.log() + (1 - label) * (1 - p_slm).log())
    assert torch.allclose(preference_loss(log_odds, label, slm[:, 3], llm[:, 3]), expected, atol=1e-6)
    likelihood = marginal(p_slm[None], slm[None], llm[None])[0, :, 3]
    assert torch.allclose(co_llm_loss(log_odds, label, slm[:, 3], llm[:, 3]), -likelihood, atol=1e-6)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_saved_weights_are_the_best_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_trainer, "LARGEST_LOG_ODDS", 1e9)
    settings = replace(QUICK, learning_rates=(3e-2, 1e-3), epochs=8, patience=8)
    trained = train_router(LABELS, OBJECTIVES[name], tmp_path, settings)
    inputs = router_inputs(LABELS, trained.spec, trained.validation)
    with torch.no_grad():
        log_odds = trained.router.log_odds(inputs)
        part = trained.validation
        loss = OBJECTIVES[name].loss(log_odds, trained.label, LABELS.slm_logprob[part], LABELS.llm_logprob[part])
    losses = [entry["eval_loss"] for entry in trained.history if "eval_loss" in entry]
    assert len(losses) == 8 and trained.loss == min(losses)
    assert float(loss.mean()) == pytest.approx(min(losses), rel=1e-4)
    assert torch.allclose(log_odds, trained.log_odds, atol=1e-4)


def test_a_router_learns_what_there_is_to_learn(tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=20, patience=20)
    trained = train_router(made_up_labels(questions=80), OBJECTIVES["citer-plus"], tmp_path, settings)
    facts = report_on(trained, made_up_labels(questions=80))
    assert facts["auc"] > 0.95 and facts["calibration_error"] < 0.1
    shares = [one["llm_share"] for one in facts["llm_share"]]
    assert shares == sorted(shares) and 0 < shares[0] < 0.05
    caught = torch.sigmoid(trained.log_odds)[trained.label == 0] < facts["router_threshold"]
    assert float(caught.float().mean()) >= 0.95


def test_no_question_is_in_training_and_validation() -> None:
    targets = OBJECTIVES["citer"].targets(LABELS)
    training, validation = split_by_question(LABELS, targets, 0.25, 0)
    questions = [set(LABELS.question[targets.tokens[part]].tolist()) for part in (training, validation)]
    assert not questions[0] & questions[1] and len(questions[1]) == 6
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(len(targets.tokens)))
    assert not torch.equal(validation, split_by_question(LABELS, targets, 0.25, 1)[1])


def test_scores_do_not_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_trainer, "LARGEST_LOG_ODDS", 2.0)
    trained = train_router(LABELS, OBJECTIVES["citer"], tmp_path, replace(QUICK, epochs=20, patience=20))
    with torch.no_grad():
        everywhere = trained.router.log_odds(router_inputs(LABELS, trained.spec, torch.arange(len(LABELS.case))))
    assert float(everywhere.abs().sort().values[int(0.9 * len(everywhere))]) == pytest.approx(2.0, rel=1e-4)


class Interrupt(TrainerCallback):
    """Stops a training in the middle."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= 3:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_to_the_same_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_router(LABELS, OBJECTIVES["citer"], tmp_path / "whole", QUICK)
    made = Trainer.__init__

    def interrupted(self: Any, *args: Any, callbacks: Any = (), **kwargs: Any) -> None:
        made(self, *args, callbacks=[*callbacks, Interrupt()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_router(LABELS, OBJECTIVES["citer"], tmp_path / "out", QUICK)
    resumed = train_router(LABELS, OBJECTIVES["citer"], tmp_path / "out", QUICK)
    for name, weight in whole.router.state_dict().items():
        assert torch.equal(weight, resumed.router.state_dict()[name])


def test_calibration_error_by_hand() -> None:
    scores, label = torch.tensor([0.05, 0.05, 0.95, 0.95]), torch.tensor([0.0, 1, 1, 1])
    assert calibration_error(scores, label) == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)


def test_baselines_have_the_names_of_results() -> None:
    routers = train_baselines(LABELS, QUICK)
    names = {"citer", "citer-plus", "citer-s", "co-llm", "query", "confidence", "entropy", "random"}
    assert set(routers) == names
    scores = {name: router(LABELS.hidden[:9].float(), torch.randn(9, 30)) for name, router in routers.items()}
    assert all(score.shape == (9,) and bool(((score >= 0) & (score <= 1)).all()) for score in scores.values())


def test_a_baseline_with_nothing_to_learn_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    never = replace(LABELS, slm_correct=torch.zeros_like(LABELS.slm_correct))
    assert set(train_baselines(never, QUICK, methods=["query", "co-llm", "random"])) == {"co-llm", "random"}
    assert "query is left out. labels: of the 21 labels" in caplog.text
    with pytest.raises(ValueError, match="methods: there is no 'rnd'; expected some of"):
        train_baselines(LABELS, QUICK, methods=["rnd"])


def test_top_logprobs_are_what_the_first_layer_reads_beside_the_state() -> None:
    router = MlpRouter(6, top_logprobs=4).eval()
    hidden, logits = torch.randn(3, 6), 4 * torch.randn(3, 11)
    largest = logits.log_softmax(-1).sort(descending=True).values[:, :4].clamp_min(-15)
    inputs = torch.cat([hidden, largest], dim=1)
    expected = torch.sigmoid(router.score(router.contract(torch.relu(router.expand(inputs))))).squeeze(-1)
    with torch.no_grad():
        assert torch.allclose(router(hidden, logits), expected, atol=1e-6)
        assert router(hidden, logits[:, :2]).shape == (3,)
    assert torch.allclose(router(hidden, logits), expected, atol=1e-6)


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("train")
    model = task_pair()
    for role in ("slm", "llm"):
        getattr(model, role).save_pretrained(folder / role)
        model.load_tokenizer().save_pretrained(folder / role)
    pair = CiterForCausalLM.from_pair(folder / "slm", folder / "llm", router="confidence")
    pair.generation_config = model.generation_config
    labels = label_preferences(pair, task(12), has_letter, folder / "labels", max_new_tokens=12, batch_tokens=256)
    return pair, labels


def test_training_leaves_a_router_repository(labelled: tuple[Any, Any], tmp_path: Path) -> None:
    pair, labels = labelled
    provenance = train(pair, labels.directory, tmp_path / "out", settings=QUICK, data=task(12))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "provenance.json", "training.png"} <= names and ".work" not in names
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["objective"] == "citer-plus"
    loaded = CiterForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.router == {"type": "mlp", "top_logprobs": 8, "hidden_size": 32}
    assert loaded.config.router_threshold == pytest.approx(provenance["validation"]["router_threshold"])
    assert pair.config.router == {"type": "confidence"}
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.generate(ids, max_new_tokens=4).shape[1] <= 7


def test_a_further_round_rolls_out_its_cases_with_the_new_router(
    labelled: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, labels = labelled
    seen: list[Any] = []
    relabel = rounds_module.relabel

    def spy(*arguments: Any) -> Any:
        seen.append((arguments[4], relabel(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(rounds_module, "relabel", spy)
    train(pair, labels, tmp_path / "out", objective="citer", rounds=2, settings=QUICK, checker=has_letter)
    ((trained, again),) = seen
    scores = trained.router.log_odds(router_inputs(labels, trained.spec, torch.arange(len(labels.case)))).detach()
    threshold = float(torch.sigmoid(scores.sort().values[len(scores) // 3]))
    policy = with_router(pair, trained.router)
    assert torch.equal(again.rollout[labels.case != 3], labels.rollout[labels.case != 3])
    for token in (labels.case == 3).nonzero()[:, 0].tolist():
        expected = naive_outcome(policy, labels, token, int(labels.slm_token[token]), threshold)
        assert int(again.rollout[token]) == expected


def test_labels_of_another_pair_are_refused(labelled: tuple[Any, Any], tmp_path: Path) -> None:
    pair, labels = labelled
    other = task_pair()
    with torch.no_grad():
        other.llm.lm_head.weight.add_(1)
    other._tokenizer = pair.load_tokenizer()
    with pytest.raises(ValueError, match=r"was made with another LLM \('\w+' there, '\w+' here\)\. Train with"):
        train(other, labels, tmp_path / "out")
    template = task_pair()
    template._tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="another chat template"):
        train(template, labels, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "best"}, "objective: expected one of .*'citer-plus'.*got 'best'"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"objective": "co-llm", "rounds": 2}, "'co-llm' makes no roll-outs"),
        ({"rounds": 2}, "there is no 'has_letter'.*pass checker="),
        ({"data": [{"prompt": "a", "response": "b"}]}, "data: it has no example 'q0'.*12 of 12 are missing"),
    ],
)
def test_senseless_options_are_refused(
    labelled: tuple[Any, Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(*labelled, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_labels_that_are_all_equal_are_refused(tmp_path: Path) -> None:
    same = replace(LABELS, case=torch.ones_like(LABELS.case))
    with pytest.raises(ValueError, match="all are 1, so that there is nothing to learn"):
        train_router(same, OBJECTIVES["citer-plus"], tmp_path, QUICK)


def test_a_directory_that_holds_something_is_left_alone(labelled: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        train(*labelled, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_labels_that_are_not_numbers_are_refused(labelled: tuple[Any, Any], tmp_path: Path) -> None:
    shutil.copytree(labelled[1].directory, tmp_path / "labels")
    (file, *_) = sorted((tmp_path / "labels" / "data").glob("*.parquet"))
    table = pq.read_table(file)
    values = [float("nan"), *table["slm_logprob"].to_pylist()[1:]]
    place = table.schema.get_field_index("slm_logprob")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values, pa.float32())), file)
    with pytest.raises(ValueError, match="NaN or infinite values in slm_logprob"):
        Labels.load(tmp_path / "labels")


def test_a_saved_router_is_the_trained_one(labelled: tuple[Any, Any], tmp_path: Path) -> None:
    pair, labels = labelled
    train(pair, labels, tmp_path / "out", objective="co-llm", settings=QUICK)
    trained = train_router(labels, OBJECTIVES["co-llm"], tmp_path / "again", QUICK)
    loaded = CiterForCausalLM.from_pretrained(tmp_path / "out")
    fresh = build_router({"type": "linear"}, 32)
    fresh.load_state_dict(loaded.router.state_dict())
    for name, weight in trained.router.state_dict().items():
        assert torch.equal(weight, fresh.state_dict()[name])
