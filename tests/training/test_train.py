"""Training routers: objectives by hand, the weights that are kept, rounds, resuming, and what is refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow import parquet
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from citer_hf import CiterForCausalLM
from citer_hf.evaluation.decode import with_router
from citer_hf.model.routers import marginal
from citer_hf.runs import file_sha256
from citer_hf.training import train as module
from citer_hf.training.label import label_preferences
from citer_hf.training.labels import Labels
from citer_hf.training.objectives import OBJECTIVES, QUERY, co_llm_loss, preference_loss
from citer_hf.training.train import TrainOptions, train, train_router
from tests.training_data import has_letter, made_up_labels, naive_outcome, task, task_pair

FEW = {"learning_rates": (1e-2,), "epochs": 4}
QUICK = TrainOptions(**FEW)
LABELS = made_up_labels()
EVERYWHERE = range(len(LABELS.case))


def by_hand(name: str, labels: Labels, token: int) -> int:
    """What an objective wants of a token, written down from the method's description."""
    case, rollout, other = (int(getattr(labels, key)[token]) for key in ("case", "rollout", "llm_rollout"))
    if name == "acceptance":
        return int(labels.slm_token[token] == labels.llm_token[token])
    if name == "co-llm":
        return int(case == 1)
    if case == 1:
        return 1
    if name == "citer":
        return 0 if case == 2 else rollout
    if name == "citer-s":
        return 0 if case == 2 else int(labels.slm_logprob[token] >= labels.llm_logprob[token])
    return 1 if rollout == 0 and other == 0 else rollout


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_wants_what_the_method_says(name: str) -> None:
    # At every second token no roll-out was made.
    labels = replace(LABELS, rollout=torch.where(LABELS.position % 2 == 0, LABELS.rollout, -1))
    assert OBJECTIVES[name].targets(labels).tolist() == [by_hand(name, labels, token) for token in EVERYWHERE]
    # Query-level routing decides at each prompt's last token.
    targets = QUERY.targets(LABELS)
    assert (targets >= 0).nonzero()[:, 0].tolist() == [20 * question for question in range(24)]
    assert targets[::20].tolist() == LABELS.slm_correct.tolist()


def test_losses_are_those_of_the_equations() -> None:
    log_odds, label = torch.randn(7), torch.tensor([1.0, 0, 1, 0, 1, 1, 0])
    slm, llm = torch.randn(2, 7, 11).log_softmax(-1)
    p_slm = log_odds.sigmoid()
    expected = -(label * p_slm.log() + (1 - label) * (1 - p_slm).log())
    assert torch.allclose(preference_loss(log_odds, label, slm[:, 3], llm[:, 3]), expected, atol=1e-6)
    likelihood = marginal(p_slm[None], slm[None], llm[None])[0, :, 3]
    assert torch.allclose(co_llm_loss(log_odds, label, slm[:, 3], llm[:, 3]), -likelihood, atol=1e-6)


@pytest.mark.parametrize("name", ["citer-plus", "co-llm"])
def test_the_saved_weights_are_the_best_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_LOG_ODDS", 1e9)
    settings = replace(QUICK, learning_rates=(3e-2, 1e-3), epochs=5)
    objective = OBJECTIVES[name]
    router, found = train_router(LABELS, objective, settings, tmp_path)
    targets, training, part = module.divide(LABELS, objective, settings)
    assert not set(LABELS.question[training].tolist()) & set(LABELS.question[part].tolist())
    log_odds = router.log_odds(module.router_inputs(LABELS, objective)[part])
    loss = objective.loss(log_odds, targets[part].float(), LABELS.slm_logprob[part], LABELS.llm_logprob[part])
    losses = [entry["eval_loss"] for entry in found["history"] if "eval_loss" in entry]
    assert len(losses) == 5 and found["validation"]["loss"] == min(losses)
    assert float(loss.mean()) == pytest.approx(min(losses), rel=1e-4)


def test_a_router_learns_what_there_is_to_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_LOG_ODDS", 4.0)
    labels, settings = made_up_labels(questions=80), replace(QUICK, epochs=15)
    router, found = train_router(labels, OBJECTIVES["citer-plus"], settings, tmp_path)
    facts = found["validation"]
    assert facts["auc"] > 0.95
    targets, _, validation = module.divide(labels, OBJECTIVES["citer-plus"], settings)
    log_odds = router.log_odds(module.router_inputs(labels, OBJECTIVES["citer-plus"]))
    needed = validation[targets[validation] == 0]
    assert float((torch.sigmoid(log_odds[needed]) < facts["router_threshold"]).float().mean()) >= 0.95
    # Scores do not saturate.
    assert float(log_odds.abs().sort().values[int(0.9 * len(log_odds))]) == pytest.approx(4.0, rel=1e-4)
    text = module.summary(found, tmp_path)
    assert "held-out questions, its AUC is 0.9" in text and f"The router is in {tmp_path};" in text


