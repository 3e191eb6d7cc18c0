"""`citer bench`: the comparison, its report, interruptions, failures, options, and its contenders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import GenerationConfig

from citer_hf import CiterForCausalLM
from citer_hf.bench import bench as module
from citer_hf.bench import contenders
from citer_hf.bench.bench import bench, table
from citer_hf.bench.contenders import PLAIN, Decoders, Plan, count_passes, padded_batches
from tests.chat_pairs import QUICK_BENCH, invoke
from tests.conftest import make_pair, random_prompts

pytestmark = pytest.mark.usefixtures("small_machine")
QUICK: dict[str, Any] = {"max_new_tokens": 4, "prompt_length": 6, "repeats": 1, "warmup": 0}


def bench_json(*arguments: Any, status: int = 0) -> dict[str, Any]:
    result = invoke("bench", "demo", *QUICK_BENCH, *arguments, "--json")
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout)


def test_the_report_adds_up() -> None:
    report = bench_json("--shares", "0,0.5,1", "--thresholds", "0.5", "--repeats", 2)
    assert report["model"] == "demo" and report["complete"] and report["error"] is None
    settings = ["share 0", "share 0.5", "share 1", "threshold 0.5"]
    kinds = ("CITER", "CITER, max_drafts 0", "floor")
    rows = {row["name"]: row for row in report["rows"]}
    alone = ["LLM alone", "SLM alone", "assisted generation", "assisted, ensemble", "CITER, lossless"]
    if not hasattr(GenerationConfig(), "assistant_ensemble_weight"):
        alone.remove("assisted, ensemble")
    assert list(rows) == alone + [f"{kind}, {setting}" for setting in settings for kind in kinds]
    for row in rows.values():
        assert row["tokens"] == row["positions"] == 4 and len(row["seconds"]) == 2 and row["error"] is None
        for value in ("tokens_per_second", "ms_per_token", "speedup"):
            assert 0 < row[value]["low"] <= row[value]["median"] <= row[value]["high"]
        assert row["bytes_moved"] > 0 and row["bandwidth_fraction"] > 0
        assert (row["relative_to_floor"] is None) == (row["kind"] == "floor" or row["name"] in alone)
        passes = row["llm_passes_per_position"]
        assert row["tokens_per_llm_pass"] == (1 / passes if passes else None)
    passes = {name: (row["llm_passes_per_position"], row["slm_passes_per_position"]) for name, row in rows.items()}
    assert passes["LLM alone"] == (passes["CITER, max_drafts 0, share 1"][0], 0) == (1, 0)
    assert passes["SLM alone"] == passes["CITER, share 0"] == passes["floor, share 0"] == (0, 1)
    assert passes["CITER, lossless"][0] <= 1 and rows["CITER, lossless"]["llm_share"] == 1
    for setting in settings:
        citer, plain, floor = (rows[f"{kind}, {setting}"] for kind in kinds)
        assert citer["llm_share"] == plain["llm_share"] == floor["llm_share"] == plain["llm_passes_per_position"]
        assert passes[plain["name"]] == passes[floor["name"]] and plain["bytes_moved"] == floor["bytes_moved"]
        assert (citer["share"] is None) == (citer["threshold"] is not None) == setting.startswith("threshold")
    assert report["machine"]["memory_bandwidth"] > 0


def test_a_bare_pair_has_the_default_shares(saved: Path) -> None:
    bare = ("--slm", saved / "slm", "--llm", saved / "llm")
    report = json.loads(invoke("bench", *bare, "--no-assisted", *QUICK_BENCH, "--json").stdout)
    assert [row["share"] for row in report["rows"] if row["kind"] == "CITER"] == [0, 0.2, 0.5]
    assert "assisted generation" not in [row["name"] for row in report["rows"]]


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_is_measured_without_assistance(pair: CiterForCausalLM, cache: str | None) -> None:
    options = {"shares": (0.5,), "agreement": 0.5, "batch_size": 2, "cache_implementation": cache}
    report = bench(pair, **options, **QUICK)
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds == ["LLM alone", "SLM alone", "CITER, lossless", "CITER", "CITER, max_drafts 0", "floor"]
    citer, plain, floor = report["rows"][3:]
    assert citer["llm_share"] == plain["llm_share"] == floor["llm_share"] == 0.5
    assert plain["llm_passes_per_position"] == floor["llm_passes_per_position"]
    assert all(row["tokens"] == 2 * row["positions"] and row["error"] is None for row in report["rows"])


def test_a_veto_is_that_of_the_option_or_for_thresholds_of_the_pair() -> None:
    pair = make_pair()
    pair.config.llm_veto = 1.0
    for veto, of_threshold in ((None, 1), (0.0, 0)):
        report = bench(pair, shares=(0.0,), thresholds=(1e-9,), veto=veto, **QUICK)
        shares = {row["name"]: row["llm_share"] for row in report["rows"]}
        assert shares["CITER, share 0"] == 0 and (shares["CITER, threshold 1e-09"] > 0) == of_threshold


def test_prompts_of_a_file_fill_batches(tmp_path: Path) -> None:
    file, texts = tmp_path / "prompts.json", ("Tom has 3 apples.", "Then he has 2 times as many apples.", "How many?")
    file.write_text(json.dumps([{"prompt": text} for text in texts]))
    report = bench_json("--prompts", file, "--batch-size", 2, "--shares", "0.5")
    assert len(report["options"]["prompt_length"]) == 2 and report["options"]["prompts"] == str(file)
    assert all(row["positions"] == 2 * 4 and row["tokens"] == 16 for row in report["rows"])


def test_the_table_is_complete_and_the_pair_is_left_as_it_was() -> None:
    pair = make_pair()
    parts = (pair, pair.slm, pair.llm)
    # Outputs are of equal length, though every token would end them.
    pair.generation_config.eos_token_id = pair.llm.generation_config.eos_token_id = list(range(pair.vocab_size))
    before = [pair.router, *(part.generation_config for part in parts)]
    found = bench(pair, shares=(0, 1), thresholds=(0.5,), **QUICK)
    assert found["error"] is None
    after = [pair.router, *(part.generation_config for part in parts)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert not any(part._forward_pre_hooks for part in parts)
    for part in ("on cpu", "batch size 1", "LLM alone", "CITER, share 1", "floor, threshold 0.5"):
        assert part in table(found)


def fail_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, error: BaseException) -> None:
    """Let the n-th call of a method of `Decoders` fail, and all later ones."""
    real, calls = getattr(Decoders, method), []

    def decode(*args: Any, **kwargs: Any) -> Any:
        # The lossless contender has no share.
        calls.extend([1] * (args[1].share is not None))
        if len(calls) >= call and args[1].share is not None:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(Decoders, method, decode)


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # The floor is counted once; its first timed run is its second call.
    fail_at(monkeypatch, "floor", 2, KeyboardInterrupt())
    report = bench_json("--shares", "0.5", status=130)
    assert report["interrupted"] and not report["complete"] and report["error"] is None
    *timed, floor = report["rows"]
    assert all(len(row["seconds"]) == 1 for row in timed) and timed[-1]["relative_to_floor"] is None
    assert floor["seconds"] == [] and floor["slm_passes_per_position"] == 1
    assert floor["speedup"] is floor["ms_per_token"] is floor["bandwidth_fraction"] is None


def test_ctrl_c_before_anything_was_measured_leaves_a_report(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "describe_machine", Mock(side_effect=KeyboardInterrupt))
    report = bench(pair, "pair", shares=(0.5,), **QUICK)
    assert report["interrupted"] and not report["complete"]
    assert table(report).startswith("Interrupted") and report["rows"] == []


@pytest.mark.parametrize(
    ("error", "call"), [(torch.OutOfMemoryError("CUDA out of memory"), 1), (MemoryError("no memory"), 3)], ids=repr
)
def test_a_contender_that_fails_is_reported_and_the_others_are_measured(monkeypatch, error, call):
    # Each round calls it for `CITER` and for `max_drafts 0`.
    fail_at(monkeypatch, "citer", call, error)
    report = bench_json("--shares", "0.5", "--no-assisted", status=1)
    llm, slm, _, citer, _, floor = report["rows"]
    assert not report["complete"] and report["error"] == f"CITER, share 0.5: {citer['error']}"
    assert citer["error"] == f"{type(error).__name__}: {error}" and llm["error"] is slm["error"] is None
    assert len(llm["seconds"]) == len(slm["seconds"]) == 1
    # The floor repeats the decisions of the pair: without any it has none to repeat.
    assert ("which failed" in floor["error"]) if call == 1 else floor["error"] is None


def test_a_failure_of_assisted_generation_leaves_the_report_complete(pair, monkeypatch):
    monkeypatch.setattr(pair.llm, "_get_candidate_generator", None, raising=False)
    report = bench(pair, shares=(0.5,), **QUICK)
    failed = [row["name"] for row in report["rows"] if row["error"]]
    assert failed[0] == "assisted generation" and all(name.startswith("assisted") for name in failed)
    assert report["error"] is None and report["complete"] and "assisted generation failed: " in table(report)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--shares", "half"], ("--shares", "half")),
        (["demo", "--agreement", "1.5"], ("--agreement", "1.5")),
        (["demo", "--veto", "2"], ("llm_veto", "2")),
        (["demo", "--thresholds", "70"], ("router_threshold", "70")),
        (["demo", "--batch-size", "0"], ("--batch-size",)),
        (["demo", "--cache-implementation", "paged"], ("--cache-implementation", "paged")),
        (["demo", "--device", "toaster"], ("--device", "toaster")),
        (["demo", "--prompt-length", "300"], ("--prompt-length", "300", "256")),
        ([], ("MODEL", "--slm", "--llm")),
        (["demo", "--gpu", "h100"], ("--gpu", "--simulate")),
        (["demo", "--simulate", "--gpu", "h100", "--thresholds", "0.5"], ("--thresholds", "--simulate")),
    ],
    ids=str,
)
def test_the_command_refuses_before_it_measures(arguments: list[str], said: tuple[str, ...]) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code != 0 and not result.stdout
    for part in said:
        assert part in result.stderr


# ---- contenders: forced shares, the loops, counted passes, prompts ----


def random_batch(vocab_size, length, sequences, seed=0):
    return padded_batches(contenders.random_prompts(vocab_size, length, sequences, seed), sequences)[0]


def run_all(model, batch, new_tokens, shares, thresholds=(), cache=None, agreement=None, **options):
    """Tokens, decisions, SLM passes and LLM passes of each contender, by its name."""
    decoders = contenders.Decoders(model, new_tokens, cache, agreement=agreement)
    found, settings = {}, contenders.settings_of(shares, thresholds)
    with contenders.greedy_without_end(model):
        for one in decoders.contenders(settings, **options):
            with count_passes(model) as passes:
                found[one.name] = (*one.decode(batch), *passes)
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_share_and_agreement_are_as_exact_as_the_length_allows_for_each_seed_and_batch(share: float) -> None:
    for seed, tokens in enumerate((1, 7, 64, 1000)):
        plan = Plan.of(random_batch(99, 3, 2), tokens, share, 0.8, 99, seed)
        differ = plan.tokens["slm"] != plan.tokens["llm"]
        assert abs(int(plan.flagged.sum()) - share * 2 * tokens) <= 0.5 + 1e-3 and not (differ & ~plan.flagged).any()
        assert abs(int(differ.sum()) - 0.2 * share * 2 * tokens) <= 0.5 + 1e-3
    batches = [replace(random_batch(99, 3, 2), number=number) for number in (0, 1)]
    first, again, *others = (
        Plan.of(batches[number], 50, 0.5, None, 99, seed).flagged
        for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0), (1, 1))
    )
    assert torch.equal(first, again) and not any(torch.equal(first, one) for one in others)


def test_the_floor_gives_the_output_of_the_pair(pair: CiterForCausalLM) -> None:
    batch = random_batch(pair.vocab_size, 12, 1, seed=4)
    found = {name: one[0] for name, one in run_all(pair, batch, 6, (0, 0.3, 1), (0.5,), assisted=True).items()}
    assert all(tokens.shape == (1, 6) for tokens in found.values())
    assert torch.equal(found["CITER, share 0"], found["SLM alone"])
    for name in ("assisted generation", "CITER, lossless", "CITER, share 1"):
        assert torch.equal(found[name], found["LLM alone"])
    for setting in ("share 0", "share 0.3", "share 1", "threshold 0.5"):
        assert torch.equal(found[f"floor, {setting}"], found[f"CITER, {setting}"])


@pytest.mark.parametrize(
    ("slm", "llm", "cache", "agreement"),
    [
        ("bloom", "llama", None, None),
        ("llama", "gpt2", None, 0.75),
        ("qwen3_next", "llama", None, 0.75),
        ("llama", "llama", "static", 0.75),
    ],
)
def test_padded_batches_follow_one_plan_however_often_a_place_is_drafted(slm, llm, cache, agreement):
    (batch,), pair = padded_batches(random_prompts(), 3), make_pair(slm, llm)
    found = run_all(pair, batch, 12, (0.4,), cache=cache, agreement=agreement)
    plan, tokens = Plan.of(batch, 12, 0.4, agreement, pair.vocab_size, 0), found["CITER, share 0.4"][0]
    for way in (PLAIN, "floor"):
        assert torch.equal(found[f"{way}, share 0.4"][1], plan.flagged), way
        # The floor has the bare models' tokens.
        assert torch.equal(found[f"{way}, share 0.4"][0], tokens) or (agreement is not None and way != PLAIN)
    if agreement is not None:
        assert torch.equal(tokens, torch.where(plan.flagged, plan.tokens["llm"], plan.tokens["slm"]))


def test_every_way_reads_a_token_once(pair: CiterForCausalLM) -> None:
    found = run_all(pair, random_batch(pair.vocab_size, 5, 1), 3, (1.0,))
    for name in ("floor, share 1", f"{PLAIN}, share 1", "LLM alone"):
        assert found[name][3] == [(1, 5, 0), (1, 1, 5), (1, 1, 6)]


def test_passes_that_would_be_compiled_are_counted(pair: CiterForCausalLM) -> None:
    with count_passes(pair) as (slm, _):
        assert pair.generation_config.disable_compile and pair.llm.generation_config.disable_compile
        wanted = {"max_new_tokens": 4, "cache_implementation": "static", "max_drafts": 0}
        pair.generate(torch.tensor(random_prompts((5,))), **wanted)
    assert not pair.generation_config.disable_compile and [tokens for _, tokens, _ in slm] == [5, 1, 1, 1]


def test_batches_are_padded_on_the_left_and_filled_up() -> None:
    first, second = padded_batches([[97, 98, 99], [100], [101, 102]], 2)
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.input_ids[0].tolist() == [97, 98, 99] and first.input_ids[1, 2] == 100
    assert second.input_ids[0].tolist()[-2:] == [101, 102] and second.input_ids[1].tolist() == [97, 98, 99]
    assert (first.number, second.number) == (0, 1)
