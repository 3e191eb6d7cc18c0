"""`check`: whether two models pay as a pair, before any training, measured on some prompts of the user's."""

import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from accelerate.utils import get_max_memory

from citer_hf import runs, terminal
from citer_hf.bench import contenders
from citer_hf.bench.bench import FAILURES, seconds
from citer_hf.bench.contenders import ALONE, ASSISTED, LOSSLESS, SLM, Contender, Decoders, Setting
from citer_hf.costs import ModelCost, cost_of_config, cost_of_model
from citer_hf.data.checkers import Checker, answer_of, named
from citer_hf.data.examples import Example, read_examples
from citer_hf.model.cache import CiterCache
from citer_hf.model.configuration import table_size
from citer_hf.model.modeling import CiterForCausalLM
from citer_hf.model.references import ROLES, NotAPairError, base_config, split_keywords
from citer_hf.model.routers import LLM_ALONE, ROUTERS, Router
from citer_hf.model.slots import takes_back

from . import decode as decoding
from .results import bootstrap_interval

# Tokens of the passes that are timed, a step and catch-ups, and the most repetitions.
LENGTHS, REPEATS = (1, 4, 8, 16, 32), 5
CONFIDENCE, VETO = 0.5, 0.3
# The fewest prompts that should fit into the time, and the shortest outputs that are decoded for it.
FEWEST_PROMPTS, FEWEST_TOKENS = 4, 16
# A pair pays from this speed on. An advised router keeps so much of the LLM's accuracy, or else of its answers.
PAYS, ACCURATE, ALIKE = 1.1, 0.95, 0.5
# An SLM is dear from this part of the LLM's time on. Accuracies of fewer problems say little.
DEAR, FEW = 0.3, 30


@dataclass(frozen=True)
class CheckOptions(runs.CommandOptions):
    max_new_tokens: int = runs.option(256, "Longest output, in tokens.", "N", min=1)
    minutes: float = runs.option(5.0, "Time for all of it: as many prompts are decoded as fit.", "M", min=0.0)
    seed: int = runs.option(0, "Seed of the bootstrap.", "N")


def check(slm: Any, llm: Any, examples: Any, checker: Checker | str | None = None, **options: Any) -> dict[str, Any]:
    """Measure whether two models pay as a pair: losslessly, and with routers that need no training.

    Args:
        slm: The small model, as for `CiterForCausalLM.from_pair`; or with `llm=None` a saved pair.
        llm: The large model, likewise.
        examples: Prompts like those that the pair will meet: a list of `Example`, or what `read_examples` takes.
        checker: The checker that judges outputs, or its name; every example needs an answer then.
        options: The fields of `CheckOptions`; others are keywords of `from_pair`, such as `device_map`.

    Returns:
        A report for JSON: `pair` (`fits`, and a `reason` why not), `memory` in bytes, `seconds` of each model's passes
        by their tokens, `overruled` (share of the LLM's own tokens that are not the SLM's most likely ones), `rows`
        (one for each way to decode), `prompts`, `notes`, `advice` and `provenance`.

    Raises:
        ValueError: for options out of range, no examples, or examples without what is needed.
        OSError: when a model cannot be loaded.
    """
    own, began = {one.name for one in fields(CheckOptions)}, time.perf_counter()
    settings = CheckOptions(**{key: value for key, value in options.items() if key in own})
    loading = {key: value for key, value in options.items() if key not in own}
    if not (isinstance(examples, Sequence) and all(isinstance(one, Example) for one in examples)):
        examples = read_examples(examples)
    name, judge = ("", None) if checker is None else named(checker)
    for example in examples if judge is not None else []:
        answer_of(name, example)
    if not examples:
        raise ValueError("examples: expected at least one, got none. Is the file empty?")
    found: dict[str, Any] = {"pair": {"fits": True, "reason": None}, "rows": [], "notes": []}
    found |= dict.fromkeys(("memory", "seconds", "overruled", "prompts", "advice", "provenance"))
    places = get_max_memory()
    everywhere = sum(places.values())
    free = places.get("cpu", everywhere) if loading.get("device_map") in (None, "cpu") else everywhere
    # Weights that are there already are part of it.
    there = (one for model in {slm, llm} if isinstance(model, torch.nn.Module) for one in model.parameters())
    free += sum(one.nbytes for one in there)
    try:
        if llm is not None:
            # Before gigabytes are loaded.
            found["memory"] = memory(costs_before(slm, llm, loading), settings.max_new_tokens, free)
            needed = found["memory"]["needed_bytes"]
            if needed > free and "offload_folder" not in loading:
                raise NotAPairError(f"Together they need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free.")
        load: Any = CiterForCausalLM.from_pretrained if llm is None else partial(CiterForCausalLM.from_pair, llm=llm)
        model = load(slm, **loading)
    except NotAPairError as error:
        found["pair"] = {"fits": False, "reason": str(error)}
        return found | {"advice": f"no: the two do not make a pair. {error}"}
    prompts, ends = decoding.encode_prompts(model.eval(), examples), decoding.end_tokens(model)
    with contenders.greedy_without_end(model):
        for part in (model, model.slm, model.llm):
            part.generation_config.eos_token_id = ends or None
        deadline = began + 60 * settings.minutes
        return found | Check(model, examples, prompts, judge, settings, deadline).measure(free)


