"""`label_preferences`: every column computed again naively, interrupted runs, and what is refused."""

from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from citer_hf.evaluation.results import bootstrap_interval
from citer_hf.training.label import Policy, label_preferences
from citer_hf.training.labels import Labels
from tests.families import EOS
from tests.reference import naive_generate
from tests.repositories import contents
from tests.training_data import THRESHOLD, has_letter, naive_outcome, task, task_pair

NEW = 8
TOO_LONG = {"id": "long", "prompt": "a", "response": "a" * 300, "answer": "b"}
PAIRS = [("llama", "llama"), ("gpt2", "bloom"), ("mistral_sliding", "llama"), ("qwen2", "gemma2")]


def label(model: Any, out: Path, examples: Any = None, checker: Any = has_letter, **options: Any) -> Labels:
    options = {"max_new_tokens": NEW, "batch_tokens": 96, **options}
    return label_preferences(model, task(4) if examples is None else examples, checker, out, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pairs and their labels, each made once."""
    folder = tmp_path_factory.mktemp("labels")
    return cache(lambda *pair: (model := task_pair(*pair), label(model, folder / "-".join(pair))))


@pytest.fixture(params=PAIRS, ids="-".join)
def labelled(request: pytest.FixtureRequest, made: Any) -> tuple[Any, Labels]:
    return made(*request.param)


@pytest.fixture
def llamas(made: Any) -> tuple[Any, Labels]:
    return made(*PAIRS[0])


@torch.no_grad()
def naive_token(model: Any, labels: Labels, token: int) -> dict[str, Any]:
    """One token, from the bare models, without batch, padding or cache."""
    question, place = labels.questions[int(labels.question[token])], int(labels.position[token])
    ids, reference = torch.tensor([question.prompt_ids + question.response_ids[:place]]), question.response_ids[place]
    slm, llm = (part(ids, use_cache=False).logits[0, -1, : model.vocab_size] for part in (model.slm, model.llm))
    return {
        "hidden": model.slm.base_model(ids, use_cache=False).last_hidden_state[0, -1],
        "top_logprobs": slm.log_softmax(-1).sort(descending=True).values[:8].clamp_min(-15),
        "reference_token": torch.tensor(reference),
        "slm_token": slm.argmax(),
        "llm_token": llm.argmax(),
        "slm_logprob": slm.log_softmax(-1)[reference],
        "llm_logprob": llm.log_softmax(-1)[reference],
    }


def test_every_token_is_read_as_by_the_bare_models(labelled: tuple[Any, Labels]) -> None:
    model, labels = labelled
    assert len(labels.case) == sum(len(one["response"]) + 1 for one in task(4))
    for token in range(len(labels.case)):
        naive = naive_token(model, labels, token)
        for name, value in naive.items():
            tolerance = 1e-2 if name == "top_logprobs" else 2e-3 if name == "hidden" else 1e-4
            found = getattr(labels, name)[token].to(value.dtype)
            assert torch.allclose(found, value, atol=tolerance, rtol=tolerance), name
        slm_right, llm_right = (naive[f"{by}_token"] == naive["reference_token"] for by in ("slm", "llm"))
        assert int(labels.case[token]) == (1 if slm_right else 2 if llm_right else 3)


def test_outcomes_are_what_the_pair_writes_from_the_exact_state(labelled: tuple[Any, Labels]) -> None:
    model, labels = labelled
    for token in range(len(labels.case)):
        case, rollout = int(labels.case[token]), int(labels.rollout[token])
        if case == 1:
            assert (rollout, int(labels.label[token])) == (-1, 1)
            continue
        assert rollout == naive_outcome(model, labels, token, int(labels.slm_token[token]), THRESHOLD, NEW)
        assert int(labels.label[token]) == (0 if case == 2 else rollout)
        instead = -1 if rollout else naive_outcome(model, labels, token, int(labels.llm_token[token]), THRESHOLD, NEW)
        assert int(labels.llm_rollout[token]) == instead
    for threshold, found in ((0.0, labels.slm_correct), (2.0, labels.llm_correct)):
        for question, correct in zip(labels.questions, found.tolist(), strict=True):
            text = naive_generate(model, question.prompt_ids, NEW, threshold)[0]
            response = model.load_tokenizer().decode(text, skip_special_tokens=True)
            assert correct == has_letter(response, question.example).correct


def test_the_directory_is_a_dataset_with_a_card(llamas: tuple[Any, Labels], tmp_path: Path) -> None:
    model, labels = llamas
    where = {"path": str(labels.directory), "split": "train", "cache_dir": str(tmp_path)}
    tokens, questions = (datasets.load_dataset(name=name, **where) for name in ("tokens", "questions"))
    assert tokens["position"] == labels.position.tolist() and len(questions) == len(labels.questions)
    assert tokens.features["hidden"].feature.dtype == "float16"
    assert {int(labels.reference_token[labels.question == index][-1]) for index in range(4)} == {EOS}
    counts = labels.info["counts"]
    for case in (1, 2, 3):
        assert counts["cases"][str(case)] == int((labels.case == case).sum())
    assert counts["rollouts"] == int((labels.rollout >= 0).sum())
    right = float((labels.rollout == 1).sum() / (labels.rollout >= 0).sum())
    assert 0 < right < 1 and counts["positive_rollouts"] == pytest.approx(right)
    card = (labels.directory / "README.md").read_text()
    assert f"{counts['tokens']} tokens" in card and f"- {right:.1%} of {counts['rollouts']} roll-outs" in card
    assert '"router_threshold": 0.5' in card and '"seed": 0' in card and '"torch": "2' in card
    assert labels.info["llm"]["parameters"] == model.llm.num_parameters()
    assert not (labels.directory / ".work").exists()


def test_what_is_left_out_and_intervals_are_in_the_provenance_and_on_the_card(llamas, tmp_path, caplog) -> None:
    model, everything = llamas
    labels = label(model, tmp_path / "out", [TOO_LONG, *task(4)], rollouts=7)
    assert [one.example.id for one in labels.questions] == [one.example.id for one in everything.questions]
    (dropped,), counts = labels.info["dropped"], labels.info["counts"]
    assert (dropped["id"], dropped["row"]) == ("long", 1) and "307 tokens exceed the context" in dropped["reason"]
    assert counts["tokens_without_rollout"] == int((labels.case != 1).sum()) - 7 and counts["dropped_examples"] == 1
    expected = bootstrap_interval(labels.llm_correct.tolist(), seed=0)
    assert counts["llm_accuracy_ci"] == list(expected)
    assert f"- `long`: {dropped['reason']}" in (labels.directory / "README.md").read_text()
    assert dropped["reason"] in caplog.text


def test_a_budget_is_spent_where_the_router_is_least_sure(llamas: tuple[Any, Labels], tmp_path: Path) -> None:
    model, everything = llamas
    some = label(model, tmp_path / "some", rollouts=7)
    scores = []
    for token in range(len(everything.case)):
        question, place = everything.questions[int(everything.question[token])], int(everything.position[token])
        ids = torch.tensor([question.prompt_ids + question.response_ids[:place]])
        scores.append(float(model(ids, logits_to_keep=1).router_scores))
    unsure = torch.logit(torch.tensor(scores)).abs()
    mismatches = (everything.case != 1).nonzero()[:, 0]
    expected = mismatches[unsure[mismatches].argsort()[:7]].sort().values
    assert (some.rollout >= 0).nonzero()[:, 0].tolist() == expected.tolist()
    assert bool((some.label[(some.case == 3) & (some.rollout < 0)] == -1).all())


def test_an_interrupted_run_is_resumed_without_repeating_work(llamas: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[int] = []
    roll_out = Policy.roll_out

    def counted(policy: Policy, batch: Any) -> Any:
        calls.append(len(batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return roll_out(policy, batch)

    monkeypatch.setattr(Policy, "roll_out", counted)
    with pytest.raises(KeyboardInterrupt):
        label(llamas[0], tmp_path / "out")
    begun = contents(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no labels.*run the same `citer label` again"):
        Labels.load(tmp_path / "out")
    with pytest.raises(ValueError, match=r"router_threshold was 0.5 and is 0.9.*Give the same arguments"):
        label(llamas[0], tmp_path / "out", router_threshold=0.9)
    assert contents(tmp_path / "out") == begun
    labels = label(llamas[0], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(llamas[1].directory)
    # Every batch was made once, the one that was interrupted once more; each model answers every question.
    made = sum(calls) - calls[3]
    assert made == int((labels.rollout >= 0).sum()) + int((labels.llm_rollout >= 0).sum()) + 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": -1}, "rollouts: expected at least 0, got -1"),
        ({"router_threshold": 70}, "router_threshold: expected a number from 0 .* to 2"),
        ({"examples": [{"prompt": "a", "response": "b", "answer": ""}]}, "row 1.*answer"),
        ({"examples": [TOO_LONG]}, "row 1.*307"),
        ({"examples": [{**task(1)[0], "answer": "a few"}], "checker": "math"}, "math finds no answer .* in row 1"),
    ],
)
def test_what_cannot_be_used_is_refused(llamas: Any, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label(llamas[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_pairs_that_cannot_label_are_refused(tmp_path: Path) -> None:
    model = task_pair()
    with torch.no_grad():
        model.slm.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN, or hidden states .* at the example 'q\d'"):
        label(model, tmp_path / "out")
    model._tokenizer = None
    with pytest.raises(ValueError, match="expected a pair with a tokenizer"):
        label(model, tmp_path / "out")


def test_labels_are_of_one_pair_wherever_its_models_are(llamas: tuple[Any, Labels]) -> None:
    pair, labels = llamas
    other, template = task_pair(), task_pair()
    template._tokenizer.chat_template = "{{ messages }}"
    other.llm.name_or_path = "moved"
    labels.check_pair(pair)
    labels.check_pair(other)
    with pytest.raises(ValueError, match="not made with this pair's tokenizer and chat template"):
        labels.check_pair(template)
    with torch.no_grad():
        other.llm.lm_head.weight.add_(1)
    where = rf"those in {labels.directory} were not made with this pair's llm. Give"
    with pytest.raises(ValueError, match=where):
        labels.check_pair(other)
