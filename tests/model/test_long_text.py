"""Nothing in a step but attention grows with the text, and no memory with the number of texts."""

import gc
import os
import time
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from citer_hf.model.slots import Masks
from tests.conftest import left_padded, make_pair, random_prompts

SETTLED = range(12, 36)
INDEXED = ("aten::gather", "aten::scatter_")


class Work(TorchDispatchMode):
    """Counts the elements that operations read and write, except within attention; views touch none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.counts = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [one for one in tree_leaves(of) if isinstance(one, torch.Tensor)] for of in ((args, kwargs), output)
        )
        if self.counts and func.name().startswith(INDEXED):
            self.elements += sum(one.numel() for one in inputs[1:])
        elif self.counts and (func._schema.is_mutable or not shared(inputs, outputs)):
            self.elements += sum(one.numel() for one in inputs + outputs)
        return output

    def without(self, function: Any) -> Any:
        """Return a function that is not counted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            before, self.counts = self.counts, False
            try:
                return function(*args, **kwargs)
            finally:
                self.counts = before

        return uncounted


def shared(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    storages = {one.untyped_storage().data_ptr() for one in inputs}
    return any(one.untyped_storage().data_ptr() in storages for one in outputs)


class EveryThird(nn.Module):
    """Sends every third token of all rows to the LLM, and counts the work of the tokens in `SETTLED`."""

    def __init__(self, work: Work):
        super().__init__()
        self.work, self.calls = work, 0

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.work.counts = self.calls in SETTLED
        return torch.full(hidden.shape[:-1], float(self.calls % 3 > 0))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_touches_as_much_after_a_long_text_as_after_a_short_one(rows, monkeypatch):
    touched = []
    for length in (40, 400):
        work = Work()
        model = make_pair(router=EveryThird(work), hidden_size=48)
        with monkeypatch.context() as patch:
            patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", work.without(sdpa_attention_forward))
            patch.setattr(modeling_llama, "create_causal_mask", work.without(modeling_llama.create_causal_mask))
            patch.setattr(Masks, "__call__", work.without(Masks.__call__))
            with work:
                prompt = torch.tensor(random_prompts((length,) * rows))
                wanted = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                model.generate(prompt, **wanted, max_drafts=0)
        touched.append(work.elements)
    assert touched[0] == touched[1] > 0


SEGMENTS = 12


@pytest.mark.slow
def test_memory_does_not_grow():
    """Runs for `CITER_SOAK_SECONDS` of processor time."""
    model = make_pair(hidden_size=48)
    process = psutil.Process()
    # The first segment warms up.
    segment = float(os.environ.get("CITER_SOAK_SECONDS", "24")) / (SEGMENTS + 1)

    def write() -> int:
        """Return the memory of the process after one segment."""
        texts, began = 0, time.process_time()
        while time.process_time() - began < segment:
            for lengths in ((9,), (3, 12, 7, 5)):
                batch = left_padded(random_prompts(lengths, seed=texts))
                model.generate(**batch, max_new_tokens=60, do_sample=True, eos_token_id=None)
            texts += 1
        gc.collect()
        return process.memory_info().rss

    write()
    memory = [write() for _ in range(SEGMENTS)]
    assert memory[-1] - memory[0] < 8 * 2**20