def costs_before(slm: Any, llm: Any, loading: dict[str, Any]) -> dict[str, ModelCost]:
    """Return the costs of models that are not loaded yet; quantized weights count as 4 bits."""
    found, keywords = {}, split_keywords(loading)
    for role, source in zip(ROLES, (slm, llm), strict=True):
        # Errors are those of loading, which follows.
        with contextlib.suppress(OSError, ValueError):
            if not isinstance(source, torch.nn.Module):
                config, own = base_config(role, source, keywords[role]), keywords[role]
                quantized = own.get("quantization_config") or getattr(config, "quantization_config", None)
                dtype, given = config.dtype or torch.float16, own.get("dtype")
                dtype = given if isinstance(given, torch.dtype) else getattr(torch, str(given), dtype)
                found[role] = cost_of_config(config, 4 if quantized else 8 * dtype.itemsize)
    return found


def memory(costs: Mapping[str, ModelCost], tokens: int, free: int) -> dict[str, int]:
    """Return the bytes of weights, and of keys and values of one sequence, beside those that were free."""
    needed = {f"{role}_weight_bytes": cost.resident_bytes for role, cost in costs.items()}
    needed["kv_bytes"] = round(sum(cost.kv_bytes_read(tokens) for cost in costs.values()))
    return {**needed, "needed_bytes": sum(needed.values()), "free_bytes": free}


class OwnToken(Router):
    """Its score is the SLM's most likely token, which tells along a text where the SLM would write another one."""

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1).float()


