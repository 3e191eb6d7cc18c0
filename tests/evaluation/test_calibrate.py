"""The threshold for a budget keeps it, as decoding with that threshold shows, and is written where it may be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.data.checkers import Verdict
from citer_hf.data.tokens import encode_prompt
from citer_hf.demo import DEMO_PAIR
from citer_hf.evaluation import calibrate as module
from citer_hf.evaluation.calibrate import Calibration, calibrate
from citer_hf.evaluation.results import bootstrap_interval
from tests.conftest import make_pair
from tests.reference import naive_generate
from tests.repositories import contents
from tests.training_data import LetterTokenizer, examples, has_letter

NEW = 8
EXAMPLES = examples((5, 9, 12, 7, 3, 9, 4, 6))
TOKENIZER = LetterTokenizer()
PROMPTS = [encode_prompt(example, TOKENIZER) for example in EXAMPLES]


def run(pair: Any, checker: Any = None, **options: Any) -> Calibration:
    pair._tokenizer = TOKENIZER
    return calibrate(pair, EXAMPLES, checker, max_new_tokens=NEW, **options)


def test_the_share_is_what_decoding_with_the_threshold_gives():
    pair = make_pair(router="confidence", hidden_size=48)
    found = run(pair, llm_share=0.4)
    to_llm = [naive_generate(pair, prompt, NEW, found.threshold)[1] for prompt in PROMPTS]
    by_llm, tokens = [sum(sequence) for sequence in to_llm], [len(sequence) for sequence in to_llm]
    assert found.llm_share == sum(by_llm) / sum(tokens) == pytest.approx(0.4, abs=0.05)
    assert found.llm_share_ci == bootstrap_interval(by_llm, tokens, seed=0)
    assert found.accuracy is None


def test_an_accuracy_is_reached_as_cheaply_as_possible_or_an_error_names_the_best(pair: Any, monkeypatch: Any):
    monkeypatch.setattr(module, "STAIRS", (0.0, 0.3, 0.9))
    monkeypatch.setattr(module, "HALVINGS", 1)
    llm = {example.id: naive_generate(pair, one, NEW, 2.0)[0] for example, one in zip(EXAMPLES, PROMPTS, strict=True)}

    def like_the_llm(text: str, example: Any) -> Verdict:
        same = sum(one == two for one, two in zip(text, TOKENIZER.decode(llm[example.id]), strict=False))
        return Verdict(same >= NEW // 2, text)

    found = run(pair, like_the_llm, accuracy=0.6)
    assert found.accuracy is not None and found.accuracy >= 0.6 and 0 < found.llm_share < 1
    outputs = [TOKENIZER.decode(naive_generate(pair, prompt, NEW, found.threshold)[0]) for prompt in PROMPTS]
    right = [like_the_llm(output, example).correct for output, example in zip(outputs, EXAMPLES, strict=True)]
    assert found.accuracy == sum(right) / len(right)
    found = run(pair, lambda text, example: Verdict(True, text), accuracy=0.9)
    assert (found.threshold, found.llm_share, found.accuracy) == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"^accuracy: no threshold reaches 99.0% .* The best is .*, accuracy"):
        run(pair, lambda text, one: Verdict(text == TOKENIZER.decode(llm[one.id]), text), accuracy=0.99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^quality, speedup, accuracy, llm_share: expected exactly one"),
        ({"llm_share": 0.2, "quality": 0.9}, r"llm_share: expected exactly one, got .*0\.2"),
        ({"llm_share": float("nan")}, r"^llm_share: expected a number above 0"),
        ({"accuracy": 1.0, "checker": has_letter}, r"^accuracy: expected .* got .*1\.0"),
        ({"accuracy": 0.9}, r"^accuracy: it needs a checker"),
        ({"quality": 1.1, "checker": has_letter}, r"^quality: expected a part of the LLM's accuracy.* got 1\.1"),
        ({"speedup": 0.0, "checker": has_letter}, r"^speedup: expected a number above 0"),
        ({"quality": 0.9, "checker": lambda *_: Verdict(False, "")}, r"^examples: the LLM answers none"),
    ],
)
def test_options_out_of_range_are_errors(pair: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(pair, **options)


FOUND = Calibration(0.25, 0.2, (0.1, 0.3), 9)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A router repository with an origin and a file of the user's."""
    make_pair(hidden_size=48).save_pretrained(tmp_path / "router", save_base_models=True)
    (tmp_path / "router" / "provenance.json").write_text('{"labels": "abc"}')
    (tmp_path / "router" / "notes.txt").write_text("mine")
    return tmp_path / "router"


def test_a_threshold_is_written_and_all_else_stays(repository: Path):
    before = contents(repository)
    FOUND.write(repository)
    changed = {str(path) for path, content in contents(repository).items() if before[path] != content}
    assert changed == {"config.json", "provenance.json"}
    origin = json.loads((repository / "provenance.json").read_text())
    assert origin["labels"] == "abc"
    assert (origin["calibration"]["threshold"], origin["calibration"]["llm_share_ci"]) == (0.25, [0.1, 0.3])
    assert CiterForCausalLM.from_pretrained(repository).config.router_threshold == 0.25
    # A threshold of the generation settings would win.
    settings = repository / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"router_threshold": 0.9}))
    FOUND.write(repository)
    assert json.loads(settings.read_text())["router_threshold"] == 0.25


