"""Fills docs/compatibility.md by running: `python -m tests.compatibility`.

Every cell is a comparison in fp32 with the naive reference or with the bare models, on a tiny random model of the
architecture paired with a tiny Llama.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from citer_hf import CiterCache
from tests.conftest import ScriptedRouter, left_padded, make_pair, random_prompts
from tests.families import FAMILIES, tiny_config
from tests.reference import naive_generate

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
GREEDY = {"max_new_tokens": 10, "do_sample": False}


def padded_batch(slm: str, llm: str) -> bool:
    model, rows = make_pair(slm, llm), random_prompts()
    output = model.generate(**left_padded(rows), **GREEDY)
    texts = [naive_generate(model, row, 10, 0.5)[0] for row in rows]
    return all(output[index, 12 : 12 + len(text)].tolist() == text for index, text in enumerate(texts))


def catch_up(slm: str, llm: str) -> bool:
    router = ScriptedRouter(torch.tensor([[0, 0, 0, 0, 1]]))
    model, prompt = make_pair(slm, llm, router=router), torch.tensor(random_prompts((9,)))
    output = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = [part(output[:, : 9 + step]).logits for step, part in enumerate(4 * ([model.slm] * 4 + [model.llm]))]
    return torch.equal(output[0, 9:], torch.stack([one[0, -1].argmax() for one in logits]))


def beams(slm: str, llm: str) -> bool:
    model, batch = make_pair(slm, llm), left_padded(random_prompts())
    options = {**GREEDY, "num_beams": 3}
    return torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def assisted(slm: str, llm: str) -> bool:
    model, prompt = make_pair(slm, llm), left_padded(random_prompts((9,)))
    return torch.equal(
        model.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY, assistant_model=model.slm)
    )


def chunked_prompt(slm: str, llm: str) -> bool:
    model, batch = make_pair(slm, llm), left_padded(random_prompts())
    return torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY, prefill_chunk_size=5))


def copied_prefix(slm: str, llm: str) -> bool:
    model, (prefix, rest) = make_pair(slm, llm), random_prompts((8, 4))
    cache, text = CiterCache(model.config), {"input_ids": torch.tensor([prefix + rest])}
    with torch.no_grad():
        model(input_ids=torch.tensor([prefix]), past_key_values=cache, logits_to_keep=1)
    return torch.equal(
        model.generate(**text, **GREEDY), model.generate(**text, **GREEDY, past_key_values=copy.deepcopy(cache))
    )


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "padded batch": padded_batch,
    "catch-up": catch_up,
    "beams": beams,
    "assisted": assisted,
    "chunked prompt": chunked_prompt,
    "copied prefix": copied_prefix,
}


def cell(check: Callable[[str, str], bool], slm: str, llm: str) -> str:
    """What a check gives: yes, differs, or why it is refused."""
    try:
        return "yes" if check(slm, llm) else "**differs**"
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


def page() -> str:
    """The whole page."""
    return f"""# Which models make a pair

Any two causal language models of transformers that share a tokenizer should work, in any mix: the model's own
`forward` and its own cache are used, nothing is patched. The table is filled by running
`python -m tests.compatibility` (transformers {transformers.__version__}, torch {torch.__version__.split("+")[0]}),
never by hand. Every cell compares, in fp32, a tiny random model of the architecture in a pair with a tiny Llama
against a naive loop without cache and padding, or against the same mode without a cache.

- *padded batch*: three rows of different lengths, padded on the left, equal the rows one by one.
- *catch-up*: the LLM reads four tokens it has not seen in one pass, again and again.
- *beams*: beam search with a cache equals beam search without.
- *assisted*: assisted generation with the SLM as assistant gives the greedy text.
- *chunked prompt*: `prefill_chunk_size` changes nothing.
- *copied prefix*: `copy.deepcopy` of the cache of a prefix serves a longer prompt.

{table()}
What is refused is refused when the pair is made or when the mode is asked for, with the reason. Architectures that
keep no keys and values (Mamba, RWKV) are refused when the pair is made.
Recurrent layers (linear attention) cannot take tokens back, so that transformers does not offer assisted generation
for them; that holds for a pair as soon as one of its models has them.
"""


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    text: Any = page()
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