@dataclass
class Check:
    """Measures a pair on prompts, one sequence at a time, until the time is up."""

    model: CiterForCausalLM
    examples: Sequence[Example]
    prompts: list[list[int]]
    checker: Checker | None
    settings: CheckOptions
    deadline: float
    decoders: dict[str, Decoders] = field(default_factory=dict)

    def measure(self, free: int) -> dict[str, Any]:
        """Return what `check` reports of a pair."""
        models = {role: getattr(self.model, role) for role in ROLES}
        costs = {role: cost_of_model(one) for role, one in models.items() if not getattr(one, "is_remote", False)}
        tables = {role: table_size(one.config) for role, one in models.items()}
        wanted, given = self.settings.max_new_tokens, len(self.prompts)
        found: dict[str, Any] = {"pair": {"fits": True, "reason": None, "tables": tables}}
        found["memory"] = memory(costs, max(map(len, self.prompts)) + wanted, free)
        found["seconds"] = self.pass_seconds(sorted(self.prompts, key=len)[given // 2])
        ways, step = self.ways(), sum(found["seconds"][role]["1"] for role in ROLES)
        # No way takes much longer for a token than a step of both models.
        most = min(wanted, max(int(self.left() / FEWEST_PROMPTS / len(ways) / step), FEWEST_TOKENS))
        texts = self.decode(ways, most)
        own = decoding.score_outputs(self.model, {SLM: OwnToken(1)}, self.prompts[: len(texts)], texts)[SLM]
        found["overruled"] = float(np.mean(np.concatenate(own) != np.concatenate(texts)))
        found["rows"] = [self.row(way, ways) for way in ways]
        found["prompts"] = {"given": given, "measured": len(texts), "max_new_tokens": most}
        minutes = f"in {self.settings.minutes:g} minutes (--minutes)"
        notes = {
            f"{len(texts)} of {given} prompts were decoded {minutes}; the rest was left out.": len(texts) < given,
            f"Outputs end after {most} tokens, to decode several {minutes}: answers may be cut.": most < wanted,
            f"{len(texts)} problems say little of accuracy.": self.checker is not None and len(texts) < FEW,
            **{f"{way.name}: {way.error}": way.error is not None for way in ways},
        }
        found["notes"] = [note for note, holds in notes.items() if holds]
        return found | {"advice": advice(found), "provenance": runs.provenance(self.model, self.settings)}

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.perf_counter()

    @torch.no_grad()
    def pass_seconds(self, prompt: list[int]) -> dict[str, dict[str, float]]:
        """Return the seconds of each model's passes behind a prompt, by their tokens: 1 is a step."""
        model, cache, enough = self.model, CiterCache(self.model.config), 0.9 * self.left()
        room = (model.config.max_position_embeddings or sys.maxsize) - max(LENGTHS)
        ids = torch.tensor([prompt[: max(room, 1)]], device=model.slm.device)
        runners: dict[str, Any] = {"slm": model.run_slm, "llm": model.run_llm}
        for role, run in runners.items():
            run(ids, getattr(cache, role), 1)
        # An LLM on a server tells of one place what it would tell of all.
        keep = int(getattr(model.llm, "is_remote", False))
        taken: dict[tuple[str, int], list[float]] = {case: [] for case in product(ROLES, LENGTHS)}
        # All in turn. The first repetition pays for what happens once, and slow models have no other.
        for repetition in range(1 + REPEATS):
            for (role, tokens), times in taken.items():
                more, behind = ids[:, torch.arange(tokens) % ids.shape[1]], copy.deepcopy(getattr(cache, role))
                if repetition == 0 or self.left() > enough:
                    times.append(seconds(ids.device, partial(runners[role], more, behind, keep)))
        median = {case: statistics.median(times[1:] or times) for case, times in taken.items()}
        return {role: {str(tokens): median[role, tokens] for tokens in LENGTHS} for role in ROLES}

    def ways(self) -> list[Contender]:
        """Return the ways to decode, the LLM alone first."""
        model = self.model
        for kind in ("confidence", "entropy"):
            self.decoders[kind] = Decoders(decoding.with_router(model, ROUTERS[kind](1)), 0)
        own = self.decoders["confidence"]
        # Tokens that one model alone has are never generated.
        beyond = {role: list(range(model.vocab_size, table_size(getattr(model, role).config))) for role in ROLES}
        slm, llm = (partial(own.alone, getattr(model, role), suppress_tokens=beyond[role] or None) for role in ROLES)
        assisted = partial(llm, **own.assistance())
        first = partial(by_server, own) if getattr(model.llm, "is_remote", False) else llm
        found = [Contender(ALONE, first), Contender(SLM, slm), Contender(ASSISTED, assisted)]
        # Two equally likely tokens have a confidence of one half, and of the entropy this score.
        entropy = 1 - math.log(2) / math.log(model.vocab_size)
        # A veto takes tokens back, which not every cache can do.
        veto = VETO if takes_back(CiterCache(model.config)) else 0.0
        found.append(Contender(LOSSLESS, partial(own.citer, Setting(LOSSLESS, LLM_ALONE, veto=0.0))))
        for kind, threshold in (("confidence", CONFIDENCE), ("entropy", entropy)):
            setting = Setting(f"threshold {threshold:.3g}, veto {veto:g}", threshold, veto=veto)
            found.append(Contender(kind, partial(self.decoders[kind].citer, setting), setting))
        return found

    def decode(self, ways: Sequence[Contender], most: int) -> list[list[int]]:
        """Decode prompt by prompt, in all ways in turn, while there is time; return the LLM's own texts."""
        limit = self.model.config.max_position_embeddings or sys.maxsize
        with runs.progress(None, "citer check", len(self.prompts) * len(ways), sys.stderr.isatty()) as bar:
            # The first prompt once before, so that no way pays for what happens only once.
            for number, prompt in [(-1, self.prompts[0]), *enumerate(self.prompts)]:
                if number > 0 and self.left() < sum(sum(way.seconds) for way in ways) / number:
                    break
                for decoders in self.decoders.values():
                    decoders.new_tokens = min(most if number >= 0 else 2, limit - len(prompt))
                (batch,) = contenders.padded_batches([prompt], 1, self.model.slm.device)
                for way in (one for one in ways if one.error is None):
                    began, outputs = time.perf_counter(), way.counts.setdefault("outputs", [])
                    try:
                        # Reading the tokens waits for an accelerator.
                        output = way.decode(batch)[0][0].tolist()
                    except FAILURES as error:
                        if way.kind == ALONE:
                            raise
                        way.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    else:
                        way.seconds += [time.perf_counter() - began] if number >= 0 else []
                        outputs += [output] if number >= 0 else []
                    bar.update(number >= 0)
        texts: list[list[int]] = ways[0].counts["outputs"]
        return texts

    def row(self, way: Contender, ways: Sequence[Contender]) -> dict[str, Any]:
        """Return the measurements of a way to decode."""
        row: dict[str, Any] = {"name": way.name, "kind": way.kind, "error": way.error}
        row |= {"threshold": way.setting and way.setting.router_threshold, "veto": way.setting and way.setting.veto}
        row |= dict.fromkeys(("speedup", "speedup_over_assisted", "own_share", "accuracy", "accuracy_ci"))
        if way.error is not None:
            return row
        outputs, llm, assisted = way.counts["outputs"], ways[0], next(one for one in ways if one.kind == ASSISTED)
        row |= {"tokens_per_second": speed(way), "speedup": speed(way) / speed(llm)}
        row["speedup_over_assisted"] = None if assisted.error else speed(way) / speed(assisted)
        row["own_share"] = float(np.mean([*map(list.__eq__, outputs, llm.counts["outputs"])]))
        if self.checker is not None:
            texts = self.model.load_tokenizer().batch_decode(outputs, skip_special_tokens=True)
            right = [bool(self.checker(text, one).correct) for text, one in zip(texts, self.examples, strict=False)]
            interval = bootstrap_interval(right, seed=self.settings.seed)
            row |= {"accuracy": statistics.fmean(right), "accuracy_ci": interval}
        return row


def by_server(own: Decoders, batch: contenders.Batch) -> contenders.Output:
    """Let an LLM on a server write alone."""
    texts = decoding.decode(own.model, batch.input_ids.tolist(), max_new_tokens=own.new_tokens, alone="llm")
    return torch.tensor([texts[0].tokens]), None


def speed(way: Contender) -> float:
    """Return tokens per second."""
    return sum(map(len, way.counts["outputs"])) / sum(way.seconds)


def advice(found: Mapping[str, Any]) -> str:
    """Return one sentence: whether the pair pays, how, or why not, and whether assisted generation does better."""
    rows = {row["kind"]: row for row in found["rows"] if row["error"] is None}
    lossless, assisted = (rows[kind]["speedup"] if kind in rows else 0.0 for kind in (LOSSLESS, ASSISTED))
    measure, part = ("own_share", ALIKE) if rows[ALONE]["accuracy"] is None else ("accuracy", ACCURATE)
    good = [one for kind, one in rows.items() if kind in ROUTERS and one[measure] >= part * rows[ALONE][measure]]
    best = max(good, key=lambda one: one["speedup"], default=rows[ALONE])
    parts = [f"{lossless:.1f} times as fast at the LLM's own text"] if lossless >= PAYS else []
    if best["speedup"] >= PAYS * max(lossless, 1.0):
        stay = f"{best['own_share']:.0%} of the answers stay the LLM's own"
        parts.append(f"{best['speedup']:.1f} times as fast with {best['name']}, where {stay}")
    of_llm = found["seconds"]["slm"]["1"] / found["seconds"]["llm"]["1"]
    slow = f"it is {lossless:.2f} times as fast as the LLM, which overrules {found['overruled']:.0%} of the tokens"
    reason = f"the SLM costs {of_llm:.0%} of the LLM" if of_llm > DEAR else slow
    text = f"yes, {', and '.join(parts)}" if parts else f"no: {reason}"
    if assisted >= PAYS and assisted > lossless:
        text += f"; at the LLM's own text, transformers' assisted generation is faster, {assisted:.1f} times"
    return f"{text}."


# Of the columns of the table: their names, what a row calls them, and how they are shown.
COLUMNS = (
    ("", "name", "{}"),
    ("tokens / s", "tokens_per_second", "{:.3g}"),
    ("× LLM alone", "speedup", "{:.2f}"),
    ("× assisted", "speedup_over_assisted", "{:.2f}"),
    ("LLM's own answers", "own_share", "{:.0%}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("95 % interval", "accuracy_ci", "{0[0]:.1%}–{0[1]:.1%}"),
)


def table(found: Mapping[str, Any]) -> str:
    """Return a report for a terminal."""
    if not found["pair"]["fits"]:
        return str(found["advice"])
    rows = found["rows"]
    # What is not known is left empty, and columns of which nothing is known are left out.
    known = [{name: how.format(row[key]) for name, key, how in COLUMNS if row.get(key) is not None} for row in rows]
    cells = [{name: row.get(name, "") for name, *_ in COLUMNS if any(name in one for one in known)} for row in known]
    slm, llm = (", ".join(f"{1e3 * one:.3g}" for one in found["seconds"][role].values()) for role in ROLES)
    needed, kv, free = (found["memory"][name] / 1e9 for name in ("needed_bytes", "kv_bytes", "free_bytes"))
    about = (
        "The two make a pair, with vocabulary tables of {slm} and {llm} rows.".format(**found["pair"]["tables"])
        + f"\nThey need {needed:.3g} GB, {kv:.2g} GB of it for a sequence; {free:.3g} GB were free."
        + f"\nA pass over {', '.join(map(str, LENGTHS))} tokens takes the SLM {slm} ms, the LLM {llm} ms."
        + f"\nThe LLM overrules the SLM at {found['overruled']:.1%} of the tokens of its own texts."
    )
    return "\n".join([about, "", terminal.table(cells), "", *found["notes"], found["advice"]])
