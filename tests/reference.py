"""The method written down naively: no cache, no padding, one row at a time. Everything else is compared with this."""

from collections.abc import Sequence
from typing import Any

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


def naive_generate(
    model: Any, ids: Sequence[int], max_new_tokens: int, threshold: float, eos: Sequence[int] = (2,)
) -> tuple[list[int], list[bool], list[float], torch.Tensor]:
    """Greedy text after `ids`, up to and with the first end token; who wrote each token, the scores, the logits."""
    text, to_llm, scores, logits = list(ids), [], [], []
    for _ in range(max_new_tokens):
        row, score, by_llm = naive_logits(model, text, threshold)
        text.append(int(row.argmax()))
        to_llm.append(by_llm)
        scores.append(score)
        logits.append(row)
        if text[-1] in eos:
            break
    return text[len(ids) :], to_llm, scores, torch.stack(logits)


Texts = list[tuple[list[int], list[bool], list[float], torch.Tensor]]


def naive_texts(
    model: Any, rows: list[list[int]], steps: int, eos: Sequence[int], thresholds: Sequence[float] = ()
) -> Texts:
    """What the naive loop gives for each sequence of a batch."""
    thresholds = thresholds or [model.config.router_threshold] * len(rows)
    return [naive_generate(model, row, steps, threshold, eos) for row, threshold in zip(rows, thresholds)]  # noqa: B905


def assert_sequences(output: Any, rows: list[list[int]], expected: Texts) -> None:
    """Compare the texts and the record of a batch, padded on the left, with the naive loop's."""
    width, routing = max(map(len, rows)), output.past_key_values.routing
    for index, (text, to_llm, scores, logits) in enumerate(expected):
        length = len(text)
        assert output.sequences[index, width : width + length].tolist() == text
        assert not output.sequences[index, width + length :].any()
        assert routing.to_llm[index, :length].tolist() == to_llm
        assert not routing.unfinished[index, length:].any()
        found = routing.scores[index, :length].cpu()
        torch.testing.assert_close(found, torch.tensor(scores), atol=1e-3, rtol=1e-3)
        if output.logits is not None:
            kept = torch.stack([step[index] for step in output.logits])[:length]
            torch.testing.assert_close(kept, logits, atol=1e-4, rtol=1e-4)
