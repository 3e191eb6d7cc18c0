"""`label_preferences`: every column computed again naively, interrupted runs, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from citer_hf.training.labelling import label_preferences

from citer_hf.training import labelling, outcomes, rollouts
from citer_hf.training.labels import Labels
from citer_hf.training.rollouts import RollOut, cut_into_batches, roll_out
from tests import launching
from tests.chat_pairs import save_demo_pair
from tests.families import EOS
from tests.reference import naive_generate
from tests.training_data import THRESHOLD, has_letter, task, task_pair

NEW = 12
# Both ways to start a roll-out: from copied caches, and from the whole text (sliding windows).
PAIRS = [("llama", "llama"), ("gpt2", "bloom"), ("mistral_sliding", "llama"), ("qwen2", "gemma2")]


def label(model: Any, out: Path, examples: Any = None, **options: Any) -> Labels:
    options = {"max_new_tokens": NEW, "batch_tokens": 96, **options}
    return label_preferences(
        model, task() if examples is None else examples, options.pop("checker", has_letter), out, **options
    )


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def labelled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Labels]:
    model = task_pair(*request.param)
    return model, label(model, tmp_path_factory.mktemp("labels") / "out")


@torch.no_grad()
def naive_token(model: Any, labels: Labels, token: int) -> dict[str, Any]:
    """One token, from the bare models, without batch, padding or cache."""
    question = labels.questions[int(labels.question[token])]
    place = int(labels.position[token])
    ids = torch.tensor([question.prompt_ids + question.response_ids[:place]])
    reference = question.response_ids[place]
    slm, llm = (part(ids, use_cache=False).logits[0, -1, : model.vocab_size] for part in (model.slm, model.llm))
    return {
        "hidden": model.slm.base_model(ids, use_cache=False).last_hidden_state[0, -1],
        "reference_token": reference,
        "slm_token": int(slm.argmax()),
        "llm_token": int(llm.argmax()),
        "slm_logprob": float(slm.log_softmax(-1)[reference]),
        "llm_logprob": float(llm.log_softmax(-1)[reference]),
        "top_logprobs": slm.log_softmax(-1).sort(descending=True).values[:8],
    }


def naive_outcome(model: Any, labels: Labels, token: int, action: int, threshold: float) -> bool:
    """Whether the answer is right when an action is taken and the pair goes on, one token after the other."""
    question = labels.questions[int(labels.question[token])]
    response = [*question.response_ids[: int(labels.position[token])], action]
    if action != EOS and len(response) < NEW:
        response += naive_generate(model, question.prompt_ids + response, NEW - len(response), threshold)[0]
    return has_letter(model.load_tokenizer().decode(response, skip_special_tokens=True), question.example).correct


def test_every_token_is_read_as_by_the_bare_models(labelled: tuple[Any, Labels]) -> None:
    model, labels = labelled
    assert len(labels.case) == sum(len(one["response"]) + 1 for one in task())
    for token in range(len(labels.case)):
        naive = naive_token(model, labels, token)
        assert torch.allclose(labels.hidden[token].float(), naive["hidden"], atol=2e-3, rtol=2e-3)
        assert torch.allclose(labels.top_logprobs[token].float(), naive["top_logprobs"].clamp_min(-15), atol=1e-2)
        for name in ("reference_token", "slm_token", "llm_token"):
            assert int(getattr(labels, name)[token]) == naive[name]
        for name in ("slm_logprob", "llm_logprob"):
            assert float(getattr(labels, name)[token]) == pytest.approx(naive[name], abs=1e-4)
        slm_right, llm_right = (naive[f"{by}_token"] == naive["reference_token"] for by in ("slm", "llm"))
        assert int(labels.case[token]) == (1 if slm_right else 2 if llm_right else 3)


def test_rollouts_are_what_the_pair_writes_from_the_exact_state(labelled: tuple[Any, Labels]) -> None:
    model, labels = labelled
    for token in range(len(labels.case)):
        case, rollout = int(labels.case[token]), int(labels.rollout[token])
        if case == 1:
            assert (rollout, int(labels.label[token])) == (-1, 1)
            continue
        assert rollout == naive_outcome(model, labels, token, int(labels.slm_token[token]), THRESHOLD)
        assert int(labels.label[token]) == (0 if case == 2 else rollout)
        if rollout == 0:
            expected = naive_outcome(model, labels, token, int(labels.llm_token[token]), THRESHOLD)
            assert int(labels.llm_rollout[token]) == expected
        else:
            assert int(labels.llm_rollout[token]) == -1
    assert {0, 1} <= set(labels.rollout.tolist())


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_policy_may_be_one_model_alone(tmp_path: Path, threshold: float) -> None:
    model = task_pair()
    labels = label(model, tmp_path / "out", router_threshold=threshold)
    for token in (labels.case != 1).nonzero()[:, 0].tolist():
        expected = naive_outcome(model, labels, token, int(labels.slm_token[token]), threshold)
        assert int(labels.rollout[token]) == expected


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_copied_caches_and_whole_texts_give_the_same_rollouts(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = task_pair(*pair)
    questions = label(model, tmp_path / "out", limit=4).questions
    wanted = [RollOut(index, place, 10 + place) for index in range(4) for place in range(5)]
    wanted += [RollOut(index, place, -1) for index in range(4) for place in (0, 3)]
    (batch,) = cut_into_batches(wanted, questions, NEW, 1 << 20)
    shared = roll_out(model, questions, batch, THRESHOLD, NEW)
    monkeypatch.setattr(rollouts, "shared_prefixes", lambda *arguments: None)
    assert roll_out(model, questions, batch, THRESHOLD, NEW) == shared
    assert max(map(len, shared)) <= NEW


def test_rows_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = task_pair()
    questions = label(model, tmp_path / "out", limit=4).questions
    batch = [RollOut(index, place, 10) for index in range(4) for place in range(5)]
    whole = roll_out(model, questions, batch, THRESHOLD, 30)
    monkeypatch.setattr(rollouts, "STRETCH", 3)
    assert roll_out(model, questions, batch, THRESHOLD, 30) == whole
    assert len({len(text) for text in whole}) > 1


def test_the_reference_ends_with_the_end_of_the_text(labelled: tuple[Any, Labels]) -> None:
    labels = labelled[1]
    last = [int(labels.reference_token[labels.question == index][-1]) for index in range(len(labels.questions))]
    assert set(last) == {EOS}


def test_each_model_alone_answers_every_question(labelled: tuple[Any, Labels]) -> None:
    model, labels = labelled
    for threshold, found in ((0.0, labels.slm_correct), (2.0, labels.llm_correct)):
        for question, correct in zip(labels.questions, found.tolist(), strict=True):
            text = naive_generate(model, question.prompt_ids, NEW, threshold)[0]
            response = model.load_tokenizer().decode(text, skip_special_tokens=True)
            assert correct == has_letter(response, question.example).correct


def test_datasets_loads_the_directory(labelled: tuple[Any, Labels]) -> None:
    labels = labelled[1]
    tokens = datasets.load_dataset(str(labels.directory), split="train")
    questions = datasets.load_dataset(str(labels.directory), "questions", split="train")
    assert tokens["position"] == labels.position.tolist() and len(questions) == len(labels.questions)
    assert tokens.features["hidden"].feature.dtype == "float16"


def test_the_card_counts_what_was_labelled(labelled: tuple[Any, Labels]) -> None:
    labels = labelled[1]
    counts = labels.info["counts"]
    for case in (1, 2, 3):
        assert counts["cases"][str(case)] == int((labels.case == case).sum())
        assert counts["rollouts"][str(case)] == int(((labels.case == case) & (labels.rollout >= 0)).sum())
    assert counts["positive_rollouts"] == pytest.approx(
        float((labels.rollout == 1).sum() / (labels.rollout >= 0).sum())
    )
    card = (labels.directory / "README.md").read_text()
    assert f"{counts['tokens']} tokens" in card and f"{counts['unextracted']:.1%} of the roll-outs" in card
    assert '"rollout_threshold": 0.5' in card and '"seed": 0' in card and '"torch": "2' in card
    assert not (labels.directory / ".work").exists()


def test_a_budget_is_spent_where_the_router_is_least_sure(tmp_path: Path) -> None:
    model = task_pair()
    everything, some = label(model, tmp_path / "all"), label(model, tmp_path / "some", rollouts=7)
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


# ---- interruptions --------------------------------------------------------------------------------------------------


def content(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def test_an_interrupted_run_goes_on_without_repeating_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = task_pair()
    label(model, tmp_path / "whole")
    calls: list[int] = []
    honest = outcomes.roll_out

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(outcomes, "roll_out", counted)
    with pytest.raises(KeyboardInterrupt):
        label(model, tmp_path / "out")
    label(model, tmp_path / "out")
    interrupted = calls.pop(3)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # Every batch was made once, and the one that was interrupted once more.
    made = sum(calls)
    monkeypatch.setattr(outcomes, "roll_out", honest)
    info = json.loads((tmp_path / "out" / "labels.json").read_text())["counts"]
    labels = Labels.load(tmp_path / "out")
    assert made == sum(info["rollouts"].values()) + int((labels.llm_rollout >= 0).sum()) and interrupted > 0


def command(pair: Path, data: Path, out: Path) -> list[str]:
    options = [
        "--data",
        data,
        "--checker",
        "math",
        "--max-new-tokens",
        40,
        "--batch-tokens",
        600,
        "--device-map",
        "cpu",
    ]
    return [str(one) for one in ("-m", "citer_hf.cli", "label", pair, "--out", out, *options)]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("demo")
    data = folder / "data.jsonl"
    subprocess.run(
        [sys.executable, "-m", "citer_hf.cli", "demo", "--export", str(data), "--problems", "6", "--split", "train"],
        check=True,
    )
    return save_demo_pair(folder), data


def test_a_killed_run_goes_on_to_the_same_labels(on_disk: tuple[Path, Path], tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command(*on_disk, tmp_path / "out")], env=environment)
    begun = tmp_path / "out" / ".work" / "roll-outs of the SLM"
    for _ in range(1200):
        if begun.is_dir() and len(list(begun.glob("*.parquet"))) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"holds no labels.*run the same `citer label` again"):
        Labels.load(tmp_path / "out")
    subprocess.run([sys.executable, *command(*on_disk, tmp_path / "out")], env=environment, check=True)
    subprocess.run([sys.executable, *command(*on_disk, tmp_path / "whole")], env=environment, check=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_labels_of_one(on_disk: tuple[Path, Path], tmp_path: Path) -> None:
    launching.run(launching.TWO, *command(*on_disk, tmp_path / "two"))
    launching.run(launching.ONE, *command(*on_disk, tmp_path / "one"))
    assert content(tmp_path / "two") == content(tmp_path / "one")


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_work_that_was_begun_with_other_arguments_is_left_alone(tmp_path: Path) -> None:
    model = task_pair()

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("roll-outs") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(model, tmp_path / "out", report=stop)
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"rollout_threshold was 0.5 and is 0.9.*Give the same arguments"):
        label(model, tmp_path / "out", router_threshold=0.9)
    assert content(tmp_path / "out") == before


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model = task_pair()
    label(model, tmp_path / "labels", limit=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    for name, holds in (("labels", "finished labels"), ("other", "something else than labels")):
        before = content(tmp_path / name)
        with pytest.raises(FileExistsError, match=f"holds {holds} already"):
            label(model, tmp_path / name, limit=3)
        assert content(tmp_path / name) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": ""}, r"row 2.*response"),
        ({"answer": ""}, r"row 2.*answer"),
        ({"prompt": ""}, r"row 2.*prompt"),
        ({"response": "a" * 300}, r"row 2.*300|row 2.*30\d"),
    ],
)
def test_an_example_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    examples = task()
    examples[1] |= change
    with pytest.raises(ValueError, match=message):
        label(task_pair(), tmp_path / "out", examples)
    assert not (tmp_path / "out").exists()


def test_a_checker_that_raises_is_named_with_the_example(tmp_path: Path) -> None:
    def broken(response: str, example: Any) -> Any:
        raise KeyError("oops")

    where = r"at row \d of the data \('q\d'\)"
    with pytest.raises(ValueError, match=rf"checker .*broken: it raised KeyError.* {where}") as error:
        label(task_pair(), tmp_path / "out", checker=broken)
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(TypeError, match=rf"checker .*: expected it to return a Verdict, got bool {where}"):
        label(task_pair(), tmp_path / "other", checker=lambda response, example: True)


def test_states_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    model = task_pair()
    with torch.no_grad():
        model.slm.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite hidden states at the example 'q\d'"):
        label(model, tmp_path / "out")


def test_a_pair_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = task_pair()
    model._tokenizer = None
    with pytest.raises(ValueError, match="came without a tokenizer"):
        label(model, tmp_path / "out")


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollouts: expected how many"):
        label(task_pair(), tmp_path / "out", rollouts=-1)
    assert not (tmp_path / "out").exists() and labelling.WORK == ".work"
