"""Greedy decoding of many prompts in batches of like lengths, and the router's scores along given outputs."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from citer_hf.data.examples import Example
from citer_hf.data.tokens import encode, real_tokens
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.schedule import rows_to_wait_for
from citer_hf.runs import CommandOptions, option

Alone = Literal["slm", "llm"]

# Prompt and new tokens of all sequences of a batch: bounds the memory for keys and values.
BATCH_TOKENS = 1 << 14
# Logits of a batch that is scored, in numbers: 1 GB in fp32.
MOST_LOGITS = 1 << 28
# Time of an SLM step over that of an LLM call. A measured ratio would differ from run to run, and with it the shapes
# of the batches and the last bits of the scores.
STEP_RATIO = 0.3


@dataclass(frozen=True)
class DecodeOptions(CommandOptions):
    max_new_tokens: int = option(512, "Longest output, in tokens.", "N", min=1)
    batch_tokens: int = option(BATCH_TOKENS, "Tokens in a batch, padding included.", "N", min=1)
    seed: int = option(0, "Seed of the bootstrap.", "N")

    @property
    def sizes(self) -> dict[str, int]:
        return {"max_new_tokens": self.max_new_tokens, "batch_tokens": self.batch_tokens}


class Output(NamedTuple):
    """The output for one prompt; `seconds` are its share of its batch, by tokens. Verdicts come with a checker."""

    tokens: list[int]
    to_llm: list[bool]
    seconds: float
    correct: bool = False
    extracted: bool = False


def decode(
    model: CiterForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    router_threshold: float | None = None,
    max_new_tokens: int,
    alone: Alone | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Output]:
    """Decode every prompt greedily, with the pair or with one of its models alone, and none of their own settings."""
    model.eval()
    outputs: dict[int, Output] = {}
    limit = model.config.max_position_embeddings
    for places, new_tokens in batches([len(prompt) for prompt in prompts], max_new_tokens, limit, batch_tokens):
        batch = [prompts[place] for place in places]
        done = _decode_batch(model, batch, new_tokens, alone, router_threshold)
        outputs.update(zip(places, done, strict=True))
    return [outputs[place] for place in range(len(prompts))]


def _decode_batch(
    model: CiterForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, alone: Alone | None, threshold: Any
) -> Iterator[Output]:
    generator, (end_tokens, padding) = greedy_view(model, alone), special_tokens(model)
    device = model.slm.device if alone is None else generator.device
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    options = {"router_threshold": threshold, "waiting_rows": steady_policy} if alone is None else {}
    options |= {"max_new_tokens": new_tokens, "return_dict_in_generate": True}
    began = time.perf_counter()
    output = generator.generate(input_ids=ids, attention_mask=mask, **options)
    new = output.sequences[:, width:]  # [batch, new]
    # Reading the lengths waits for the device.
    lengths = real_tokens(new, end_tokens).sum(dim=1).tolist()
    per_token = (time.perf_counter() - began) / sum(lengths)
    to_llm = [[alone == "llm"] * length for length in lengths]
    if alone is None:
        routing = output.past_key_values.routing
        check_scores(type(model.router).__name__, routing.scores)
        to_llm = cut(routing.to_llm, lengths)
    return map(Output, cut(new, lengths), to_llm, [per_token * length for length in lengths])


def batches(
    lengths: Sequence[int], max_new_tokens: int, limit: int | None, batch_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Group prompts of like lengths, the longest first, so that memory that is too small shows at once."""
    places: list[int] = []
    new_tokens = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        own = max_new_tokens if limit is None else min(max_new_tokens, limit - lengths[place])
        full = bool(places) and (len(places) + 1) * (lengths[places[0]] + new_tokens) > batch_tokens
        if places and (own != new_tokens or full):
            yield places, new_tokens
            places = []
        places.append(place)
        new_tokens = own
    if places:
        yield places, new_tokens


