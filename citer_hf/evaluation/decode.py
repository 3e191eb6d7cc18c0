"""Greedy decoding of many prompts, which stream through the engine's slots, and the router's scores along outputs."""

import copy
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from citer_hf.data.checkers import CHECKERS, Checker, answer_of
from citer_hf.data.examples import Example
from citer_hf.data.tokens import encode, show_prompt
from citer_hf.model.cache import CiterCache
from citer_hf.model.engine import Engine
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.routers import SLM_ALONE, ConfidenceRouter
from citer_hf.model.sampling import Stops
from citer_hf.model.schedule import Pace
from citer_hf.model.sequence import Sequence as Text
from citer_hf.model.sequence import Settled
from citer_hf.model.slots import takes_back
from citer_hf.runs import CommandOptions, note, option

Alone = Literal["slm", "llm"]

# Prompt and new tokens of all slots: bounds the memory for keys and values.
BATCH_TOKENS = 1 << 14
# Time of an LLM call over that of an SLM step. A measured ratio would differ from run to run, and with it the passes,
# their costs and the last bits of the scores.
CALL_RATIO = 10.0
# The LLM's accuracy below which a warning is printed.
FEW = 0.2
# A unit of work has so many times as many sequences as there are slots, which are mostly full then.
UNIT = 4


@dataclass(frozen=True)
class DecodeOptions(CommandOptions):
    max_new_tokens: int = option(512, "Longest output, in tokens.", "N", min=1)
    batch_tokens: int = option(BATCH_TOKENS, "Tokens, prompts included, that are decoded at once.", "N", min=1)
    seed: int = option(0, "Seed of the bootstrap.", "N")


class Output(NamedTuple):
    """The output for one prompt: `seconds` are its share of the time of all, `passes` its places in each pass."""

    tokens: list[int]
    to_llm: list[bool]
    seconds: float
    passes: dict[str, list[tuple[int, int]]]


def decode(
    model: CiterForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    router_threshold: float = SLM_ALONE,
    llm_veto: float = 0.0,
    max_new_tokens: int | Sequence[int],
    alone: Alone | None = None,
    batch_tokens: int = BATCH_TOKENS,
    paced: bool = False,
) -> list[Output]:
    """Decode every prompt greedily, with the pair or with one of its models alone, and none of their own settings.

    With `paced`, measured times decide when the LLM is called, as in `generate`.
    """
    model.eval()
    limit, ends = model.config.max_position_embeddings, end_tokens(model)
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if not prompts:
        return []
    lengths = [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)]
    dials = (SLM_ALONE, 0.0) if alone else (router_threshold, llm_veto)
    sequences = [
        Text(list(prompt), Stops(length if limit is None else min(length, limit), ends), *dials)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    if alone == "llm" and getattr(model.llm, "is_remote", False):
        return completed(model, prompts, most, ends)
    began, pair = time.perf_counter(), only(model, alone) if alone else model
    cache = CiterCache(pair.config)
    if takes_back(cache):
        slots, pace = slots_for(max(lengths), batch_tokens), model.pace if paced and not alone else Pace(CALL_RATIO)
        engine = Engine(pair, min(slots, len(prompts)), cache, pace=pace)
        for one in sequences:
            engine.submit(one)
        engine.run()
    else:
        for one in sequences:
            generate(pair, one)
    for one in sequences:
        if one.error is not None:
            raise one.error
    per_token = (time.perf_counter() - began) / sum(len(one.record) for one in sequences)
    return [
        Output(
            tokens=one.generated,
            to_llm=[step.to_llm or alone == "llm" for step in one.record],
            seconds=per_token * len(one.record),
            passes={"slm": [], "llm": [], alone: one.passes["slm"]} if alone else one.passes,
        )
        for one in sequences
    ]


def completed(
    model: CiterForCausalLM, prompts: Sequence[Sequence[int]], most: Sequence[int], ends: Sequence[int]
) -> list[Output]:
    """Let a remote LLM write alone: its engine batches the completions."""
    began, limit = time.perf_counter(), model.config.max_position_embeddings
    lengths = [new if limit is None else min(new, limit - len(one)) for one, new in zip(prompts, most, strict=True)]
    llm: Any = model.llm
    written = llm.complete([list(one) for one in prompts], lengths, ends)
    per_token = (time.perf_counter() - began) / sum(map(len, written))
    return [
        Output(tokens, [True] * len(tokens), per_token * len(tokens), {"slm": [], "llm": passes_of(prompt, tokens)})
        for prompt, tokens in zip(prompts, written, strict=True)
    ]


def passes_of(prompt: Sequence[int], output: Sequence[int]) -> list[tuple[int, int]]:
    """Return the places of the passes of a model that decodes token by token."""
    ends = range(len(prompt), len(prompt) + len(output))
    return list(zip([0, *ends], ends, strict=False))


def generate(model: CiterForCausalLM, one: Text) -> None:
    """Decode with transformers' loop, for models that cannot take tokens back."""
    view, prompt = copy.copy(model), torch.tensor([one.tokens], device=model.slm.device)
    view.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(one.stops.end_tokens) or None)
    view.generation_config.update(pad_token_id=0, max_length=one.stops.max_length, return_dict_in_generate=True)
    output: Any = view.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        router_threshold=one.threshold,
        llm_veto=one.veto,
        generation_config=view.generation_config,
    )
    routing, seen = output.past_key_values.routing, dict.fromkeys(("slm", "llm"), 0)
    for score, to_llm in zip(routing.scores[0].tolist(), routing.to_llm[0].tolist(), strict=True):
        one.tokens.append(int(output.sequences[0, one.end]))
        one.record.append(Settled(score, to_llm))
        for role in ("slm", "llm") if to_llm else ("slm",):
            one.passes[role].append((seen[role], one.end - 1))
            seen[role] = one.end - 1


