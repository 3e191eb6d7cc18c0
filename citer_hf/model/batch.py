"""How one call of `generate` fills the engine with its batch, and what it hands back."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .cache import CiterCache, check_cache
from .compat import CACHE, CiterGenerateOutput
from .engine import CHUNK, Engine
from .routers import as_threshold, as_veto
from .sampling import Choice, Stops, default_generator, looks_at_one_sequence, processors_of
from .sequence import Sequence
from .slots import takes_back

# Keywords of `_sample` and of `forward` that the engine understands.
KNOWN_KEYWORDS = {"attention_mask", "logits_to_keep", "position_ids", "use_cache", "streamer", "synced_gpus", CACHE}
KNOWN_KEYWORDS |= {"router_threshold", "llm_veto", "default_veto", "max_drafts", "tokenizer", "assistant_tokenizer"}


class Call(NamedTuple):
    """What transformers' `generate` gives to `_sample`."""

    prompt: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    settings: GenerationConfig
    kwargs: dict[str, Any]


def why_not_decoded(model: Any, call: Call) -> str:
    """Return why only transformers' loop, which calls `forward` for every token, does what is asked; "" if not so."""
    prompt, processors, criteria, settings, kwargs = call
    cache, batch = kwargs.get(CACHE), len(prompt)
    if cache is None or kwargs.get("use_cache") is False:
        return "there is no cache"
    if not takes_back(cache):
        return "the cache of a model, or one of its layers, cannot take tokens back"
    if settings.output_attentions or settings.output_hidden_states:
        return "hidden states or attentions are asked for, token by token"
    if settings.is_assistant or kwargs.get("synced_gpus"):
        return "the pair is another model's assistant, or moves in step with other processes"
    if model.forward_is_observed():
        return "a hook, or a changed method, sees every call of `forward`"
    unknown = set(kwargs) - KNOWN_KEYWORDS
    if unknown or any(
        one is not None and one.dim() != 2 for one in map(kwargs.get, ("attention_mask", "position_ids"))
    ):
        return f"a mask or positions are not two-dimensional, or keywords are for `forward` ({sorted(unknown)})"
    if batch > 1 and kwargs.get("streamer") is not None:
        return "a streamer gets the tokens of a batch together"
    if criteria.max_length is None:
        return "the text has no greatest length"
    if not all(looks_at_one_sequence(one, batch) for one in processors):
        return "a processor of your own, or guidance, may look across the batch or count its calls"
    if batch > 1 and not Stops.of(criteria).look_at_one_sequence:
        return "a stopping criterion of your own may look across the batch, or nothing but a criterion ends a sequence"
    return ""


def decode(model: Any, call: Call) -> CiterGenerateOutput | torch.Tensor:
    """Decode the batch of one call of `generate`."""
    prompt, _, _, settings, kwargs = call
    cache, streamer = kwargs[CACHE], kwargs.get("streamer")
    check_cache(cache, len(prompt))
    # 1. The batch as sequences, and as many slots.
    sequences = sequences_of(model, call)
    longest = sequences[0].begin + sequences[0].stops.max_length - sequences[0].length
    if cache.max_cache_len is not None:
        # The last token of the longest sequence is processed by no model.
        cache.max_cache_len = max(cache.max_cache_len, longest - 1)
    fixed = None if cache.max_cache_len is None else max(cache.max_cache_len, longest)
    if streamer is not None:
        sequences[0].on_settled = lambda one: streamer.put(torch.tensor([one.last]))
    cache.routing.follow([one.record for one in sequences])
    workspace: Any = model.compiled_steps.workspace(model, settings, len(prompt), fixed) if fixed else nullcontext()
    with model._optimize_model_for_decode(), workspace as work:
        chunk = settings.prefill_chunk_size or CHUNK
        engine = Engine(model, len(prompt), cache, fixed, chunk, model.pace, work)
        if work is not None:
            work.take(cache)
        # 2. The loop; an error ends the call, and leaves the cache as it was.
        try:
            for one in sequences:
                engine.submit(one)
            while engine.busy:
                engine.step()
                cache.routing.slm_calls, cache.routing.llm_calls = engine.calls["slm"], engine.calls["llm"]
                for one in sequences:
                    if one.error is not None:
                        raise one.error
            if settings.do_sample and len(prompt) == 1:
                default_generator(engine.device).set_state(sequences[0].choice.state)
        finally:
            cache.routing.settle(prompt.device)
            if streamer is not None:
                streamer.end()
        # 3. What goes on with the cache finds both models where all sequences have been.
        new = hand_back(engine, cache, prompt, sequences, settings)
        if work is not None:
            work.give_back(cache)
    text = torch.cat([prompt, new], dim=1)
    if not settings.return_dict_in_generate:
        return text
    return CiterGenerateOutput(
        sequences=text,
        scores=stacked(sequences, 1) if settings.output_scores else None,
        logits=stacked(sequences, 0) if settings.output_logits else None,
        **{CACHE: cache},
    )


