"""What `help()` and type checkers learn about the methods of a pair."""

import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import citer_hf
from citer_hf import CiterForCausalLM

OWN = {
    "from_pair": ("slm", "llm", "router", "router_threshold"),
    "from_pretrained": ("pretrained_model_name_or_path", "config"),
    "generate": ("inputs", "generation_config", "router_threshold", "waiting_rows"),
}


@pytest.mark.parametrize("name", OWN)
def test_our_keywords_are_documented_and_typed_and_so_is_what_comes_back(name: str) -> None:
    method = getattr(CiterForCausalLM, name)
    hints, text = get_type_hints(method), str(inspect.getdoc(method))
    assert inspect.signature(method).parameters.keys() >= set(OWN[name])
    for keyword in OWN[name]:
        assert hints[keyword] is not Any and f"\n    {keyword}: " in text
    returned = hints["return"]
    assert returned is not Any
    # Loading returns the class that was asked.
    assert name == "generate" or hints["cls"] == type[returned]
    assert (Path(citer_hf.__file__).parent / "py.typed").is_file()