def test_a_broken_repository_stays_as_it_is(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected the directory of a pair.* config\.json"):
        FOUND.write(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "provenance.json").write_text("[1")
    with pytest.raises(ValueError, match=r"provenance\.json: expected a JSON object"):
        FOUND.write(tmp_path)
    assert contents(tmp_path) == {Path("config.json"): b"{}", Path("provenance.json"): b"[1"}


def test_calibrate_writes_into_the_directory_of_the_pair(repository: Path):
    pair = CiterForCausalLM.from_pretrained(repository)
    found = run(pair, llm_share=0.4, write=True)
    assert f"router_threshold {found.threshold:.6g}, llm_veto 0: LLM share {found.llm_share:.1%}" in found.summary()
    assert CiterForCausalLM.from_pretrained(repository).config.router_threshold == found.threshold
    pair.name_or_path = ""
    with pytest.raises(FileNotFoundError, match=r"^write: expected the directory of a pair"):
        run(pair, llm_share=0.4, write=True)


def test_the_installed_package_and_the_hubs_cache_are_never_written_into(repository: Path, monkeypatch: Any):
    before = contents(DEMO_PAIR)
    with pytest.raises(ValueError, match=r"is part of the installed package .* Copy it"):
        FOUND.write(DEMO_PAIR)
    monkeypatch.setattr(module, "Evaluation", None)
    shipped = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    # The error comes before hours of decoding.
    with pytest.raises(ValueError, match=r"^write: "):
        run(shipped, llm_share=0.4, write=True)
    assert contents(DEMO_PAIR) == before
    snapshot = repository.parent / "models--user--router" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    repository.rename(snapshot)
    with pytest.raises(ValueError, match="or of the Hub's cache"):
        FOUND.write(snapshot)


@pytest.fixture
def close_to_the_llm(monkeypatch: Any) -> Any:
    """A pair, few settings to try, and a checker: all tokens but two are the LLM's."""
    monkeypatch.setattr(LetterTokenizer, "save_pretrained", lambda *_, **__: (), raising=False)
    monkeypatch.setattr(module, "VETOES", (0.0, 0.5))
    monkeypatch.setattr(module, "FLAGGED", (0.0, 0.5))
    monkeypatch.setattr(module, "TURNS", 1)
    pair = make_pair(router="confidence", hidden_size=48)
    llm = {example.id: naive_generate(pair, one, NEW, 2.0)[0] for example, one in zip(EXAMPLES, PROMPTS, strict=True)}

    def check(text: str, example: Any) -> Verdict:
        expected = TOKENIZER.decode(llm[example.id])
        same = sum(one == two for one, two in zip(text, expected, strict=False))
        return Verdict(same >= len(expected) - 2, text)

    return pair, check


def test_a_quality_is_kept_on_fresh_problems_and_known_to_generate(close_to_the_llm: Any, tmp_path: Path):
    pair, check = close_to_the_llm
    found = run(pair, check, quality=0.5, out=tmp_path / "pair")
    fresh = [
        check(
            TOKENIZER.decode(naive_generate(pair, prompt, NEW, found.threshold, veto=found.llm_veto)[0]), example
        ).correct
        for example, prompt in zip(EXAMPLES[1::2], PROMPTS[1::2], strict=True)
    ]
    # The LLM's own texts are all right.
    assert found.kept == sum(fresh) / len(fresh) >= 0.5
    assert "of the LLM's accuracy" in found.summary() and "LLM passes" in found.summary()
    saved = CiterForCausalLM.from_pretrained(tmp_path / "pair")
    assert (saved.config.router_threshold, saved.config.llm_veto) == (found.threshold, found.llm_veto)
    for one in (pair, saved):
        ids, settings = torch.tensor([PROMPTS[0]]), {"max_new_tokens": NEW, "do_sample": False}
        expected = one.generate(ids, router_threshold=found.threshold, llm_veto=found.llm_veto, **settings)
        one.config.router_threshold = 0.0
        assert torch.equal(one.generate(ids, quality=0.4, **settings), expected)
    with pytest.raises(FileExistsError, match=r"^out: "):
        run(pair, check, quality=0.5, out=tmp_path / "pair")


def test_quality_1_is_the_lossless_end(close_to_the_llm: Any):
    found = run(*close_to_the_llm, quality=1)
    assert (found.threshold, found.kept, found.accuracy) == (2.0, 1.0, 1.0)


def test_a_speed_is_reached_as_accurately_as_possible_or_an_error_names_the_best(close_to_the_llm: Any):
    assert run(*close_to_the_llm, speedup=1e-6).kept == 1.0
    with pytest.raises(ValueError, match=r"^speedup: no setting is 1e\+06 times .* router_threshold .* as fast"):
        run(*close_to_the_llm, speedup=1e6)


def test_few_problems_are_measured_with_a_warning(close_to_the_llm: Any, caplog: Any):
    pair, check = close_to_the_llm
    run(pair, check, llm_share=0.4)
    assert "8 problems say little" in caplog.text


def test_quality_is_refused_where_it_was_not_calibrated(close_to_the_llm: Any):
    pair, check = close_to_the_llm
    ids = torch.tensor([PROMPTS[0]])

    def refused(model: Any, quality: Any, **more: Any) -> str:
        with pytest.raises(ValueError, match=r"^quality: ") as error:
            model.generate(ids, quality=quality, max_new_tokens=2, **more)
        return str(error.value)

    assert "is not calibrated. Run `citer calibrate" in refused(pair, 0.9)
    run(pair, check, quality=0.5)
    assert "0.9 is above what was calibrated: 0.5" in refused(pair, 0.9)
    assert "above 0 and at most 1" in refused(pair, 0)
    assert "Give either" in refused(pair, 0.5, llm_veto=0.1)
    other = make_pair(router="confidence", hidden_size=48, num_hidden_layers=1)
    torch.nn.init.normal_(other.llm.get_output_embeddings().weight)
    other.config.calibration = pair.config.calibration
    assert "calibrated with another LLM" in refused(other, 0.5)
    assert torch.equal(
        other.generate(ids, quality=1, max_new_tokens=4), other.generate(ids, router_threshold=2, max_new_tokens=4)
    )