def encode_prompts(model: CiterForCausalLM, examples: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of the prompts, each of which leaves at least one place in the context."""
    if not examples:
        raise ValueError("examples: expected at least one, got none. Is the file empty?")
    limit, prompts = model.config.max_position_embeddings, [replace(example, response=None) for example in examples]
    return [encode(prompt, tokenizer, limit, special_tokens(model)[0] or -1).prompt_ids for prompt in prompts]


def with_router(model: CiterForCausalLM, router: nn.Module) -> CiterForCausalLM:
    """Return the pair with another router; models and weights are shared, and the given pair stays as it is."""
    other = copy.copy(model)
    other._modules = {**model._modules, "router": router}
    return other


def greedy_view(model: CiterForCausalLM, alone: Alone | None = None) -> Any:
    """Return the pair, or one of its models, with settings that decode greedily and do nothing else."""
    # `generate` fills settings that are not given from the model's own: a copy of the model, without its weights,
    # has none.
    view = copy.copy(model if alone is None else getattr(model, alone))
    end_tokens, padding = special_tokens(model)
    view.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_tokens or None, pad_token_id=padding)
    return view


def special_tokens(model: CiterForCausalLM) -> tuple[list[int], int]:
    """Return the end tokens and the padding of the pair, which both models alone use too."""
    config: Any = model.generation_config
    end = config.eos_token_id
    end_tokens = [] if end is None else [end] if isinstance(end, int) else list(end)
    padding = config.pad_token_id
    return end_tokens, int(padding if padding is not None else end_tokens[0] if end_tokens else 0)


def steady_policy(unfinished: int, llm_share: float, step_ratio: float) -> int:
    """Choose how many sequences wait for the LLM as `generate` does, but not by measured times."""
    return rows_to_wait_for(unfinished, llm_share, STEP_RATIO)


def cut(values: torch.Tensor, lengths: Sequence[int]) -> list[list[Any]]:
    """Return each sequence of a tensor `[batch, tokens]` up to its length."""
    return [sequence[:length] for sequence, length in zip(values.tolist(), lengths, strict=True)]


@torch.no_grad()
def score_outputs(
    model: CiterForCausalLM,
    routers: Mapping[str, nn.Module],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, list[np.ndarray]]:
    """Return every router's scores of the new tokens of each given output; the SLM runs once over each."""
    scores: dict[str, list[np.ndarray]] = {name: [np.empty(0)] * len(outputs) for name in routers}
    sequences = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, outputs, strict=True)]
    most = min(batch_tokens, MOST_LOGITS // model.vocab_size)
    device = model.slm.device
    for places, _ in batches([len(sequence) for sequence in sequences], 0, None, most):
        # Padding is on the right, where no token sees it.
        batch = [sequences[place] for place in places]
        width = max(map(len, batch))
        ids = torch.tensor([[*one, *[0] * (width - len(one))] for one in batch], device=device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in batch], device=device)
        slm = model.run_slm(ids, attention_mask=mask, position_ids=torch.arange(width, device=device)[None])
        for name, router in routers.items():
            values = router.eval()(slm.hidden, slm.logits).float()  # [batch, width]
            check_scores(name, values)
            for place, value, sequence in zip(places, values.cpu().numpy(), batch, strict=True):
                scores[name][place] = value[len(sequence) - len(outputs[place]) : len(sequence)]
    return scores


def check_scores(name: str, scores: torch.Tensor) -> None:
    """Raise `ValueError` for scores that no threshold can be compared with."""
    bad = int(scores.isnan().sum())
    if bad:
        raise ValueError(
            f"router {name!r}: {bad} of {scores.numel()} scores are NaN. Its weights or the SLM's hidden states are "
            "not finite; check how it was trained, and whether the SLM overflows in this dtype."
        )


def spread_thresholds(scores: Sequence[float] | np.ndarray, shares: Sequence[float]) -> list[float]:
    """Return thresholds under which these shares of the scores lie, each once; none that sends no token."""
    thresholds = {threshold_for_share(scores, share) for share in shares}
    return sorted(threshold for threshold in thresholds if threshold > np.min(scores))


def threshold_for_share(scores: Sequence[float] | np.ndarray, share: float) -> float:
    """Return the threshold under which a share of the scores lies, between two scores unless they are tied."""
    return float(np.quantile(scores, share, method="midpoint"))
