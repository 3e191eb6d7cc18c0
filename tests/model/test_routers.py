"""The routers: scores in [0, 1], equal to the published formulas."""

import copy

import numpy as np
import pytest
import torch

from citer_hf.model.routers import ROUTERS, MlpRouter, build_router
from tests.families import tiny_model
from tests.reference import mlp_score

HIDDEN, VOCAB = 16, 61


def states(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=generator), 4 * torch.randn(*shape, VOCAB, generator=generator)


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_score_is_a_probability_for_every_position(kind, shape, dtype):
    hidden, logits = states(*shape)
    router = build_router({"type": kind}, HIDDEN).eval()
    if kind == "r2r":
        router.bind(tiny_model("llama", hidden_size=HIDDEN))
    with torch.no_grad():
        scores = router(hidden.to(dtype), logits.to(dtype))
    assert scores.shape == shape and scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all()


def test_confidence_and_entropy_are_those_of_the_distribution_and_impossible_tokens_do_not_spoil_them():
    hidden, logits = states(3)
    logits[:, 5:] = -torch.inf
    logits[1] = 0.0
    logits[2, 3] = 100.0
    confidence, entropy = (build_router({"type": kind}, HIDDEN)(hidden, logits) for kind in ("confidence", "entropy"))
    torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))
    torch.testing.assert_close(entropy[1:], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert 0 < entropy[0] < 1


def test_a_linear_router_is_a_linear_layer_and_a_sigmoid():
    router = build_router({"type": "linear"}, HIDDEN)
    hidden, logits = states(4)
    expected = torch.sigmoid(hidden @ router.score.weight[0] + router.score.bias)
    torch.testing.assert_close(router(hidden, logits), expected)


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def mlp(request) -> MlpRouter:
    torch.manual_seed(0)
    router = MlpRouter(HIDDEN, batch_norm=request.param).train()
    for _ in range(5):
        router(3 * torch.randn(32, HIDDEN) + 1, torch.zeros(32, VOCAB))
    return router.eval()


def to_average(router: MlpRouter) -> None:
    average = torch.optim.swa_utils.AveragedModel(router, use_buffers=True)
    average.update_parameters(MlpRouter(HIDDEN, batch_norm=router.norm is not None))
    for own, averaged in zip(router.parameters(), average.module.parameters(), strict=True):
        own.data = averaged.data


CHANGES = {
    "in place": lambda router: router.score.weight.mul_(-1.5),
    "data": lambda router: router.score.weight.data.mul_(-1.5),
    "other data": lambda router: setattr(router.score.weight, "data", -1.5 * router.score.weight),
    "numpy": lambda router: np.negative(router.contract.weight.numpy(), out=router.contract.weight.numpy()),
    "average": to_average,
    "load": lambda router: router.load_state_dict(MlpRouter(HIDDEN, batch_norm=router.norm is not None).state_dict()),
    "cast": lambda router: router.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_mlp_scores_are_those_of_citers_released_code_however_the_weights_are_changed(mlp, change):
    hidden, logits = states(4)
    with torch.no_grad():
        before, replica = mlp(hidden, logits), copy.deepcopy(mlp)
        CHANGES[change](replica)
        after = replica(hidden, logits)
        expected = mlp_score(replica.state_dict(), hidden.to(after.dtype))
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
        assert change == "cast" or not torch.allclose(after, before)
        assert torch.equal(mlp(hidden, logits), before)
        torch.testing.assert_close(before, mlp_score(mlp.state_dict(), hidden), atol=1e-6, rtol=1e-5)


def test_top_logprobs_are_what_the_first_layer_reads_beside_the_state():
    router = MlpRouter(6, top_logprobs=4).eval()
    hidden, logits = torch.randn(3, 6), 4 * torch.randn(3, 11)
    largest = logits.log_softmax(-1).sort(descending=True).values[:, :4].clamp_min(-15)
    expected = mlp_score(router.state_dict(), torch.cat([hidden, largest], dim=1))
    with torch.no_grad():
        assert torch.allclose(router(hidden, logits), expected, atol=1e-6)
        assert router(hidden, logits[:, :2]).shape == (3,)
    assert torch.allclose(router(hidden, logits), expected, atol=1e-6)


def test_a_random_router_spreads_evenly_and_draws_nothing():
    hidden, logits = states(20000)
    router = build_router({"type": "random"}, HIDDEN)
    state = torch.get_rng_state()
    scores = router(hidden, logits)
    assert torch.equal(state, torch.get_rng_state())
    for threshold in (0.1, 0.3, 0.5, 0.9):
        assert abs(float((scores < threshold).float().mean()) - threshold) < 0.02
    other = build_router({"type": "random", "seed": 1}, HIDDEN)(hidden, logits)
    assert abs(float(torch.corrcoef(torch.stack([scores, other]))[0, 1])) < 0.05
