"""Count the operations of one pass of each model of a pair, from their configurations alone.

    python docs/benchmarks/operations.py SLM LLM

The cost of an operation beside its arithmetic (on a GPU, the launch of a kernel) is paid that often per pass, unless
the pass is compiled and recorded as a graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from citer_hf import CiterCache, CiterConfig, CiterForCausalLM
from citer_hf.model.compat import cache_argument
from citer_hf.model.static_memory import Workspace, llm_pass, slm_step

PROMPT, ROOM = 5, 320


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, and those of them that are more than views."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.computing += not func.is_view
        return func(*args, **(kwargs or {}))


def count(name: str, run: Callable[[], Any]) -> None:
    """Print the operations of one pass."""
    with Operations() as operations:
        run()
    print(f"{name}: {operations.all} operations, {operations.computing} of them more than views")


@torch.no_grad()
def main() -> None:
    """Count for the pair that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slm", help="repository id or directory")
    parser.add_argument("llm", help="repository id or directory")
    wanted = parser.parse_args()
    configs = [AutoConfig.from_pretrained(name) for name in (wanted.slm, wanted.llm)]
    # Tensors that have a shape and no content.
    with torch.device("meta"):
        slm, llm = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for config in configs)
        config = CiterConfig(slm_config=configs[0], llm_config=configs[1], router="mlp")
        model = CiterForCausalLM(config, slm=slm, llm=llm).eval()
    prompt = torch.zeros((1, PROMPT), dtype=torch.long, device="meta")
    positions = torch.arange(PROMPT, device="meta")[None]
    cache, work = CiterCache(config), Workspace(1, ROOM, torch.device("meta"))
    for name, part, own in (("slm", slm, cache.slm), ("llm", llm, cache.llm)):
        part(input_ids=prompt, position_ids=positions, **cache_argument(part, own))
        work.take(name, part, own)
    count("SLM step with its router", lambda: slm_step(model, work))
    for tokens in (1, 4):
        count(f"LLM catch-up over {tokens}", lambda n=tokens: llm_pass(model, work, n))  # type: ignore[misc]


if __name__ == "__main__":
    main()
