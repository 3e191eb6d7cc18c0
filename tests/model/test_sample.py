"""A repository that version 1 of the format wrote: every later version loads it, and never writes it anew.

`python -m tests.model.test_sample` wrote it; the code of the core was left out.
"""

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

SAMPLE = Path(__file__).parents[1] / "data" / "router_v1"
SPEC = {"type": "mlp", "batch_norm": True, "top_logprobs": 3}
TEXT = torch.tensor(random_prompts((12,)))


def write_sample() -> None:
    from tests.repositories import save_base_models

    work = SAMPLE.parent / "work"
    save_base_models(work, small=8, large=16)
    torch.manual_seed(0)
    pair = CiterForCausalLM.from_pair(work / "slm", work / "llm", router=SPEC, router_threshold=0.625)
    for name, tensor in pair.router.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.0) if "var" in name else tensor.uniform_(-0.4, 0.4)
    with torch.no_grad():
        # Scores that differ, half of them on either side of 0.5.
        pair.router.score.weight *= 10
        pair.router.score.bias -= torch.logit(pair(input_ids=TEXT).router_scores).median()
    pair.save_pretrained(SAMPLE, save_base_models=True)
    for file in SAMPLE.glob("*.py"):
        file.unlink()
    shutil.rmtree(work)


def scores_by_hand(model: CiterForCausalLM) -> torch.Tensor:
    """`p_slm` of every position, from the tensors in the file."""
    weights = {key.removeprefix("router."): value for key, value in load_file(SAMPLE / "model.safetensors").items()}
    with torch.no_grad():
        output = model.slm.model(input_ids=TEXT)
        hidden = output.last_hidden_state
        logprobs = model.slm.lm_head(hidden).log_softmax(-1).topk(3, dim=-1).values
    inputs = torch.cat([hidden, logprobs], dim=-1)
    expanded = inputs @ weights["expand.weight"].T + weights["expand.bias"]
    spread = (weights["norm.running_var"] + 1e-5).sqrt()
    normed = (expanded - weights["norm.running_mean"]) / spread * weights["norm.weight"] + weights["norm.bias"]
    contracted = normed.relu() @ weights["contract.weight"].T + weights["contract.bias"]
    return torch.sigmoid(contracted @ weights["score.weight"].T + weights["score.bias"])[..., 0]


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


def test_a_repository_of_a_newer_version_loads_with_one_warning(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "newer")
    config = json.loads((SAMPLE / "config.json").read_text())
    config |= {"citer_version": 7, "router_schedule": {"kind": "cosine"}, "draft_reference": None}
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "newer" / "schedule.safetensors").write_bytes(b"new")
    with pytest.warns(UserWarning, match=r"'draft_reference', 'router_schedule'.*newer citer_hf") as caught:
        newer = CiterForCausalLM.from_pretrained(tmp_path / "newer")
    assert len(caught) == 1
    ours = CiterForCausalLM.from_pretrained(SAMPLE)
    assert torch.equal(newer(input_ids=TEXT).logits, ours(input_ids=TEXT).logits)


if __name__ == "__main__":
    write_sample()
