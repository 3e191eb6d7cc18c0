"""Two hand-written loops to compare with: the least that the same decisions can cost, and the released code's way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from citer_hf.model.compat import CACHE, cache_argument

from .prompts import Batch

__all__ = ["floor_loop", "last_logits_only", "released_loop"]


@torch.no_grad()
def floor_loop(model: Any, batch: Batch, to_llm: torch.Tensor, new_tokens: int, static: bool = False) -> torch.Tensor:
    """Decode greedily with the two bare models and decisions that are known: no router, no processors, no checks."""
    length, vocab = batch.length, model.vocab_size
    text = torch.cat([batch.input_ids, batch.input_ids.new_zeros(batch.rows, new_tokens)], dim=1)
    by_llm = to_llm.to(text.device)
    llm_writes, slm_writes = by_llm.any(0).tolist(), (~by_llm).any(0).tolist()
    slm, llm = (Reader(part, batch, new_tokens, vocab, static) for part in (model.slm, model.llm))
    for step in range(new_tokens):
        end = length + step
        tokens = slm.next_tokens(text, end)
        if llm_writes[step]:
            from_llm = llm.next_tokens(text, end)
            tokens = torch.where(by_llm[:, step], from_llm, tokens) if slm_writes[step] else from_llm
        text[:, end] = tokens
    return text[:, length:]


class Reader:
    """One bare model and its cache."""

    def __init__(self, model: Any, batch: Batch, new_tokens: int, vocab: int, static: bool = False):
        self.model, self.vocab, self.device = model, vocab, model.device
        self.static, self.seen, longest = static, 0, batch.length + new_tokens
        self.cache = (
            StaticCache(config=model.config, max_cache_len=longest) if static else DynamicCache(config=model.config)
        )
        compiles = static and self.device.type == "cuda" and not model.generation_config.disable_compile
        self.step = model.get_compiled_call(None) if compiles else model
        accepted = inspect.signature(model.forward).parameters
        self.options = {**cache_argument(model, self.cache), "use_cache": True, **last_logits_only(model)}
        # Without padding the models count by themselves.
        self.mask = self.positions = None
        if batch.padded:
            mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(batch.rows, new_tokens)], dim=1)
            self.mask = mask.to(self.device)
            if "position_ids" in accepted:
                self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)

    def next_tokens(self, text: torch.Tensor, end: int) -> torch.Tensor:
        """Read what is new, and return the most likely next token of each row, `[rows]`, on the text's device."""
        options: dict[str, Any] = dict(self.options)
        if self.mask is not None:
            # What a static cache has room for is behind the causal mask anyway, and its shape does not change.
            options["attention_mask"] = self.mask if self.static else self.mask[:, :end]
        if self.positions is not None:
            options["position_ids"] = self.positions[:, self.seen : end]
        read = self.step if self.seen else self.model
        logits = read(input_ids=text[:, self.seen : end].to(self.device), **options).logits
        self.seen = end
        return logits[:, -1, : self.vocab].argmax(-1).to(text.device)


def last_logits_only(model: Any) -> dict[str, int]:
    """Return the keywords that spare a model the logits of all positions but the last, where it knows such a
    keyword."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def released_loop(model: Any, batch: Batch, to_llm: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Decode as the method's released code does, written from its description."""
    text, mask = batch.input_ids, batch.attention_mask
    cache = DynamicCache(config=model.slm.config)
    for step in range(new_tokens):
        output = model.slm.generate(
            text, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True, **{CACHE: cache}
        )
        tokens = output.sequences[:, -1]
        rows = to_llm[:, step].nonzero().squeeze(1).to(text.device)
        if rows.numel():
            device = model.llm.device
            whole = {"inputs": text[rows].to(device), "attention_mask": mask[rows].to(device)}
            tokens[rows] = model.llm.generate(**whole, max_new_tokens=1, use_cache=False)[:, -1].to(tokens.device)
        text = torch.cat([text, tokens[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(batch.rows, 1)], dim=1)
    return text[:, batch.length :]
