"""A repository that version 1 of the format wrote (its code left out): every later version loads it."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from citer_hf import CiterForCausalLM
from tests.conftest import random_prompts
from tests.reference import mlp_score

SAMPLE = Path(__file__).parents[1] / "data" / "router_v1"
TEXT = torch.tensor(random_prompts((12,)))


def scores_by_hand(model: CiterForCausalLM) -> torch.Tensor:
    """`p_slm` of every position, from the tensors in the file."""
    weights = {key.removeprefix("router."): value for key, value in load_file(SAMPLE / "model.safetensors").items()}
    with torch.no_grad():
        output = model.slm.model(input_ids=TEXT)
        hidden = output.last_hidden_state
        logprobs = model.slm.lm_head(hidden).log_softmax(-1).topk(3, dim=-1).values
    return mlp_score(weights, torch.cat([hidden, logprobs], dim=-1))


@pytest.mark.parametrize("load", [CiterForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_repository_of_the_first_version_loads(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(SAMPLE)
    assert model.config.router_threshold == 0.625 and model.config.citer_version == 1
    with torch.no_grad():
        output = model(input_ids=TEXT)
        scores = scores_by_hand(model)
        slm, llm = (part(input_ids=TEXT).logits for part in (model.slm, model.llm))
    torch.testing.assert_close(output.router_scores, scores)
    expected = torch.where((scores < 0.625)[..., None], llm, slm)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    assert 0 < int(output.routed_to_llm.sum()) < TEXT.numel()


def test_its_weights_tokenizer_and_settings_are_those_of_its_files():
    model = CiterForCausalLM.from_pretrained(SAMPLE)
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
    newer = CiterForCausalLM.from_pretrained(tmp_path / "newer")
    ours = CiterForCausalLM.from_pretrained(SAMPLE)
    assert torch.equal(newer(input_ids=TEXT).logits, ours(input_ids=TEXT).logits)