def sequences_of(model: Any, call: Call) -> list[Sequence]:
    prompt, processors, criteria, settings, kwargs = call
    stops = Stops.of(criteria)
    cache, mask, (batch, width) = kwargs[CACHE], kwargs.get("attention_mask"), prompt.shape
    begin, length, llm_length = cache.routing.start, cache.get_seq_length(), cache.llm_length
    # 1. Which places hold tokens, and their positions.
    shown = torch.ones((batch, begin), dtype=torch.bool) if mask is None else mask[:, :begin].bool().cpu()
    positions = (shown.long().cumsum(dim=1) - 1).clamp(min=0)
    given = kwargs.get("position_ids")
    if given is not None:
        count = min(given.shape[1], begin)
        positions[:, begin - count :] = given[:, given.shape[1] - count :].cpu()
    # 2. What the LLM has not seen of the cached tokens, and what is new to both: from place `llm_length` on.
    new = prompt[:, width - (begin - length) :].cpu()
    if llm_length < length:
        unseen, their_positions = cache.unseen_tokens()
        new = torch.cat([unseen.cpu(), new], dim=1)
        if their_positions is not None:
            positions[:, llm_length:length] = their_positions.cpu()
    # 3. Settings, for each sequence.
    threshold, veto = kwargs.get("router_threshold"), kwargs.get("llm_veto", kwargs.get("default_veto"))
    thresholds = per_sequence(
        as_threshold(model.config.router_threshold if threshold is None else threshold, batch), batch
    )
    vetoes = per_sequence(as_veto(model.config.llm_veto if veto is None else veto, batch), batch)
    keeps_logits = settings.return_dict_in_generate and (settings.output_logits or settings.output_scores)
    generators: list[Any] = [None] * batch
    if settings.do_sample:
        generators = [torch.Generator(model.slm.device) for _ in range(batch)]
        seed = int(torch.randint(2**62, ())) if batch > 1 else 0
        for index, generator in enumerate(generators):
            generator.manual_seed(seed + index)
        if batch == 1:
            # A single sequence draws what transformers draws.
            generators[0].set_state(default_generator(model.slm.device).get_state())
    sequences = []
    for index in range(batch):
        places = shown[index].tolist()
        first = places.index(True) if True in places else 0
        origin = max(llm_length, first)
        sequences.append(
            Sequence(
                tokens=new[index, origin - llm_length :].tolist(),
                stops=stops,
                threshold=thresholds[index],
                veto=vetoes[index],
                max_drafts=kwargs.get("max_drafts"),
                choice=Choice(processors_of(processors, index), generators[index]),
                keeps_logits=bool(keeps_logits),
                prompt=prompt[index : index + 1],
                origin=origin,
                first=first,
                positions=positions[index, origin:].tolist(),
                shown=None if all(places[first:]) else places,
                slot=index,
                seen={"slm": max(length, first), "llm": origin},
            )
        )
    return sequences


def per_sequence(value: float | torch.Tensor, batch: int) -> list[float]:
    return value[:, 0].tolist() if isinstance(value, torch.Tensor) else [value] * batch


def hand_back(
    engine: Engine, cache: CiterCache, prompt: torch.Tensor, sequences: list[Sequence], settings: GenerationConfig
) -> torch.Tensor:
    """Leave in the cache what all sequences have in common; return the new tokens `[batch, new]`, padded."""
    begin, longest = sequences[0].begin, max(len(one.record) for one in sequences)
    padding = 0 if settings._pad_token_tensor is None else int(settings._pad_token_tensor)
    rows = [one.generated + [padding] * (longest - len(one.record)) for one in sequences]
    # The last token has been processed by no model. The LLM may have seen less of one sequence than of another.
    length, llm_length = begin + longest - 1, cache.llm_length
    if engine.calls["llm"]:
        llm_length = min(length, *(one.seen["llm"] for one in sequences))
    for role, end in (("slm", length), ("llm", llm_length)):
        for layer in engine.caches[role].layers:
            layer.show(end)
    unseen, positions = [], []
    for one, row in zip(sequences, rows, strict=True):
        padded = [padding] * max(one.origin - llm_length, 0)
        start = max(llm_length, one.origin)
        unseen.append(padded + (one.tokens[: one.begin - one.origin] + row)[start - one.origin : length - one.origin])
        positions.append([0] * len(padded) + one.position(start, length))
    ids, places = (torch.tensor(rows, device=prompt.device) for rows in (unseen, positions))
    cache.resume(len(sequences), length, llm_length, ids, places)
    return torch.tensor(rows, device=prompt.device)


def stacked(sequences: list[Sequence], part: int) -> tuple[torch.Tensor, ...]:
    """Return raw or processed logits, `[batch, vocabulary]` for each step; zeros where a sequence has ended."""
    longest = max((one.record for one in sequences), key=len)
    return tuple(
        torch.stack(
            [
                one.record[step].kept[part] if step < len(one.record) else torch.zeros_like(like.kept[part])
                for one in sequences
            ]
        )
        for step, like in enumerate(longest)
    )
