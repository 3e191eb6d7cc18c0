"""Routers of CITER's and R2R's released code: what becomes of their files, compared with the description of them."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from citer_hf import CiterForCausalLM, importers
from citer_hf.importers import read_router_file, threshold_from_divergence
from citer_hf.model.routers import build_router
from tests.chat_pairs import character_tokenizer, invoke
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import tiny_model
from tests.reference import naive_generate

HIDDEN, EMBEDDING, TOP, VOCAB = 32, 24, 20, 61
# Widths of the blocks' inputs, and of the last one's output; what lies between is three times as wide.
WIDTHS = (16, 16, 40, 40)
THRESHOLD = 0.375


def citer_state_dict(hidden: int = HIDDEN, seed: int = 0) -> dict[str, torch.Tensor]:
    """The layout of CITER's released code, random."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    return {
        "mlp.0.weight": random(2 * hidden, hidden),
        "mlp.0.bias": random(2 * hidden),
        "mlp.1.weight": random(2 * hidden),
        "mlp.1.bias": random(2 * hidden),
        "mlp.1.running_mean": random(2 * hidden),
        "mlp.1.running_var": random(2 * hidden).exp(),
        "mlp.1.num_batches_tracked": torch.tensor(7),
        "mlp.4.weight": random(hidden, 2 * hidden),
        "mlp.4.bias": random(hidden),
        "linear.weight": random(1, hidden),
        "linear.bias": random(1),
    }


def r2r_state_dict(hidden: int = HIDDEN, embedding: int = HIDDEN, seed: int = 0) -> dict[str, torch.Tensor]:
    """The layout of R2R's released code, random."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, size: int, out_size: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(out_size, size, generator=generator) / size**0.5
        tensors[f"{name}.bias"] = torch.randn(out_size, generator=generator)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(size, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(size, generator=generator)

    linear("logits_projection", TOP, hidden)
    linear("combined_projection", 2 * hidden + embedding, WIDTHS[0])
    linear("backbone.input_projection", WIDTHS[0], WIDTHS[0])
    for index, (size, out_size) in enumerate(pairwise(WIDTHS)):
        block = f"backbone.blocks.{index}"
        norm(f"{block}.layer_norm", size)
        linear(f"{block}.mlp.0", size, 3 * size)
        linear(f"{block}.mlp.3", 3 * size, out_size)
        if size != out_size:
            linear(f"{block}.dim_change", size, out_size)
    norm("backbone.output_layer.0", WIDTHS[-1])
    linear("backbone.output_layer.1", WIDTHS[-1], 1)
    return tensors


def r2r_file(tensors: dict[str, torch.Tensor], threshold: Any = THRESHOLD) -> dict[str, Any]:
    return {
        "model_type": "HiddenStatesTokenLMHeadLogitsClassifier",
        # Wrong, as in some published files.
        "init_args": {"hidden_states_size": 9, "logits_size": 9, "hidden_dims": [9], "dtype": torch.float32},
        "common_args": {"threshold": threshold, "input_type": ["hidden_states", "token", "logits"]},
        "model_specific_args": {},
        "state_dict": tensors,
    }


def citer_reference(tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """`p_slm` as CITER's released code computes it in evaluation."""
    x = functional.linear(hidden, tensors["mlp.0.weight"], tensors["mlp.0.bias"])
    x = (x - tensors["mlp.1.running_mean"]) / torch.sqrt(tensors["mlp.1.running_var"] + 1e-5)
    x = torch.relu(x * tensors["mlp.1.weight"] + tensors["mlp.1.bias"])
    x = functional.linear(x, tensors["mlp.4.weight"], tensors["mlp.4.bias"])
    return torch.sigmoid(functional.linear(x, tensors["linear.weight"], tensors["linear.bias"]))[..., 0]