def test_provenance_tells_how_trainings_ended_and_how_sure_the_auc_is(tmp_path: Path) -> None:
    settings = replace(QUICK, learning_rates=(0.3, 1e-2), epochs=12, patience=1)
    labels = replace(LABELS, rollout=torch.where(LABELS.position % 4 == 0, -1, LABELS.rollout))
    _, found = train_router(labels, OBJECTIVES["citer-plus"], settings, tmp_path / "work" / "round")
    facts, tokens = found["validation"], found["tokens"]
    assert [one["learning_rate"] for one in found["trainings"]] == [0.3, 1e-2]
    wild = found["trainings"][0]
    assert wild["stopped_early"] and wild["epochs"] == wild["best_epoch"] + 1 < 12
    assert facts["loss"] == min(one["loss"] for one in found["trainings"])
    assert facts["auc_ci"][0] <= facts["auc"] <= facts["auc_ci"][1] and facts["auc_ci"][0] < facts["auc_ci"][1]
    dropped = int(((labels.case != 1) & (labels.rollout < 0)).sum())
    assert (
        tokens["dropped"] == dropped > 0 and sum(tokens[part] for part in ("training", "validation")) + dropped == 480
    )


@pytest.mark.parametrize("name", module.LOGGERS)
def test_training_logs_go_where_they_are_asked_for(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "get_available_reporting_integrations", list)
    with pytest.raises(ImportError, match=f"report_to: {name} is not installed: pip install {name}"):
        replace(QUICK, report_to=name)
    with pytest.raises(ValueError, match=r"report_to: expected some of trackio.*got 'paper'"):
        replace(QUICK, report_to="paper")
    seen: list[Any] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            seen.append((args.run_name, getattr(self, "logging_dir", None), logs))

    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: [name])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Recorder)
    monkeypatch.setattr(module, "TensorBoardCallback", Recorder)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: seen.append("finished")))
    work = tmp_path / "out" / ".work" / "round 1"
    train_router(LABELS, OBJECTIVES["citer"], replace(QUICK, report_to=name, epochs=1), work)
    run = "out, round 1, learning rate 0.01"
    assert any(one[0] == run and "eval_loss" in one[2] for one in seen if one != "finished")
    assert (seen[-1] == "finished") == (name == "wandb")
    assert name != "tensorboard" or seen[0][1] == str(tmp_path / "out" / "runs" / run)


@pytest.mark.parametrize(
    ("objective", "column", "needs"),
    [
        ("acceptance", "llm_token", "the LLM's verdicts"),
        ("co-llm", "llm_logprob", "the LLM's verdicts"),
        ("citer-plus", "llm_rollout", "the LLM's verdicts"),
        ("citer", "rollout", "roll-outs"),
    ],
)
def test_labels_without_the_verdicts_of_an_objective_are_refused(labelled, tmp_path, objective, column, needs) -> None:
    shutil.copytree(labelled[1].directory, tmp_path / "labels")
    file = tmp_path / "labels" / "data" / "train.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns([column]), file)
    with pytest.raises(ValueError, match=rf"objective '{objective}' needs {needs} \(column '{column}'\)"):
        train(labelled[0], tmp_path / "labels", tmp_path / "out", objective=objective, **FEW)
    parquet.write_table(parquet.read_table(file).drop_columns(["hidden"]), file)
    with pytest.raises(ValueError, match="has no column hidden"):
        Labels.load(tmp_path / "labels")
    assert not (tmp_path / "out").exists()


