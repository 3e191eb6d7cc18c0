"""Linear layers over two to four tokens are computed the other way round on a CPU, with the same results."""

from __future__ import annotations

import pytest
import torch

from citer_hf.model.small_products import WeightsFirst, weights_first
from tests.conftest import make_pair, random_prompts
from tests.families import tiny_model

WIDE = {"hidden_size": 256, "head_dim": 64}


@pytest.fixture(autouse=True)
def cpu_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("citer_hf.model.small_products.is_made_by_amd", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (3, 1), (2, 2), (1, 1), (1, 5)])
def test_the_product_is_the_same_up_to_rounding(shape, bias):
    layer = torch.nn.Linear(300, 70, bias=bias)
    inputs = torch.randn(*shape, 300)
    with torch.no_grad():
        expected = layer(inputs)
        with WeightsFirst():
            torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "options", "dtype", "expected"),
    [
        (1, WIDE, torch.float32, False),
        (2, WIDE, torch.float32, True),
        (4, WIDE, torch.float32, True),
        (5, WIDE, torch.float32, False),
        (3, WIDE, torch.bfloat16, False),
        (3, {}, torch.float32, False),
    ],
)
def test_only_wide_fp32_models_read_few_tokens_so(tokens, options, dtype, expected):
    model = tiny_model("llama", **options).to(dtype)
    assert isinstance(weights_first(model, tokens), WeightsFirst) == expected


def test_only_cpus_that_gain_read_few_tokens_so(monkeypatch):
    monkeypatch.setattr("citer_hf.model.small_products.is_made_by_amd", lambda: False)
    assert not isinstance(weights_first(tiny_model("llama", **WIDE), 3), WeightsFirst)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_forward_pass_gives_the_same_logits(family):
    model = tiny_model(family)
    text = torch.tensor(random_prompts((3,)))
    with torch.no_grad():
        expected = model(text).logits
        with WeightsFirst():
            torch.testing.assert_close(model(text).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_text_is_the_same(monkeypatch):
    model = make_pair(**WIDE)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = torch.tensor(random_prompts((6,)))
    ours = model.generate(prompts, **settings)
    monkeypatch.setattr("citer_hf.model.small_products.NARROWEST", 10**9)
    assert torch.equal(ours, model.generate(prompts, **settings))
