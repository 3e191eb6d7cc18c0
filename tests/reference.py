"""The method written down naively: no cache, no padding, one row at a time. Everything else is compared with this."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


@torch.no_grad()
def naive_logits(model: Any, ids: Sequence[int], threshold: float) -> tuple[torch.Tensor, float, bool]:
    """Logits of the token that follows `ids`, the router's score, and whether the LLM gives the logits."""
    input_ids = torch.tensor([list(ids)], device=model.slm.device)
    slm_logits = model.slm(input_ids, use_cache=False).logits[0, -1, : model.config.vocab_size]
    hidden = model.slm.base_model(input_ids, use_cache=False).last_hidden_state[0, -1]
    score = float(model.router(hidden, slm_logits))
    if score >= threshold:
        return slm_logits, score, False
    return model.llm(input_ids, use_cache=False).logits[0, -1, : model.config.vocab_size], score, True


class Text(NamedTuple):
    """Tokens after a prompt; of each whether the LLM decided it, whether it took back the SLM's, score and logits."""

    tokens: list[int]
    to_llm: list[bool]
    vetoed: list[bool]
    scores: list[float]
    logits: torch.Tensor


@torch.no_grad()
def naive_generate(
    model: Any, ids: Sequence[int], max_new_tokens: int, threshold: float, eos: Sequence[int] = (2,), veto: float = 0.0
) -> Text:
    """Greedy text after `ids`, up to and with the first end token."""
    text, steps = list(ids), []
    for _ in range(max_new_tokens):
        row, score, by_llm = naive_logits(model, text, threshold)
        vetoed = False
        if threshold > 0 and veto > 0 and not by_llm:
            input_ids = torch.tensor([text], device=model.slm.device)
            llm_row = model.llm(input_ids, use_cache=False).logits[0, -1, : model.config.vocab_size]
            of_llm = llm_row.softmax(-1)
            vetoed = bool(of_llm[row.argmax()] < veto * of_llm.max())
            row = llm_row if vetoed else row
        text.append(int(row.argmax()))
        steps.append((by_llm or vetoed, vetoed, score, row))
        if text[-1] in eos:
            break
    to_llm, vetoes, scores, logits = zip(*steps, strict=True)
    return Text(text[len(ids) :], list(to_llm), list(vetoes), list(scores), torch.stack(logits))


def naive_texts(model: Any, rows: Any, steps: int, eos: Any, thresholds: Any = (), vetoes: Any = ()) -> list[Text]:
    """What the naive loop gives for each sequence of a batch."""
    thresholds = thresholds or [model.config.router_threshold] * len(rows)
    vetoes = vetoes or [model.config.llm_veto] * len(rows)
    dials = zip(rows, thresholds, vetoes)  # noqa: B905
    return [naive_generate(model, row, steps, threshold, eos, veto) for row, threshold, veto in dials]


def assert_sequences(output: Any, rows: list[list[int]], expected: list[Text]) -> None:
    """Compare the texts and the record of a batch, padded on the left, with the naive loop's."""
    width, routing = max(map(len, rows)), output.past_key_values.routing
    for index, (text, to_llm, vetoed, scores, logits) in enumerate(expected):
        length = len(text)
        assert output.sequences[index, width : width + length].tolist() == text
        assert not output.sequences[index, width + length :].any()
        assert routing.to_llm[index, :length].tolist() == to_llm
        assert routing.vetoed[index, :length].tolist() == vetoed
        assert routing.unfinished[index].tolist() == [step < length for step in range(len(routing))]
        found = routing.scores[index, :length].cpu()
        torch.testing.assert_close(found, torch.tensor(scores), atol=1e-3, rtol=1e-3)
        if output.logits is not None:
            kept = torch.stack([step[index] for step in output.logits])[:length]
            torch.testing.assert_close(kept, logits, atol=1e-4, rtol=1e-4)
    assert routing.llm_share == sum(sum(text.to_llm) for text in expected) / sum(len(text.tokens) for text in expected)


def mlp_score(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """`p_slm` as CITER's released code computes it: Linear, BatchNorm or nothing, ReLU, Linear, Linear, sigmoid."""
    x = inputs @ weights["expand.weight"].T + weights["expand.bias"]
    if "norm.running_var" in weights:
        x = (x - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-5).sqrt()
        x = x * weights["norm.weight"] + weights["norm.bias"]
    x = x.clamp_min(0) @ weights["contract.weight"].T + weights["contract.bias"]
    return torch.sigmoid(x @ weights["score.weight"].T + weights["score.bias"])[..., 0]
