"""Pairs that are quantized, offloaded, copied, or whose LLM is divided among processes."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from citer_hf import CiterForCausalLM
from tests.conftest import make_pair
from tests.launching import TORCHRUN, run
from tests.repositories import save_base_models

TEXT = torch.arange(3, 15)[None]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
QUANTIZATION = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
ON_DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitsandbytes packs 4-bit weights by 32 rows: 2 heads of 16 for keys, at least."""
    root = tmp_path_factory.mktemp("bases")
    save_base_models(root, small=64, large=128)
    return root


def from_pair(bases: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return CiterForCausalLM.from_pair(bases / "slm", bases / "llm", router="linear", **options)


@pytest.mark.parametrize("roles", [("slm",), ("llm",), ("slm", "llm")], ids="+".join)
@pytest.mark.parametrize("kind", QUANTIZATION)
def test_the_ends_of_a_quantized_pair_are_the_quantized_models(bases, tmp_path, kind, roles):
    model = from_pair(bases, **{f"{role}_quantization_config": QUANTIZATION[kind] for role in roles})
    for role, threshold, veto in (("slm", 0.0, 0.3), ("llm", 2.0, 0.0), ("llm", 0.5, 1.0)):
        options = {"quantization_config": QUANTIZATION[kind]} if role in roles else {}
        alone = AutoModelForCausalLM.from_pretrained(bases / role, **options)
        assert bool(getattr(getattr(model, role), "is_quantized", False)) == (role in roles)
        text = model.generate(TEXT, router_threshold=threshold, llm_veto=veto, **GREEDY)
        assert torch.equal(text, alone.generate(TEXT, **GREEDY))
    model.save_pretrained(tmp_path / "router")
    saved = json.loads((tmp_path / "router" / "config.json").read_text())
    for role in ("slm", "llm"):
        assert saved[f"{role}_reference"]["name_or_path"] == str(bases / role)
        assert "quantization_config" not in saved[f"{role}_config"]


@pytest.mark.parametrize(
    ("options", "disk"),
    [
        ({"device_map": "auto", "max_memory": {"cpu": "1GB"}}, False),
        ({"llm_device_map": ON_DISK}, True),
        ({"device_map": "auto", "max_memory": {"cpu": 400_000}}, True),
    ],
    ids=["enough", "layer-on-disk", "little-memory"],
)
def test_a_pair_that_is_placed_writes_the_same(bases, tmp_path, options, disk):
    plain = from_pair(bases)
    model = from_pair(bases, offload_folder=str(tmp_path), **options)
    model.router.load_state_dict(plain.router.state_dict())
    assert ("disk" in map(str, model.hf_device_map.values())) == disk
    for threshold, veto in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.9), (2.0, 0.0)):
        both = [one.generate(TEXT, router_threshold=threshold, llm_veto=veto, **GREEDY) for one in (model, plain)]
        assert torch.equal(*both)


@pytest.mark.parametrize("router", ["mlp", "linear", "r2r", "confidence"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_pair_that_accelerate_offloads_writes_the_same(tmp_path: Path, router: str, offload: str) -> None:
    model = make_pair(router={"type": router})
    texts = torch.cat([TEXT, TEXT + 9])
    expected = [model.generate(text, **GREEDY) for text in (TEXT, texts)]
    model = cpu_offload(model) if offload == "cpu" else disk_offload(model, str(tmp_path))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    for text, one in zip((TEXT, texts), expected, strict=True):
        assert torch.equal(model.generate(text, **GREEDY), one)


def test_a_copy_of_a_router_that_reads_the_slms_embeddings_reads_the_copys() -> None:
    model = make_pair(router={"type": "r2r"}, threshold=0.4)
    hidden, logits = torch.randn(1, 3, 32), torch.randn(1, 3, 61)
    with torch.no_grad():
        expected, replica = model.router(hidden, logits), copy.deepcopy(model)
        replica.slm.get_input_embeddings().weight.normal_()
        assert torch.equal(model.router(hidden, logits), expected)
        assert not torch.equal(replica.router(hidden, logits), expected)


DATA_PARALLEL = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.conftest import make_pair
dist.init_process_group("gloo")
texts = torch.arange(5, 29).reshape(2, 12)
torch.manual_seed(0)
pair = make_pair(router={"type": "mlp", "dropout": 0.0}).train()
replica = DistributedDataParallel(pair)
mine = texts[dist.get_rank()][None]
replica(input_ids=mine, labels=mine).loss.backward()
found = [weight.grad.clone() for weight in pair.router.parameters()]
pair.zero_grad()
pair(input_ids=texts, labels=texts).loss.backward()
for ours, theirs in zip(found, pair.router.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs.grad)
assert all(weight.grad is None for part in (pair.slm, pair.llm) for weight in part.parameters())
print("SAME")
"""


@pytest.mark.slow
def test_a_router_is_trained_by_replicas_as_by_one_model_with_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DATA_PARALLEL)
    assert run(TORCHRUN, script).count("SAME") == 2


DIVIDED = """
import sys, time, torch
from torch import distributed
from transformers.distributed import DistributedConfig
from citer_hf import CiterForCausalLM
from tests.conftest import left_padded, random_prompts
bases, made = sys.argv[1], {}
batch = left_padded(random_prompts((12, 5, 9)))
modes = [{"router_threshold": 0.5, "llm_veto": 0.3}, {"router_threshold": 2.0}, {"num_beams": 2}, {"do_sample": True}]
for name, options in (("whole", {}), ("divided", {"llm_distributed_config": DistributedConfig(**{sys.argv[2]: 2})})):
    model = CiterForCausalLM.from_pair(bases + "/slm", bases + "/llm", router="random", **options)
    # The clocks of both processes differ.
    slm, late = model.run_slm, name == "divided" and distributed.get_rank() == 1
    model.run_slm = lambda *args, **kwargs: (time.sleep(0.02 * late), slm(*args, **kwargs))[1]
    made[name] = []
    for mode in modes:
        torch.manual_seed(0)
        settings = {"max_new_tokens": 16, "pad_token_id": 0, "do_sample": False, **mode}
        settings["return_dict_in_generate"] = True
        out = model.generate(**batch, **settings)
        made[name].append(out.sequences.tolist())
        assert out.past_key_values.routing.llm_share > 0
assert made["whole"] == made["divided"], made
print("SAME")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tp_size", "pp_size"])
def test_an_llm_that_two_processes_share_writes_the_same_on_both(how: str, bases: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed")
    script = tmp_path / "script.py"
    script.write_text(DIVIDED)
    shutil.copytree(bases, tmp_path / "bases")
    # transformers 5.17 divides a head by whole rows only.
    llm = AutoModelForCausalLM.from_pretrained(bases / "llm")
    llm.resize_token_embeddings(64, mean_resizing=False)
    llm.save_pretrained(tmp_path / "bases" / "llm")
    assert run(TORCHRUN, script, tmp_path / "bases", how).count("SAME") == 2
