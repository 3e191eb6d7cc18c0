"""Routers of CITER's and R2R's released code: what becomes of their files, compared with the description of them."""

import json
import math
import os
import pickle
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from citer_hf import CiterForCausalLM
from citer_hf.importers import convert, read_router, threshold_from_divergence
from citer_hf.model.routers import build_router
from citer_hf.runs import file_sha256
from tests.chat_pairs import character_tokenizer, invoke
from tests.conftest import make_pair, random_prompts
from tests.families import tiny_model
from tests.reference import mlp_score

HIDDEN, EMBEDDING, TOP, VOCAB = 32, 24, 20, 61
# Widths of the blocks' inputs, and of the last one's output; what lies between is three times as wide.
WIDTHS = (16, 16, 40, 40)
THRESHOLD = 0.375


def citer_state_dict(hidden: int = HIDDEN) -> dict[str, torch.Tensor]:
    """The layout of CITER's released code, random."""
    generator = torch.Generator().manual_seed(0)
    wide = 2 * hidden
    shapes = {"mlp.0.weight": (wide, hidden), "mlp.4.weight": (hidden, wide), "linear.weight": (1, hidden)}
    shapes |= {"mlp.0.bias": (wide,), "mlp.4.bias": (hidden,), "linear.bias": (1,)}
    shapes |= {f"mlp.1.{name}": (wide,) for name in ("weight", "bias", "running_mean", "running_var")}
    tensors = {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}
    tensors["mlp.1.running_var"].exp_()
    return tensors | {"mlp.1.num_batches_tracked": torch.tensor(7)}


