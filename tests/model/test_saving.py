"""What is saved is what was there: references, generation settings, stale files, marks."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from citer_hf import CiterForCausalLM
from tests.conftest import make_pair, random_prompts
from tests.families import tiny_model
from tests.reference import mlp_score
from tests.repositories import config_of, logits, save_base_models, word_tokenizer

load = CiterForCausalLM.from_pretrained


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    """A small and a large model, and another large one in a folder of its own and as a variant."""
    save_base_models(tmp_path)
    other = tiny_model("llama", seed=7, hidden_size=64, intermediate_size=64, head_dim=16)
    other.save_pretrained(tmp_path / "llm" / "deeper")
    other.save_pretrained(tmp_path / "llm", variant="other")
    word_tokenizer().save_pretrained(tmp_path / "llm" / "deeper")
    return tmp_path


def same_llm(one: Any, other: Any) -> bool:
    return torch.equal(logits(one, 2.0), logits(other, 2.0))


@pytest.mark.parametrize("where", [{"subfolder": "deeper"}, {"variant": "other"}], ids=str)
def test_a_model_in_a_subfolder_or_a_variant_is_referred_to_as_such(bases, where):
    named = {f"llm_{key}": value for key, value in where.items()}
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", **named)
    assert not same_llm(pair, CiterForCausalLM.from_pair(bases / "slm", bases / "llm"))
    pair.save_pretrained(bases / "router")
    assert config_of(bases / "router")["llm_reference"] == {"name_or_path": str(bases / "llm"), **where}
    loaded = load(bases / "router")
    loaded.save_pretrained(bases / "again")
    assert same_llm(loaded, pair) and same_llm(load(bases / "again"), pair)


def pretend_gguf(pair: Any, bases: Path) -> None:
    """transformers leaves the model a name, and no weights that can be compared are there."""
    pair.llm.lm_head.weight.data += 0.5
    pair.llm.config._name_or_path = pair.llm.name_or_path = str(bases)


# What a reference to the LLM does not tell of.
LARGE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
OTHER = AutoModelForCausalLM.from_pretrained
CHANGES = {
    "weights": lambda pair, bases: pair.llm.lm_head.weight.data.add_(0.5),
    "resized": lambda pair, bases: pair.resize_token_embeddings(70),
    "another object": lambda pair, bases: setattr(pair, "llm", tiny_model("llama", seed=9, **LARGE)),
    "a named object": lambda pair, bases: setattr(pair, "llm", OTHER(bases / "llm" / "deeper")),
    "a variant": lambda pair, bases: setattr(pair, "llm", OTHER(bases / "llm", variant="other")),
    "a GGUF file": pretend_gguf,
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("saved", ["not", "referring", "holding"])
def test_what_a_reference_would_not_lead_back_to_is_saved_along(bases, kind, saved, caplog):
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    if saved != "not":
        pair.save_pretrained(bases / "first", save_base_models=saved == "holding")
        pair = load(bases / "first")
    CHANGES[kind](pair, bases)
    pair.save_pretrained(bases / "router")
    assert same_llm(load(bases / "router"), pair)
    named = "name_or_path" in config_of(bases / "router")["llm_reference"]
    assert named == (kind == "a named object")
    assert named or "llm: the LLM is saved along with the router, since it differs from" in caplog.text
    pair.save_pretrained(bases / "first")
    assert same_llm(load(bases / "first"), pair)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17"), reason="5.17 does not save a plain model with such settings either"
)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.9}, {"top_k": -1}, {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5}]
)
def test_settings_that_transformers_only_warns_about_are_saved(bases, settings, whole):
    file = bases / "llm" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, **settings}))
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    if whole:
        pair.config.slm_reference = pair.config.llm_reference = None
    pair.save_pretrained(bases / "router")
    loaded = load(bases / "router")
    assert {key: getattr(loaded.generation_config, key) for key in settings} == settings
    found, expected = loaded.generation_config.to_dict(), pair.generation_config.to_dict()
    assert found | {"_from_model_config": False} == expected | {"_from_model_config": False}
    loaded.save_pretrained(bases / "again", save_base_models=True)


def test_the_pair_ends_at_the_end_tokens_of_both_models(bases, caplog):
    for role, ids in (("slm", [2, 9]), ("llm", 5)):
        (bases / role / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "pad_token_id": 0}))
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    assert "slm: it ends at the tokens [2, 9] and the LLM does not" in caplog.text
    pair.save_pretrained(bases / "router")
    assert load(bases / "router").generation_config.eos_token_id == [5, 2, 9]
    caplog.clear()
    CiterForCausalLM.from_pair(bases / "llm", bases / "llm")
    assert "ends at" not in caplog.text


@pytest.mark.parametrize("kind", ["mlp", "linear", "r2r"])
def test_a_router_that_nobody_has_trained_says_so_until_it_is_trained(bases, kind, caplog):
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=kind)
    assert pair.router_is_untrained and caplog.text.count("router are random") == 1
    pair.save_pretrained(bases / "router")
    loaded = load(bases / "router")
    assert loaded.router_is_untrained and loaded.config.router["untrained"] is True
    assert CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=bases / "router").router_is_untrained
    assert not loaded.train().router_is_untrained
    loaded.save_pretrained(bases / "trained")
    assert "untrained" not in load(bases / "trained").config.router


def test_swapped_models_bring_a_warning(bases, caplog):
    CiterForCausalLM.from_pair(bases / "llm", bases / "slm")
    assert "the SLM is larger than the LLM. Were they swapped?" in caplog.text


def test_a_directory_without_a_tokenizer_is_named_when_the_pair_is_made(bases, caplog):
    for file in (bases / "llm").glob("tokenizer*"):
        file.unlink()
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    assert f"llm: no tokenizer could be loaded from {bases / 'llm'}" in caplog.text
    assert "slm: no tokenizer" not in caplog.text and pair.load_tokenizer() is not None


def weights_in(folder: Path) -> set[str]:
    found = (file for file in folder.rglob("*") if "model" in file.name and file.suffix != ".py")
    return {str(file.relative_to(folder)) for file in found}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sizes", [("20KB", "1GB"), ("1GB", "20KB")], ids=["shards first", "one file first"])
def test_the_weights_that_were_saved_last_are_loaded(bases, whole, sizes):
    out = bases / "out"
    for seed, size in enumerate(sizes):
        llm = tiny_model("llama", seed=seed + 20, hidden_size=64, intermediate_size=64, head_dim=16)
        pair = CiterForCausalLM.from_pair(tiny_model("llama", seed=seed + 30), llm, router="linear")
        pair.save_pretrained(out, save_base_models=not whole, max_shard_size=size)
        if seed == 0:
            for folder in (out, *(() if whole else (out / "slm", out / "llm"))):
                (folder / "pytorch_model.bin").write_bytes(b"stale")
    assert same_llm(load(out), pair)
    pair.save_pretrained(bases / "fresh", save_base_models=not whole, max_shard_size=sizes[1])
    assert weights_in(out) == weights_in(bases / "fresh")


def test_files_beside_a_router_that_are_none_of_its_stay(bases):
    # The base models lie in the directory themselves.
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    (bases / "mine.py").write_text("mine")
    (bases / "results.json").write_text("{}")
    pair.save_pretrained(bases)
    assert (bases / "mine.py").exists() and (bases / "results.json").exists()
    assert same_llm(load(bases), pair)


def test_a_router_file_of_released_code_is_converted_first(bases):
    (bases / "router.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"router: .*router.pt is a file.*citer convert .*router.pt"):
        CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=bases / "router.pt")


def test_a_misspelled_keyword_names_the_model(bases):
    with pytest.raises(TypeError, match=r"llm: .*unexpected keyword argument 'divice_map'"):
        CiterForCausalLM.from_pair(bases / "slm", bases / "llm", llm_divice_map="auto")


def add_tokens(folder: Path, *tokens: str, **settings: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(list(tokens))
    for key, value in settings.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("role", ["slm", "llm"])
def test_added_tokens_of_one_model_are_no_other_tokenizer(bases, role):
    for name in ("slm", "llm"):
        tiny_model("llama", 3, vocab_size=64).save_pretrained(bases / name)
    add_tokens(bases / role, "<a>", "<b>")
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    assert pair.config.vocab_size == 64
    pair.save_pretrained(bases / "router")
    load(bases / "router")


def test_added_tokens_that_the_slms_table_lacks_are_never_generated(bases):
    tiny_model("llama", 3, vocab_size=64).save_pretrained(bases / "llm")
    add_tokens(bases / "llm", "<image>")
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm")
    assert pair.config.vocab_size == 61 and max(pair.load_tokenizer().get_vocab().values()) == 60
    pair.save_pretrained(bases / "router")
    load(bases / "router")
    for needed in ({"eos_token": "<image>"}, {"chat_template": "<image>"}):
        add_tokens(bases / "llm", "<image>", **needed)
        with pytest.raises(ValueError, match=r"slm: its vocabulary table has 61 rows, too few"):
            CiterForCausalLM.from_pair(bases / "slm", bases / "llm")


def test_a_process_that_is_not_the_main_one_leaves_what_the_main_one_saved(tmp_path):
    model = make_pair(router="mlp")
    model.save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert tmp_path / "model.safetensors" in before
    model.save_pretrained(tmp_path, is_main_process=False)
    assert sorted(tmp_path.rglob("*")) == before


# ---- a repository that version 1 of the format wrote (its code left out): every later version loads it ----


SAMPLE = Path(__file__).parents[1] / "data" / "router_v1"
IDS = torch.tensor(random_prompts((12,)))


def scores_by_hand(model: CiterForCausalLM) -> torch.Tensor:
    """`p_slm` of every position, from the tensors in the file."""
    weights = {key.removeprefix("router."): value for key, value in load_file(SAMPLE / "model.safetensors").items()}
    output = model.slm.model(input_ids=IDS)
    hidden = output.last_hidden_state
    logprobs = model.slm.lm_head(hidden).log_softmax(-1).topk(3, dim=-1).values
    return mlp_score(weights, torch.cat([hidden, logprobs], dim=-1))


@pytest.mark.parametrize("way", [load, AutoModelForCausalLM.from_pretrained])
def test_a_repository_of_the_first_version_loads(way):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = way(SAMPLE)
    assert model.config.router_threshold == 0.625 and model.config.citer_version == 1
    output = model(input_ids=IDS)
    scores = scores_by_hand(model)
    slm, llm = (part(input_ids=IDS).logits for part in (model.slm, model.llm))
    torch.testing.assert_close(output.router_scores, scores)
    expected = torch.where((scores < 0.625)[..., None], llm, slm)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    assert 0 < int(output.routed_to_llm.sum()) < IDS.numel()


def test_its_weights_tokenizer_and_settings_are_those_of_its_files():
    model = load(SAMPLE)
    for part, file in (("slm", "slm/model.safetensors"), ("llm", "llm/model.safetensors")):
        state = getattr(model, part).state_dict()
        assert all(torch.equal(state[key], value) for key, value in load_file(SAMPLE / file).items())
    assert model.generation_config.max_new_tokens == 6 and model.generation_config.eos_token_id == [2, 5]
    text = pipeline("text-generation", model=str(SAMPLE))("w5 w6 w7", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("w5 w6 w7")


def test_a_repository_of_a_newer_version_loads(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "newer")
    config = json.loads((SAMPLE / "config.json").read_text())
    config |= {"citer_version": 7, "router_schedule": {"kind": "cosine"}, "draft_reference": None}
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "newer" / "schedule.safetensors").write_bytes(b"new")
    newer = load(tmp_path / "newer")
    ours = load(SAMPLE)
    assert torch.equal(newer(input_ids=IDS).logits, ours(input_ids=IDS).logits)
