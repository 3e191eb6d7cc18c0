"""What a text costs, held against what torch counts and what lies in memory while it is decoded alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from citer_hf import CiterCache
from citer_hf.bench.costs import cost_of_model
from citer_hf.evaluation.costs import ModelPasses, PairCosts, scoring_cost
from citer_hf.evaluation.decoding import decode
from citer_hf.model.routers import EntropyRouter, LinearRouter, MlpRouter
from tests.conftest import make_pair, random_prompts
from tests.families import tiny_model

# Different numbers of layers, widths, heads, and keys and values per head group.
PAIRS = {
    "llama and qwen3": {"slm": "llama", "llm": "qwen3", "hidden_size": 64, "num_hidden_layers": 3},
    "gpt2 and mixtral": {"slm": "gpt2", "llm": "mixtral", "num_key_value_heads": 1},
}
PROMPT = random_prompts((9,))[0]
NEW = 12


def pair_of(name: str, router: Any = "mlp") -> Any:
    torch.manual_seed(0)
    pair = make_pair(**PAIRS[name], router=router)
    for part in (pair.slm, pair.llm):
        part.set_attn_implementation("eager")
        part.generation_config.eos_token_id = None
    pair.generation_config.eos_token_id = None
    if hasattr(pair.llm, "set_experts_implementation"):
        pair.llm.set_experts_implementation("eager")
    return pair


def decode_alone(pair: Any, **options: Any) -> tuple[list[bool], float]:
    """Decode one row; return who wrote each token, and the operations that torch counted."""
    with FlopCounterMode(display=False) as counter:
        decoded = decode(pair, [PROMPT], max_new_tokens=NEW, **options)
    return decoded.to_llm[0], float(counter.get_total_flops())


def middle_threshold(pair: Any) -> float:
    scores = decode(pair, [PROMPT], router_threshold=0.5, max_new_tokens=NEW).scores[0]
    return sorted(scores)[NEW // 2]


@pytest.mark.parametrize("name", PAIRS)
def test_operations_of_a_routed_text_are_those_that_torch_counts(name: str):
    pair = pair_of(name)
    to_llm, counted = decode_alone(pair, router_threshold=middle_threshold(pair))
    assert 0 < sum(to_llm) < NEW
    cost = PairCosts(pair).routed(scoring_cost(pair.router), len(PROMPT), to_llm)
    # torch counts rotary embedding too, and no product of a vector.
    assert cost.flops == pytest.approx(counted, rel=0.01)
    assert cost.llm_passes == sum(to_llm)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("alone", ["slm", "llm"])
def test_operations_of_a_model_alone_are_those_that_torch_counts(name: str, alone: Any):
    pair = pair_of(name)
    to_llm, counted = decode_alone(pair, alone=alone)
    cost = PairCosts(pair).alone(alone == "llm", len(PROMPT), NEW)
    assert cost.flops == pytest.approx(counted, rel=0.01)
    assert cost.llm_passes == sum(to_llm)


class BytesMoved:
    """Adds up, at every pass of both models and of the router, the sizes of the tensors that it reads and writes."""

    def __init__(self, pair: Any):
        self.total = 0
        for part in (pair.slm, pair.llm):
            tables = {id(one.weight) for one in part.modules() if isinstance(one, nn.Embedding)}
            tables.discard(id(part.get_output_embeddings().weight))
            size = sum(weight.nbytes for weight in part.parameters() if id(weight) not in tables)
            part.register_forward_pre_hook(self._before(size), with_kwargs=True)
            part.register_forward_hook(self._after, with_kwargs=True)
        weights = list(pair.router.parameters())
        pair.router.register_forward_hook(lambda *_: self._add(sum(weight.nbytes for weight in weights)))

    def _add(self, size: int) -> None:
        self.total += size

    def _before(self, weights: int) -> Any:
        def hook(part: Any, args: Any, kwargs: Any) -> None:
            # Keys and values that are there are read; what has come after the pass was written.
            self._held = cache_bytes(kwargs["past_key_values"])
            self._add(weights + self._held)

        return hook

    def _after(self, part: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._add(cache_bytes(kwargs["past_key_values"]) - self._held)


def cache_bytes(cache: Any) -> int:
    held = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(keys.nbytes + values.nbytes for keys, values in held)


@pytest.mark.parametrize("slm", ["llama", "gpt2"])
def test_bytes_of_a_routed_text_are_the_tensors_that_are_read_and_written(slm: str):
    torch.manual_seed(0)
    pair = make_pair(slm, "qwen3", router="mlp", hidden_size=64, num_hidden_layers=3, num_key_value_heads=1)
    threshold = middle_threshold(pair)
    moved = BytesMoved(pair)
    cache = CiterCache(pair.config)
    pair.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, past_key_values=cache, router_threshold=threshold
    )
    to_llm = cache.routing.to_llm[0].tolist()
    assert 0 < sum(to_llm) < len(to_llm)
    assert PairCosts(pair).routed(scoring_cost(pair.router), len(PROMPT), to_llm).bytes == moved.total


def test_a_long_catch_up_visits_more_experts():
    passes = ModelPasses(cost_of_model(tiny_model("mixtral")), is_llm=True)
    weights = [passes.one_pass(tokens, 0).bytes - passes.cost.kv_bytes_per_token * tokens for tokens in (1, 4)]
    assert weights[1] > weights[0]


def test_a_prompt_that_goes_to_the_llm_is_read_by_both(pair: Any):
    costs, scoring = PairCosts(pair), scoring_cost(LinearRouter(32))
    by_slm = costs.routed_by_query(scoring, 9, 5, by_llm=False)
    assert by_slm == costs.alone(False, 9, 5) + scoring
    by_llm = costs.routed_by_query(scoring, 9, 5, by_llm=True)
    assert by_llm.bytes == costs.alone(True, 9, 5).bytes + scoring.bytes + costs.slm.one_pass(9, 0).bytes
    assert by_llm.llm_passes == 5


def test_the_weights_of_a_router_count():
    assert scoring_cost(EntropyRouter(32)).bytes == 0
    assert scoring_cost(LinearRouter(32)).bytes == 33 * 4
    for batch_norm, norm in ((False, 0), (True, 64 + 64)):
        weights = 32 * 64 + 64 + norm + 64 * 32 + 32 + 32 + 1
        cost = scoring_cost(MlpRouter(32, batch_norm=batch_norm))
        assert (cost.bytes, cost.flops) == (weights * 4, weights * 2)
    with_table = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 1))
    assert scoring_cost(with_table).bytes == 33 * 4
