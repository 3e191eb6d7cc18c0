"""Out of memory inside `generate` and `forward`: the error keeps its type, names the model and what helps."""

from typing import Any

import pytest
import torch

from citer_hf import CiterForCausalLM
from tests.conftest import left_padded, make_pair, random_prompts
from tests.repositories import save_base_models

ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    "cpu on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    "python": MemoryError(),
    "system": OSError(12, "Cannot allocate memory"),
}


def failing_at(model: Any, call: int, error: Exception) -> None:
    """Let a model's forward pass of this number fail, after its first layer."""
    calls, layer = [], model.base_model.layers[0]
    forward = layer.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise error
        return output

    layer.forward = fail


@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
@pytest.mark.parametrize(("role", "call"), [("slm", 1), ("slm", 4), ("llm", 1)])
def test_out_of_memory_keeps_its_type_and_names_the_model_and_two_settings(error: Exception, role: str, call: int):
    pair = make_pair()
    failing_at(getattr(pair, role), call, error)
    with pytest.raises(type(error)) as caught:
        pair.generate(**left_padded(random_prompts((5, 9, 12))), max_new_tokens=20, do_sample=False, eos_token_id=None)
    message = str(caught.value)
    assert type(caught.value) is type(error) and caught.value.__cause__ is error
    assert message.startswith(f"{role.upper()}: out of memory") and str(error) in message
    assert f"{role}_quantization_config" in message and "prefill_chunk_size" in message


def test_out_of_memory_while_a_model_is_loaded_names_the_model(tmp_path, monkeypatch):
    save_base_models(tmp_path)
    error = ERRORS["accelerator"]

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("citer_hf.model.references.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"^SLM: out of memory.*slm_quantization_config"):
        CiterForCausalLM.from_pair(tmp_path / "slm", tmp_path / "llm", router="random")


def test_another_error_is_left_as_it_is() -> None:
    pair, error = make_pair(threshold=2.0), RuntimeError("shapes do not match")
    failing_at(pair.llm, 1, error)
    with torch.no_grad(), pytest.raises(RuntimeError) as caught:
        pair(torch.tensor(random_prompts((6,))), use_cache=False)
    assert caught.value is error