def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Stop a training in the middle."""
    if state.epoch >= 2:
        raise KeyboardInterrupt


def test_an_interrupted_training_is_resumed_to_the_same_router(tmp_path: Path, monkeypatch: Any) -> None:
    whole, _ = train_router(LABELS, OBJECTIVES["citer"], QUICK, tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.EarlyStoppingCallback, "on_epoch_begin", interrupt)
        train_router(LABELS, OBJECTIVES["citer"], QUICK, tmp_path / "out")
    resumed, _ = train_router(LABELS, OBJECTIVES["citer"], QUICK, tmp_path / "out")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


def test_baselines_are_every_method_that_has_something_to_learn(monkeypatch: Any, caplog: Any) -> None:
    pair, labels = task_pair(), LABELS
    monkeypatch.setattr(Labels, "load", classmethod(lambda cls, directory: labels))
    monkeypatch.setattr(Labels, "check_pair", lambda self, model: None)
    monkeypatch.setattr(module, "TrainOptions", lambda seed: replace(QUICK, epochs=1, seed=seed))
    routers = module.baseline_routers(pair, "labels")
    assert set(routers) == {*OBJECTIVES, "query", *module.UNTRAINED}
    scores = [router(LABELS.hidden[:9].float(), torch.randn(9, 30)) for router in routers.values()]
    assert all(score.shape == (9,) and bool(((score >= 0) & (score <= 1)).all()) for score in scores)
    labels = replace(LABELS, slm_correct=torch.zeros_like(LABELS.slm_correct))
    assert set(module.baseline_routers(pair, "labels", ["query", "co-llm", "random"])) == {"co-llm", "random"}
    assert "query is left out. labels: of the 21 labels" in caplog.text
    with pytest.raises(ValueError, match=r"methods: expected some of .* got rnd"):
        module.baseline_routers(pair, "labels", ["rnd"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("train")
    model = task_pair()
    for role in ("slm", "llm"):
        getattr(model, role).save_pretrained(folder / role)
        model.load_tokenizer().save_pretrained(folder / role)
    pair = CiterForCausalLM.from_pair(folder / "slm", folder / "llm", router="confidence")
    pair.generation_config = model.generation_config
    labels = label_preferences(pair, task(12), has_letter, folder / "labels", max_new_tokens=8, batch_tokens=256)
    return pair, labels


@pytest.mark.parametrize("objective", ["citer-plus", "co-llm"])
def test_training_leaves_a_router_repository(labelled: tuple[Any, Any], tmp_path: Path, objective: str) -> None:
    pair, labels = labelled
    before = dict(pair.config.router)
    # As a pair whose router nobody has trained has it.
    pair.config.router = {**before, "untrained": True}
    provenance = train(pair, labels.directory, tmp_path / "out", objective=objective, **FEW)
    assert pair.config.router == {**before, "untrained": True}
    pair.config.router = before
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "provenance.json"} <= names and ".work" not in names
    assert json.loads((tmp_path / "out" / "provenance.json").read_text()) == json.loads(json.dumps(provenance))
    assert provenance["objective"] == objective and provenance["options"]["epochs"] == 4
    assert provenance["router_sha256"] == file_sha256(tmp_path / "out" / "model.safetensors")
    loaded = CiterForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.router == {**OBJECTIVES[objective].router, "hidden_size": 32}
    assert loaded.config.router_threshold == pytest.approx(provenance["validation"]["router_threshold"])
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape[1] <= 7
    trained, _ = train_router(labels, OBJECTIVES[objective], QUICK, tmp_path / "again")
    method, router = module.router_of(tmp_path / "out", pair)
    assert method == objective
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, router.state_dict()[name]) and torch.equal(weight, loaded.router.state_dict()[name])
    with pytest.raises(FileNotFoundError, match="--compare: expected a directory that `citer train` has made"):
        module.router_of(labels.directory, pair)


def test_a_further_round_rolls_out_its_cases_with_the_new_router(labelled: Any, tmp_path: Path, monkeypatch: Any):
    pair, labels = labelled
    seen: list[Any] = []
    relabel = module.relabel

    def spy(*arguments: Any) -> Any:
        seen.append((arguments[2], relabel(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(module, "relabel", spy)
    train(pair, labels, tmp_path / "out", objective="citer", rounds=2, checker=has_letter, **FEW)
    ((router, again),) = seen
    scores = router.log_odds(module.router_inputs(labels, OBJECTIVES["citer"])).detach()
    threshold = float(torch.sigmoid(scores.sort().values[len(scores) // 3]))
    policy = with_router(pair, router)
    assert torch.equal(again.rollout[labels.case != 3], labels.rollout[labels.case != 3])
    for token in (labels.case == 3).nonzero()[::2, 0].tolist():
        expected = naive_outcome(policy, labels, token, int(labels.slm_token[token]), threshold, 8)
        assert int(again.rollout[token]) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "best"}, "objective: expected one of .*'citer-plus'.*got 'best'"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"objective": "co-llm", "rounds": 2}, "'co-llm' makes no roll-outs"),
        ({"rounds": 2}, "checker: there is no 'has_letter'"),
    ],
)
def test_senseless_options_and_equal_labels_are_refused(labelled: Any, tmp_path: Path, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        train(*labelled, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"enough questions to hold out 12\.5% of them, got 3"):
        train(labelled[0], replace(labelled[1], questions=labelled[1].questions[:3]), tmp_path / "out")
    same = replace(labelled[1], case=torch.ones_like(labelled[1].case))
    with pytest.raises(module.NothingToLearn, match=r"all are \[1\]: there is nothing to learn"):
        train(labelled[0], same, tmp_path / "out")
    assert not (tmp_path / "out").exists()
