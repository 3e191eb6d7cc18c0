"""The threshold for a budget keeps it, as decoding with that threshold shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from citer_hf.data.checkers import Verdict
from citer_hf.data.tokens import encode_prompt
from citer_hf.evaluation.calibrate import Calibration, calibrate, write_threshold
from citer_hf.evaluation.points import bootstrap_interval
from tests.conftest import make_pair
from tests.evaluation_data import LetterTokenizer, examples, has_letter
from tests.reference import naive_generate

NEW = 8
EXAMPLES = examples((5, 9, 12, 7, 3, 9, 4, 6, 8, 11))
TOKENIZER = LetterTokenizer()
PROMPTS = [encode_prompt(example, TOKENIZER) for example in EXAMPLES]


def run(pair: Any, checker: Any = None, **options: Any) -> Calibration:
    return calibrate(pair, EXAMPLES, checker, tokenizer=TOKENIZER, max_new_tokens=NEW, **options)


@pytest.mark.parametrize("router", ["random", "entropy", "confidence"])
def test_the_share_is_what_decoding_with_the_threshold_gives(router: str):
    pair = make_pair(router=router, hidden_size=48)
    found = run(pair, llm_share=0.4)
    to_llm = [naive_generate(pair, prompt, NEW, found.threshold)[1] for prompt in PROMPTS]
    by_llm, tokens = [sum(row) for row in to_llm], [len(row) for row in to_llm]
    assert found.llm_share == sum(by_llm) / sum(tokens) == pytest.approx(0.4, abs=0.05)
    assert found.llm_share_ci == bootstrap_interval(by_llm, tokens, seed=0)
    assert found.llm_share_ci[0] <= found.llm_share <= found.llm_share_ci[1]
    assert found.accuracy is None


def test_an_accuracy_is_reached_at_less_than_the_llm_costs(pair: Any):
    def like_the_llm(text: str, example: Any) -> Verdict:
        own = naive_generate(pair, encode_prompt(example, TOKENIZER), NEW, 2.0)[0]
        same = sum(one == two for one, two in zip(text, TOKENIZER.decode(own), strict=False))
        return Verdict(same >= NEW // 2, text)

    found = run(pair, like_the_llm, accuracy=0.6)
    assert found.accuracy is not None and found.llm_accuracy is not None
    assert found.accuracy >= 0.6 * found.llm_accuracy
    assert 0 < found.llm_share < 1
    texts = [naive_generate(pair, prompt, NEW, found.threshold)[0] for prompt in PROMPTS]
    right = [like_the_llm(TOKENIZER.decode(text), example).correct for text, example in zip(texts, EXAMPLES)]  # noqa: B905
    assert found.accuracy == sum(right) / len(right)


def test_an_accuracy_that_the_slm_has_needs_no_llm(pair: Any):
    found = run(pair, lambda text, example: Verdict(True, text), accuracy=0.9)
    assert (found.threshold, found.llm_share, found.accuracy) == (0.0, 0.0, 1.0)


def test_an_accuracy_that_no_threshold_reaches_says_what_the_best_is(pair: Any):
    llm_texts = {TOKENIZER.decode(naive_generate(pair, prompt, NEW, 2.0)[0]) for prompt in PROMPTS}
    other = make_pair(router="random", hidden_size=48, num_hidden_layers=3)
    other.router.forward = lambda hidden, logits: hidden[..., 0] * 0 + 1.0
    slm_texts = {TOKENIZER.decode(naive_generate(pair, prompt, NEW, 0.0)[0]) for prompt in PROMPTS}

    def only_of_the_llm(text: str, example: Any) -> Verdict:
        # Judged once as the LLM's own text, and never right again.
        seen.append(text)
        return Verdict(len(seen) <= len(PROMPTS), text)

    seen: list[str] = []
    assert llm_texts != slm_texts
    with pytest.raises(ValueError, match=r"^accuracy: no threshold reaches 90.0% .* The best is .* accuracy of"):
        run(pair, only_of_the_llm, accuracy=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^llm_share, accuracy: expected exactly one"),
        ({"llm_share": 0.2, "accuracy": 0.9}, r"^llm_share, accuracy: expected exactly one"),
        ({"llm_share": 0.0}, r"^llm_share: expected a number above 0 and below 1"),
        ({"llm_share": float("nan")}, r"^llm_share: expected a number above 0 and below 1"),
        ({"accuracy": 1.0, "checker": has_letter}, r"^accuracy: expected a number above 0 and below 1"),
        ({"accuracy": 0.9}, r"^accuracy: it needs a checker"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(pair: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(pair, **options)


FOUND = Calibration(0.25, 0.2, (0.1, 0.3), 9, wanted={"llm_share": 0.2})


def test_a_threshold_is_written_and_all_else_stays(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "citer", "router_threshold": 0.5, "own": [1]}')
    (tmp_path / "provenance.json").write_text('{"labels": "abc"}')
    write_threshold(tmp_path, FOUND)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "citer", "router_threshold": 0.25, "own": [1]}
    origin = json.loads((tmp_path / "provenance.json").read_text())
    assert origin["labels"] == "abc"
    assert (origin["calibration"]["threshold"], origin["calibration"]["llm_share_ci"]) == (0.25, [0.1, 0.3])


def test_a_saved_pair_loads_with_the_threshold(tmp_path: Path):
    make_pair(threshold=0.5).save_pretrained(tmp_path)
    write_threshold(tmp_path, FOUND)
    from citer_hf import CiterForCausalLM

    assert CiterForCausalLM.from_pretrained(tmp_path).config.router_threshold == 0.25


def test_a_broken_repository_is_left_as_it_is(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        write_threshold(tmp_path, FOUND)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "provenance.json").write_text("[1")
    with pytest.raises(ValueError, match=r"provenance\.json: expected a JSON object"):
        write_threshold(tmp_path, FOUND)
    assert (tmp_path / "config.json").read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 2