def r2r_state_dict(hidden: int = HIDDEN, embedding: int = HIDDEN) -> dict[str, torch.Tensor]:
    """The layout of R2R's released code, random."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, tuple[int, ...]] = {
        "logits_projection": (hidden, TOP),
        "combined_projection": (WIDTHS[0], 2 * hidden + embedding),
        "backbone.input_projection": (WIDTHS[0], WIDTHS[0]),
        "backbone.output_layer.0": (WIDTHS[-1],),
        "backbone.output_layer.1": (1, WIDTHS[-1]),
    }
    for index, (size, out_size) in enumerate(pairwise(WIDTHS)):
        block = f"backbone.blocks.{index}"
        layers |= {f"{block}.layer_norm": (size,), f"{block}.mlp.0": (3 * size, size)}
        layers |= {f"{block}.mlp.3": (out_size, 3 * size)}
        layers |= {f"{block}.dim_change": (out_size, size)} if size != out_size else {}
    tensors = {}
    for name, shape in layers.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
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
    ours = {"mlp.0": "expand", "mlp.1": "norm", "mlp.4": "contract", "linear": "score"}
    names = {key: key.rpartition(".") for key in tensors}
    return mlp_score({f"{ours[layer]}.{name}": tensors[key] for key, (layer, _, name) in names.items()}, hidden)


def r2r_reference(tensors: Any, hidden: Any, logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
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


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, logits = (torch.randn(*shape, size, generator=generator) for size in (HIDDEN, VOCAB))
    return 2 * hidden, 4 * logits


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def build(content: Any, folder: Path) -> torch.nn.Module:
    """The router of a file, for the SLM that the file is for."""
    spec, weights, _ = read_router(saved(content, folder / "router.pt"))
    router = build_router(spec, spec["hidden_size"])
    router.load_state_dict(weights)
    return router.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name, seed, options in (("slm", 1, {}), ("llm", 2, {"hidden_size": 48, "num_hidden_layers": 3})):
        tiny_model("llama", seed, **options).save_pretrained(root / name)
        character_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module", params=["citer", "r2r"])
def file(request, tmp_path_factory) -> Path:
    """A router file of either kind for the tiny Llama, whose embeddings are as wide as its hidden state."""
    folder = tmp_path_factory.mktemp("file")
    if request.param == "citer":
        return saved(citer_state_dict(), folder / "router.pth")
    return saved(r2r_file(r2r_state_dict()), folder / "router.pt")


@pytest.fixture(scope="module")
def converted(bases: Path, file: Path) -> Path:
    """The router repository that `citer convert` makes of the file."""
    out = file.parent / "router"
    result = invoke("convert", file, "--slm", bases / "slm", "--llm", bases / "llm", "--out", out)
    assert result.exit_code == 0 and f"Router saved in {out}" in result.stdout, result.output
    return out


@pytest.mark.parametrize(("shape", "half"), [((), False), ((2, 3), True)])
def test_citers_router_scores_as_in_the_released_code(tmp_path, shape, half):
    tensors = {key: value.half() if half and value.dim() else value for key, value in citer_state_dict().items()}
    hidden, logits = inputs(*shape)
    expected = citer_reference({key: value.float() for key, value in tensors.items()}, hidden)
    torch.testing.assert_close(build(tensors, tmp_path)(hidden, logits), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r2rs_router_scores_as_in_the_released_code(tmp_path, dtype):
    tensors, table = r2r_state_dict(embedding=EMBEDDING), torch.nn.Embedding(VOCAB, EMBEDDING, dtype=dtype)
    hidden, logits = (value.to(dtype) for value in inputs(2, 3))
    router = build(r2r_file(tensors), tmp_path)
    with pytest.raises(RuntimeError, match=r"call router.bind\(slm\)"):
        router(hidden, logits)
    router.bind(SimpleNamespace(get_input_embeddings=lambda: table))
    divergent = r2r_reference(tensors, hidden.float(), logits.float(), table.weight.float())
    torch.testing.assert_close(router(hidden, logits), 1 - divergent, atol=1e-6, rtol=0)


def test_embeddings_that_a_model_scales_are_read_as_they_are_stored(tmp_path):
    pair = make_pair("gemma3", router=read_router(saved(r2r_file(R2R), tmp_path / "router.pt"))[0])
    tokens = torch.tensor([[3, 7]])
    stored = pair.slm.get_input_embeddings().weight[tokens]
    torch.testing.assert_close(pair.router._embedded(tokens), stored, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.5001, 0.75, 0.99999])
def test_decisions_are_r2rs_but_for_the_last_digit_up_to_one_half(threshold):
    steps = torch.tensor(threshold).view(torch.int32) + torch.arange(-1000, 1000, dtype=torch.int32)
    divergent = steps.view(torch.float32).clamp_max(1)
    ours, theirs = 1 - divergent < threshold_from_divergence(threshold), divergent >= threshold
    assert (divergent == threshold).any() and ours[theirs].all()
    assert (torch.tensor(threshold) - divergent[ours & ~theirs] <= (2**-24 if threshold <= 0.5 else 0)).all()
    for threshold, deferred in ((0.0, [0, 0.5, 1]), (1.0, [1]), (1.5, [])):
        ours = threshold_from_divergence(threshold)
        assert [p for p in (0, 0.5, 1) if bool(1 - torch.tensor(float(p)) < ours)] == deferred


def test_a_converted_router_has_the_weights_of_the_file_and_says_where_it_came_from(converted, file):
    model = CiterForCausalLM.from_pretrained(converted)
    spec, expected, _ = read_router(file)
    assert model.router.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.router.state_dict().items())
    assert model.generate(torch.tensor(random_prompts((9,))), max_new_tokens=2).shape == (1, 11)
    provenance, config = (json.loads((converted / f"{name}.json").read_text()) for name in ("provenance", "config"))
    origin = provenance["converted_from"]
    assert origin["file"] == file.name and len(origin["sha256"]) == 64
    assert provenance["router_sha256"] == file_sha256(converted / "model.safetensors")
    assert config["router"] == spec
    assert config["router_threshold"] == (0.5 if file.suffix == ".pth" else threshold_from_divergence(THRESHOLD))
    assert not (converted / "slm").exists() and (converted / "tokenizer.json").is_file()


def test_an_r2r_router_follows_a_resized_vocabulary_and_is_no_owner_of_the_table(converted, file):
    if file.suffix == ".pth":
        pytest.skip("reads no embeddings")
    model = CiterForCausalLM.from_pretrained(converted)
    assert not any(one is model.slm.get_input_embeddings().weight for one in model.router.parameters())
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    last = torch.tensor([VOCAB + 3])
    assert torch.equal(model.router._embedded(last)[0], model.slm.get_input_embeddings().weight[-1])


def test_a_threshold_that_is_given_counts_and_nothing_is_overwritten(bases, tmp_path):
    path = saved(without(r2r_file(R2R), "common_args"), tmp_path / "router.pt")
    assert read_router(path)[2] == 0.5
    arguments = ("convert", path, "--slm", bases / "slm", "--llm", bases / "llm", "--out", tmp_path / "router")
    assert invoke(*arguments, "--router-threshold", 0.8).exit_code == 0
    assert json.loads((tmp_path / "router" / "config.json").read_text())["router_threshold"] == 0.8
    again = invoke(*arguments, "--router-threshold", 0.7)
    assert again.exit_code == 1 and "exists already" in again.stderr and again.stderr.count("\n") == 1


CITER, R2R = citer_state_dict(), r2r_state_dict()


def without(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (citer_state_dict(hidden=40), "hidden size of 40, got 32"),
        (r2r_file(r2r_state_dict(embedding=EMBEDDING)), "embeddings of 24, got 32"),
        ({"weight": torch.zeros(3, 4), "epoch": 3}, "not those of a released router.*score.weight"),
        ([1, 2], "not those of a released router.*list"),
        (without(CITER, "linear.weight"), "not those of a released router.*score.weight"),
        (without(CITER, "mlp.1.running_var"), "not those of a released router.*Missing .*norm.running_var"),
        (CITER | {"mlp.0.weight": torch.zeros(3, 4)}, "size mismatch for expand.weight"),
        (r2r_file(without(R2R, "backbone.blocks.1.mlp.3.weight")), "not those of a released router.*contract.weight"),
        (r2r_file(R2R | {"token_embeddings.weight": torch.zeros(9, 9)}), "Unexpected .*token_embeddings.weight"),
    ],
)
def test_a_router_that_does_not_fit_is_refused_with_the_reason(bases, tmp_path, content, message):
    path = saved(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=f"(?s)^router: .*{message}"):
        convert(path, bases / "slm", bases / "llm", tmp_path / "router")
    assert not (tmp_path / "router").exists()


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(bases, tmp_path):
    path = saved(CITER | {"mlp.0.bias": Malicious(tmp_path / "ran")}, tmp_path / "file.pth")
    result = invoke("convert", path, "--slm", bases / "slm", "--llm", bases / "llm", "--out", tmp_path / "router")
    assert result.exit_code == 1 and "it refers to code (posix.mkdir)" in result.stderr
    assert result.stderr.startswith("Error: router: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "router").exists()


def test_a_damaged_file_is_said_to_be_damaged(tmp_path):
    path = saved(CITER, tmp_path / "file.pth")
    for content in (path.read_bytes()[:1000], b"", pickle.dumps({"a": 1}, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"it is damaged, or was not written by torch\.save"):
            read_router(path)