def r2r_reference(
    tensors: dict[str, torch.Tensor], hidden: torch.Tensor, logits: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """P(divergent) as R2R's released code computes it in evaluation."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    ordered = logits.sort(-1, descending=True)
    projected = linear("logits_projection", ordered.values[..., :TOP])
    x = linear("combined_projection", torch.cat([hidden, table[ordered.indices[..., 0]], projected], dim=-1))
    x = linear("backbone.input_projection", x)
    for index in range(len(WIDTHS) - 1):
        block = f"backbone.blocks.{index}"
        y = linear(f"{block}.mlp.0", norm(f"{block}.layer_norm", x))
        y = linear(f"{block}.mlp.3", y * (1 + torch.erf(y / math.sqrt(2))) / 2)
        x = y + (linear(f"{block}.dim_change", x) if f"{block}.dim_change.weight" in tensors else x)
    return torch.sigmoid(linear("backbone.output_layer.1", norm("backbone.output_layer.0", x)))[..., 0]


class Embeddings:
    """As much of an SLM as a router of R2R looks at."""

    def __init__(self, width: int = EMBEDDING):
        torch.manual_seed(5)
        self.table = torch.nn.Embedding(VOCAB, width).requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, logits = (torch.randn(*shape, size, generator=generator) for size in (HIDDEN, VOCAB))
    return 2 * hidden, 4 * logits


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def loaded_router(path: Path) -> Any:
    found = read_router_file(path)
    router = build_router(found.spec, HIDDEN).eval()
    router.load_state_dict(found.weights)
    return router


@pytest.fixture(params=["citer", "r2r"])
def file(request, tmp_path) -> Path:
    """A router file of either kind for the tiny Llama, whose embeddings are as wide as its hidden state."""
    if request.param == "citer":
        return saved(citer_state_dict(), tmp_path / "router.pth")
    return saved(r2r_file(r2r_state_dict()), tmp_path / "router.pt")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name, seed, options in (("slm", 1, {}), ("llm", 2, {"hidden_size": 48, "num_hidden_layers": 3})):
        tiny_model("llama", seed, **options).save_pretrained(root / name)
        character_tokenizer().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_citers_router_scores_as_in_the_released_code(tmp_path, shape):
    tensors = citer_state_dict()
    hidden, logits = inputs(*shape)
    router = loaded_router(saved(tensors, tmp_path / "router.pth"))
    with torch.no_grad():
        torch.testing.assert_close(router(hidden, logits), citer_reference(tensors, hidden), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r2rs_router_scores_as_in_the_released_code(tmp_path, shape, dtype):
    tensors = r2r_state_dict(embedding=EMBEDDING)
    slm = Embeddings()
    slm.table.to(dtype)
    hidden, logits = (value.to(dtype) for value in inputs(*shape))
    router = loaded_router(saved(r2r_file(tensors), tmp_path / "router.pt"))
    router.bind(slm)
    divergent = r2r_reference(tensors, hidden.float(), logits.float(), slm.table.weight.float())
    with torch.no_grad():
        torch.testing.assert_close(router(hidden, logits), 1 - divergent, atol=1e-6, rtol=0)


def test_weights_in_half_precision_are_taken_as_they_are(tmp_path):
    tensors = {key: value.half() if value.dim() else value for key, value in citer_state_dict().items()}
    hidden, logits = inputs(4)
    router = loaded_router(saved(tensors, tmp_path / "router.pth"))
    expected = citer_reference({key: value.float() for key, value in tensors.items()}, hidden)
    torch.testing.assert_close(router(hidden, logits), expected, atol=1e-6, rtol=0)


def test_embeddings_that_a_model_scales_are_read_as_they_are_stored(tmp_path):
    tensors = r2r_state_dict()
    pair = make_pair("gemma3", router=read_router_file(saved(r2r_file(tensors), tmp_path / "router.pt")).spec)
    table = pair.slm.get_input_embeddings().weight
    tokens = torch.tensor([[3, 7]])
    torch.testing.assert_close(pair.router._embedded(tokens), table[tokens], atol=1e-6, rtol=1e-6)


def divergence_of(threshold: torch.Tensor, ulps: int) -> torch.Tensor:
    """The fp32 number so many steps above a threshold."""
    return (threshold.view(torch.int32) + ulps).view(torch.float32)


@pytest.mark.parametrize("threshold", [0.5001, 0.513, 0.6, 0.75, 0.9, 0.99999])
def test_above_one_half_every_decision_is_r2rs(threshold):
    divergent = divergence_of(torch.tensor(threshold), torch.arange(-100, 100, dtype=torch.int32)).clamp_max(1)
    assert (divergent == threshold).any()
    assert torch.equal(1 - divergent < threshold_from_divergence(threshold), divergent >= threshold)


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.25, 0.3, 0.4999, 0.5])
def test_up_to_one_half_only_the_last_digit_can_defer_more_than_r2r(threshold):
    divergent = divergence_of(torch.tensor(threshold), torch.arange(-1000, 1000, dtype=torch.int32))
    ours, theirs = 1 - divergent < threshold_from_divergence(threshold), divergent >= threshold
    assert (divergent == threshold).any() and ours[theirs].all()
    assert (torch.tensor(threshold) - divergent[ours & ~theirs] <= 2**-24).all()


@pytest.mark.parametrize(("threshold", "deferred"), [(0.0, [0, 0.5, 1]), (1.0, [1]), (1.5, [])])
def test_the_ends_of_r2rs_thresholds(threshold, deferred):
    ours = threshold_from_divergence(threshold)
    assert [p for p in (0, 0.5, 1) if bool(1 - torch.tensor(float(p)) < ours)] == deferred


@pytest.mark.parametrize("above", [False, True])
def test_a_pair_defers_at_r2rs_threshold_and_not_below(bases, tmp_path, above):
    tensors = r2r_state_dict()
    tensors["backbone.output_layer.1.weight"].zero_()
    divergent = torch.sigmoid(tensors["backbone.output_layer.1.bias"].fill_(0.7))
    threshold = float(divergence_of(divergent, int(above)))
    path = saved(r2r_file(tensors, threshold), tmp_path / "router.pt")
    pair = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=path)
    output = pair(input_ids=torch.tensor(random_prompts((6,))))
    assert output.routed_to_llm.all() if not above else not output.routed_to_llm.any()


def test_a_pair_takes_the_threshold_that_is_given(bases, file):
    def threshold(**options: Any) -> float:
        return CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=file, **options).config.router_threshold

    own = threshold_from_divergence(THRESHOLD) if file.suffix == ".pt" else 0.5
    assert (threshold(), threshold(router_threshold=0.8)) == (own, 0.8)


def test_a_pair_with_such_a_router_generates_as_the_method_says(bases, file):
    model = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=str(file))
    prompts = random_prompts()
    scores = torch.cat([model(input_ids=torch.tensor([row])).router_scores[0] for row in prompts])
    threshold = float(scores.detach().median()) + 1e-4
    options = {"max_new_tokens": 12, "do_sample": False, "router_threshold": threshold}
    out = model.generate(**left_padded(prompts), **options, return_dict_in_generate=True)
    assert 0 < out.past_key_values.routing.llm_share < 1
    width = max(map(len, prompts))
    for index, row in enumerate(prompts):
        tokens, to_llm, *_ = naive_generate(model, row, 12, threshold)
        assert out.sequences[index, width : width + len(tokens)].tolist() == tokens
        assert out.past_key_values.routing.to_llm[index, : len(to_llm)].tolist() == to_llm
        alone = model.generate(input_ids=torch.tensor([row]), **options)
        assert alone[0, len(row) :].tolist() == tokens


def test_what_is_loaded_is_what_was_imported(bases, file, tmp_path):
    model = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=file)
    model.save_pretrained(tmp_path / "router")
    loaded = CiterForCausalLM.from_pretrained(tmp_path / "router")
    text = torch.tensor(random_prompts((9,)))
    assert torch.equal(loaded(input_ids=text).router_scores, model(input_ids=text).router_scores)
    assert loaded.config.router == model.config.router
    assert loaded.config.router_threshold == model.config.router_threshold
    again = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=tmp_path / "router")
    assert torch.equal(again(input_ids=text).router_scores, model(input_ids=text).router_scores)


def test_the_slm_is_no_part_of_a_router_that_reads_its_embeddings(bases, tmp_path):
    path = saved(r2r_file(r2r_state_dict()), tmp_path / "router.pt")
    model = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=path)
    assert model.router.state_dict().keys() == read_router_file(path).weights.keys()
    table = model.slm.get_input_embeddings().weight
    assert not any(parameter is table for parameter in model.router.parameters())


def test_a_resized_vocabulary_is_looked_up_in_the_new_table(bases, tmp_path):
    path = saved(r2r_file(r2r_state_dict()), tmp_path / "router.pt")
    model = CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=path)
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    last = torch.tensor([VOCAB + 3])
    assert torch.equal(model.router._embedded(last)[0], model.slm.get_input_embeddings().weight[-1])


def test_an_unbound_router_says_what_it_lacks(tmp_path):
    router = loaded_router(saved(r2r_file(r2r_state_dict()), tmp_path / "router.pt"))
    with pytest.raises(RuntimeError, match=r"call router.bind\(slm\)"):
        router(*inputs(2))


def test_a_router_for_another_slm_is_refused_with_both_sizes(bases, tmp_path):
    for content in (citer_state_dict(hidden=40), r2r_file(r2r_state_dict(hidden=40))):
        path = saved(content, tmp_path / "router.pt")
        with pytest.raises(ValueError, match="hidden size of 40, but this SLM's is 32"):
            CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=path)
    path = saved(r2r_file(r2r_state_dict(embedding=EMBEDDING)), tmp_path / "router.pt")
    with pytest.raises(ValueError, match="embeddings of 24, but this SLM's have 32"):
        CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"weight": torch.zeros(3, 4), "epoch": 3}, r"a dictionary with weight \[3, 4\], epoch int"),
        ({str(index): index for index in range(11)}, "7 int and 3 more"),
        ({}, "an empty dictionary"),
        ([1, 2], "a list"),
        (torch.zeros(2, 5), r"one tensor \[2, 5\]"),
        ({"model_type": "x", "state_dict": torch.zeros(2)}, r"state_dict \[2\]"),
        ({3: torch.zeros(2)}, r"a dictionary with 3 \[2\]"),
    ],
)
def test_a_file_that_is_neither_is_refused_with_what_was_found(tmp_path, content, found):
    with pytest.raises(ValueError, match=f"neither a router of CITER's.*{found}"):
        read_router_file(saved(content, tmp_path / "file.pt"))


def without(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name != key}


CITER, R2R = citer_state_dict(), r2r_state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(CITER, "linear.weight"), "linear.weight is missing.*holds a dictionary with mlp.0.weight"),
        (without(CITER, "mlp.1.running_var"), r"missing \['mlp.1.running_var'\]"),
        (CITER | {"mlp.7.weight": torch.zeros(3)}, r"unknown \['mlp.7.weight'\]"),
        (CITER | {"mlp.0.weight": torch.zeros(3, 4)}, r"mlp.0.weight is to have the shape \[64, 32\].*\[3, 4\]"),
        (CITER | {"mlp.0.bias": 3}, r"mlp.0.bias is to have the shape \[64\].*mlp.0.bias int"),
        (CITER | {"linear.weight": torch.zeros(4)}, r"linear.weight is to be a matrix.*\[4\]"),
        (CITER | {"linear.bias": torch.zeros(1, dtype=torch.int64)}, "linear.bias is to hold floating-point numbers"),
        (CITER | {"mlp.0.bias": torch.zeros(1).expand(64)}, "mlp.0.bias claims the shape"),
        (CITER | {"mlp.0.bias": torch.zeros(64, device="meta")}, "mlp.0.bias claims the shape"),
        (CITER | {"linear.weight": torch.zeros(1, 1).expand(1, 10**12)}, r"mlp.0.weight is to have the shape"),
        (r2r_file(without(R2R, "logits_projection.weight")), "logits_projection.weight is missing"),
        (r2r_file(without(R2R, "backbone.blocks.1.mlp.3.weight")), "backbone.blocks.1.mlp.3.weight is missing"),
        (r2r_file(without(R2R, "backbone.blocks.1.dim_change.bias")), r"missing \['backbone.blocks.1.dim_change.bias"),
        (r2r_file({k: v for k, v in R2R.items() if "blocks" not in k}), "blocks.0.mlp.0.weight is missing"),
        (r2r_file(R2R | {"token_embeddings.weight": torch.zeros(9, 9)}), r"unknown \['token_embeddings.weight'\]"),
        (
            r2r_file(R2R | {"combined_projection.weight": torch.zeros(16, 64)}),
            r"\[16, 64\].*more than 64 columns",
        ),
        (r2r_file(R2R | {"backbone.output_layer.1.weight": torch.zeros(3, 40)}), r"shape \[1, 40\].*\[3, 40\]"),
        (
            r2r_file(R2R | {"backbone.blocks.1.mlp.0.weight": torch.zeros(9, 17)}),
            r"1.mlp.0.* \[9, 16\].*\[9, 17\]",
        ),
        (r2r_file(R2R, None), "common_args.threshold: expected a number, got None"),
        (r2r_file(R2R, math.nan), "common_args.threshold: expected a number, got nan"),
        (without(r2r_file(R2R), "common_args"), "common_args.threshold: expected a number, got None"),
    ],
)
def test_a_damaged_router_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_router_file(saved(content, tmp_path / "file.pt"))


def test_a_file_without_a_threshold_can_be_given_one(tmp_path):
    assert read_router_file(saved(r2r_file(R2R, None), tmp_path / "file.pt"), 0.7).threshold == 0.7


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    path = saved(CITER | {"mlp.0.bias": Malicious(tmp_path / "ran")}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"refers to posix\.mkdir\. Loading that could run code"):
        read_router_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "pickle", "zip", "legacy cut"])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path, kind):
    path = saved(CITER, tmp_path / "file.pth")
    if kind == "legacy cut":
        torch.save(CITER, path, _use_new_zipfile_serialization=False)
    half = path.read_bytes()[: path.stat().st_size // 2]
    other = {"empty": b"", "text": b"not a router\n", "pickle": pickle.dumps({"a": 1}, protocol=2)}
    path.write_bytes(other.get(kind, half))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/file", "text")
    with pytest.raises(OSError, match=r"cannot be read.*damaged, cut short"):
        read_router_file(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_too_large_is_not_loaded(tmp_path, monkeypatch, compressed):
    path = saved({"mlp.0.weight": torch.zeros(1000, 1000)}, tmp_path / "file.pth")
    if compressed:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        assert path.stat().st_size < 10**5
    monkeypatch.setattr(importers, "MAX_BYTES", 10**6)
    with pytest.raises(OSError, match="no router is larger than"):
        read_router_file(path)


def test_a_file_that_is_not_there_is_said_to_be_missing(bases, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing.pt"):
        CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=tmp_path / "nothing.pt")


def test_citer_convert_writes_what_from_pair_would_save(bases, file, tmp_path):
    out = tmp_path / "router"
    result = invoke("convert", file, "--slm", bases / "slm", "--llm", bases / "llm", "--out", out)
    assert result.exit_code == 0 and f"Router saved in {out}" in result.stdout
    CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=file).save_pretrained(tmp_path / "other")
    names = {path.name for path in (tmp_path / "other").iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"provenance.json"}
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name
    origin = json.loads((out / "provenance.json").read_text())["converted_from"]
    assert origin["file"] == file.name and len(origin["sha256"]) == 64


def test_citer_convert_takes_a_threshold_and_overwrites_nothing(bases, file, tmp_path):
    arguments = ("convert", file, "--slm", bases / "slm", "--llm", bases / "llm", "--out", tmp_path / "router")
    assert invoke(*arguments, "--router-threshold", 0.8).exit_code == 0
    assert CiterForCausalLM.from_pretrained(tmp_path / "router").config.router_threshold == 0.8
    again = invoke(*arguments)
    assert again.exit_code == 1 and "exists already" in again.stderr and again.stderr.count("\n") == 1


def test_citer_convert_says_in_one_line_what_is_wrong(bases, tmp_path):
    path = saved([1, 2], tmp_path / "list.pt")
    result = invoke("convert", path, "--slm", bases / "slm", "--llm", bases / "llm", "--out", tmp_path / "router")
    assert result.exit_code == 1 and result.stderr.startswith("Error: router: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "router").exists()


def test_without_the_package_a_router_file_is_not_taken_for_a_repository(bases, file, monkeypatch):
    monkeypatch.setattr("citer_hf.model.saved_router.read_router_file", None)
    with pytest.raises(ValueError, match="takes the whole package"):
        CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router=file)