def slots_for(longest: int, batch_tokens: int) -> int:
    """Return how many sequences, the longest of which has so many tokens, are decoded at once."""
    return max(batch_tokens // longest, 1)


def units(whole: Sequence[Any], longest: int, batch_tokens: int) -> list[Sequence[Any]]:
    """Divide sequences, the longest of which has so many tokens, into units of work for any number of processes."""
    size = UNIT * slots_for(longest, batch_tokens)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def encode_prompts(model: CiterForCausalLM, examples: Sequence[Example]) -> list[list[int]]:
    """Return the tokens of the prompts, each of which leaves at least one place in the context."""
    if not examples:
        raise ValueError("examples: expected at least one, got none. Is the file empty?")
    tokenizer, limit = model.load_tokenizer(), model.config.max_position_embeddings
    if tokenizer is None:
        raise ValueError("slm, llm: neither has a tokenizer. Save one beside a model: tokenizer.save_pretrained(...).")
    prompts = [encode(replace(example, response=None), tokenizer, limit).prompt_ids for example in examples]
    show_prompt(tokenizer, prompts[0])
    return prompts


def check_answers(checker: Checker | None, examples: Sequence[Example]) -> None:
    """Raise an error where a checker of the package cannot find an answer in any of the data's answers."""
    name = next((name for name, one in CHECKERS.items() if one is checker), None)
    if name is None or checker is None:
        return
    for one in examples:
        if answer_of(name, one) and name == "choice" and one.choices is None:
            checker("", one)  # raises the error
    # Where another answer is right, words are no answer; a box may hold anything that is more than words.
    answers = [(str(one.answer), replace(one, answer="0") if name == "math" else one) for one in examples]
    if not any(checker(*one).extracted or re.search(r"[\d\\^_=+*/<>|(){}]", one[0]) for one in answers):
        shown = "; ".join(f"{one.answer!r:.40} in row {one.row}" for one in examples[:3])
        raise ValueError(
            f"answer: the checker {name} finds no answer in the answers of any row: {shown}. Name their column "
            "(--map answer=COLUMN), or choose another checker."
        )


def warn_of_llm(correct: Sequence[bool]) -> None:
    """Warn when the LLM alone answers so few problems that the form of the prompts may be wrong."""
    if (share := fmean(correct)) < FEW:
        note(
            f"Warning: the LLM alone is right on {share:.1%} of {len(correct)} problems, less than {FEW:.0%}. Is the "
            "prompt above of the form that the LLM knows? --prompt-template, --chat and --system-prompt change it. Or "
            "--max-new-tokens is too small, or another --checker is needed."
        )


def with_router(model: CiterForCausalLM, router: nn.Module) -> CiterForCausalLM:
    """Return the pair with another router; models and weights are shared, and the given pair stays as it is."""
    other = copy.copy(model)
    other._modules = {**model._modules, "router": router}
    return other


def only(model: CiterForCausalLM, role: Alone) -> CiterForCausalLM:
    """Return a pair that is one model of the given one: at threshold 0, its SLM decodes alone."""
    one, other = getattr(model, role), with_router(model, ConfidenceRouter(1))
    other._modules |= {"slm": one, "llm": one}
    other.config = copy.copy(model.config)
    other.config.slm_config = other.config.llm_config = one.config
    return other


def end_tokens(model: CiterForCausalLM) -> list[int]:
    """Return the end tokens of the pair, at which both models alone end too."""
    end: Any = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


@torch.no_grad()
def score_outputs(
    model: CiterForCausalLM,
    routers: Mapping[str, nn.Module],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
) -> dict[str, list[np.ndarray]]:
    """Return every router's scores of the new tokens of each given output; the SLM runs once over each."""
    scores: dict[str, list[np.ndarray]] = {name: [] for name in routers}
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output[:-1]]], device=model.slm.device)
        slm = model.run_slm(ids, logits_to_keep=len(output))
        for name, router in routers.items():
            values = router.eval()(slm.hidden, slm.logits).float()  # [1, output]
            if values.isnan().any():
                raise ValueError(f"router {name!r}: scores are NaN. Check its weights and the precision of the SLM.")
            scores[name].append(values[0].cpu().numpy())
    return scores


def spread_thresholds(scores: Sequence[float] | np.ndarray, shares: Sequence[float]) -> list[float]:
    """Return thresholds under which these shares of the scores lie, each once; none that sends no token."""
    thresholds = {threshold_for_share(scores, share) for share in shares}
    return sorted(threshold for threshold in thresholds if threshold > np.min(scores))


def threshold_for_share(scores: Sequence[float] | np.ndarray, share: float) -> float:
    """Return the threshold under which a share of the scores lies, between two scores unless they are tied."""
    return float(np.quantile(scores, share, method="midpoint"))
