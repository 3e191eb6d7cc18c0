"""Fills docs/compatibility.md by running: `python -m docs.benchmarks.compatibility`.

Every cell is a comparison in fp32 with the naive reference or with the bare models, on a tiny random model of the
architecture paired with a tiny Llama.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from citer_hf import CiterCache
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.families import FAMILIES, tiny_config
from tests.model.test_families import (
    test_a_mixed_pair_equals_the_naive_loop_with_and_without_a_cache_and_its_models_at_the_ends,
)

PAGE = Path(__file__).parents[1] / "compatibility.md"
Options = Callable[[Any, torch.Tensor], dict[str, Any]]


def plain(model: Any, prompts: torch.Tensor) -> dict[str, Any]:
    return {}


def same_text(lengths: tuple[int, ...], ours: Options, theirs: Options) -> Callable[[str, str], bool]:
    """Compare the texts under two settings, each a function of the pair and the prompts."""

    def check(slm: str, llm: str) -> bool:
        model, prompts = make_pair(slm, llm), left_padded(random_prompts(lengths))
        options = [one(model, prompts["input_ids"]) for one in (ours, theirs)]
        return torch.equal(*(model.generate(**prompts, max_new_tokens=10, do_sample=False, **one) for one in options))

    return check


def copied_prefix(model: Any, prompt: torch.Tensor) -> dict[str, Any]:
    cache = CiterCache(model.config)
    with torch.no_grad():
        model(input_ids=prompt[:, :8], past_key_values=cache, logits_to_keep=1)
    return {"past_key_values": copy.deepcopy(cache)}


def catch_up(slm: str, llm: str) -> bool:
    """Whether the LLM has the logits of one pass over the whole text after a pass over the tokens that it lacks."""
    script = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1]])
    model, prompt = make_pair(slm, llm, router=ScriptedRouter(script)), torch.tensor(random_prompts((9,)))
    wanted = {"max_new_tokens": 20, "output_logits": True, "return_dict_in_generate": True, "max_drafts": 0}
    output = model.generate(prompt, **wanted, do_sample=False, eos_token_id=None, pad_token_id=0)
    for step in range(20):
        writer = model.llm if script[0, step % 10] else model.slm
        with torch.no_grad():
            expected = writer(output.sequences[:, : 9 + step], use_cache=False).logits[0, -1]
        torch.testing.assert_close(output.logits[step][0], expected, atol=1e-4, rtol=1e-4)
    return True


CHECKS: dict[str, Callable[[str, str], bool | None]] = {
    "padded batch": test_a_mixed_pair_equals_the_naive_loop_with_and_without_a_cache_and_its_models_at_the_ends,
    "catch-up": catch_up,
    "beams": same_text((5, 9, 12), lambda *_: {"num_beams": 3}, lambda *_: {"num_beams": 3, "use_cache": False}),
    "assisted": same_text((9,), plain, lambda model, _: {"assistant_model": model.slm}),
    "chunked prompt": same_text((5, 9, 12), plain, lambda *_: {"prefill_chunk_size": 5}),
    "copied prefix": same_text((12,), plain, copied_prefix),
}


def cell(check: Callable[[str, str], bool | None], slm: str, llm: str) -> str:
    """What a check gives: yes, differs, or why it is refused."""
    try:
        return "**differs**" if check(slm, llm) is False else "yes"
    except AssertionError:
        return "**differs**"
    except (ValueError, RuntimeError) as error:
        return f"refused: {str(error).splitlines()[0][:90]}"


def table() -> str:
    """The page's table."""
    header = ["architecture", "as", *CHECKS]
    lines = [header, ["---"] * len(header)]
    for family in FAMILIES:
        name = type(tiny_config(family)).__name__.removesuffix("Config")
        note = {"mistral_sliding": " (sliding window shorter than the text)"}.get(family, "")
        for role, slm, llm in (("SLM", family, "llama"), ("LLM", "llama", family)):
            lines.append([name + note, role, *(cell(check, slm, llm) for check in CHECKS.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Write the versions and the table on the page."""
    transformers.logging.set_verbosity_error()
    page = PAGE.read_text()
    versions = f"(transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]})"
    page = re.sub(r"\(transformers [\d.]+, torch [\d.]+\)", versions, page)
    PAGE.write_text(re.sub(r"(\|.*\n)+", lambda _: table(), page))


if __name__ == "__main__":
    main()
