"""The model card of a router repository, written from the facts that lie in its directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .evaluation.results import Results
from .facts import CURVE, Facts
from .runs import atomic_write

__all__ = ["CARD", "GENERATED", "make_card", "write_card"]

logger = logging.getLogger(__name__)

CARD = "README.md"
GENERATED = "<!-- Written by citer_hf from the files beside it. Remove this line to keep what you change below. -->"
TAGS = ["citer", "token-level-routing"]

TEXT = """
{generated}

# {name}

Two language models that decode as one: a small one (SLM) for the easy tokens, a large one (LLM) for the critical ones.
A router decides, token by token: the SLM writes where its score reaches the threshold, the LLM elsewhere. The method
is CITER ([arXiv 2502.01976](https://arxiv.org/abs/2502.01976)).

| | |
| --- | --- |
{parts}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{repo_id}"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto")

{inputs}
output = model.generate(**inputs, max_new_tokens=64, router_threshold={threshold}, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(output.past_key_values.routing.llm_share)  # share of the tokens that the LLM wrote
```

The code of the model lies in this repository; `trust_remote_code=True` runs it, and does not reach the two models.
With `citer_hf` installed and imported, leave it out. Threshold 0 is the SLM alone, anything above 1 the LLM alone.

## Accuracy and cost

{results}

## Training

{training}

## Limits

{limits}

## Citation

```bibtex
@inproceedings{{zheng2025citer,
  title={{{{CITER}}: Collaborative Inference for Efficient Large Language Model Decoding with Token-Level Routing}},
  author={{Zheng, Wenhao and Chen, Yixiao and Zhang, Weitong and Kundu, Souvik and Li, Yun and Liu, Zhengzhong and
          Xing, Eric P. and Wang, Hongyi and Yao, Huaxiu}},
  booktitle={{Conference on Language Modeling}},
  year={{2025}}
}}
```
"""

UNSURE = (
    "\n\nThe results do not say which router of this kind they measured; who pushed them says that it is this one."
)
CHAT_INPUTS = """messages = [{"role": "user", "content": "What is 12 times 7?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
TEXT_INPUTS = 'inputs = tokenizer("What is 12 times 7?", return_tensors="pt")'


def write_card(directory: Path, repo_id: str, tags: Sequence[str] = ()) -> None:
    """Write the card into a directory, unless it holds one that a person wrote."""
    path = directory / CARD
    metadata: dict[str, Any] = {}
    if path.is_file():
        present = path.read_text(encoding="utf-8")
        if GENERATED not in present:
            return
        metadata = dict(ModelCard(present, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    metadata["tags"] = [*(metadata.get("tags") or ()), *tags]
    facts = Facts.read(directory)
    for message in facts.foreign:
        logger.warning("The card leaves it out. %s", message)
    card = make_card(facts, repo_id, metadata)
    with atomic_write(path) as file:
        file.write(str(card).encode())


def make_card(facts: Facts, repo_id: str, metadata: dict[str, Any] | None = None) -> ModelCard:
    """Make the card."""
    named = [name for role in ("slm", "llm") for name in models_of(facts, role)]
    bases = list(dict.fromkeys(named))
    # The Hub's relation for a small set of weights that works on top of a model as it is: the router does, whether the
    # models lie elsewhere or beside it. They are not merged, tuned or quantized by being put there.
    known: dict[str, Any] = {"base_model": bases, "base_model_relation": "adapter"} if bases else {}
    metadata = metadata or {}
    tags = list(dict.fromkeys([*TAGS, *metadata.get("tags", ())]))
    kept = {key: value for key, value in metadata.items() if key not in ("model-index", *known)}
    data = ModelCardData(
        **{**kept, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags},
        **known,
        **measured(facts, repo_id.split("/")[-1]),
    )
    text = TEXT.format(
        generated=GENERATED,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        parts="\n".join(f"| {name} | {value} |" for name, value in parts(facts)),
        inputs=CHAT_INPUTS if facts.has_chat else TEXT_INPUTS,
        threshold=f"{facts.config.get('router_threshold', 0.5):.4g}",
        results=results_text(facts),
        training=training_text(facts),
        limits="\n".join(f"- {limit}" for limit in limits(facts)),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def measured(facts: Facts, name: str) -> dict[str, Any]:
    """Return the metadata of the evaluation: the measured point that is nearest to the saved threshold."""
    threshold = facts.config.get("router_threshold", 0.5)
    with_threshold = [
        (abs(point.threshold - threshold), point) for point in facts.points if point.threshold is not None
    ]
    if not with_threshold or facts.results is None:
        return {}
    point = min(with_threshold, key=lambda one: one[0])[1]
    data = dataset(facts.results)
    metrics = {
        "accuracy": ("Accuracy", point.accuracy),
        "llm_share": ("Share of tokens written by the LLM", point.llm_share),
    }
    return {
        "model_name": name,
        "eval_results": [
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=data,
                metric_type=kind,
                metric_name=f"{title} at threshold {point.threshold:.4g}",
                metric_value=value,
            )
            for kind, (title, value) in metrics.items()
        ],
    }


def dataset(results: Results) -> str:
    """Name the data of an evaluation: as it was called, or by the fingerprint of its problems."""
    given = (results.provenance.get("arguments") or {}).get("data")
    return str(given or f"sha256:{str(results.provenance.get('data_sha256', 'unknown'))[:12]}")


def parts(facts: Facts) -> list[tuple[str, str]]:
    """Return the two models, the router and the saved threshold, each with its name."""
    return [
        *((role.upper(), place(facts, role)) for role in ("slm", "llm")),
        ("router", f"`{facts.config['router']['type']}`"),
        ("threshold", f"{facts.config.get('router_threshold', 0.5):.4g}"),
    ]


def place(facts: Facts, role: str) -> str:
    """Say where a base model is, and which one it is."""
    reference, adapter, base = facts.reference(role), facts.adapter(role), facts.base(role)
    link = "" if base is None else link_to(*base)
    with_adapter = ""
    if adapter:
        name, revision = adapter.get("name_or_path"), adapter.get("revision", "")
        with_adapter = " with the adapter " + (link_to(name, revision) if name else f"in `{adapter['subfolder']}`")
    if "name_or_path" in reference:
        return link + with_adapter
    folder = f"in the folder `{reference['subfolder']}`" if "subfolder" in reference else "in `model.safetensors`"
    return (f"{folder}, loaded from {link}" if link else folder) + with_adapter


def models_of(facts: Facts, role: str) -> list[str]:
    """Return the published models behind a base model: itself, and its adapter if it has one."""
    base, adapter = facts.base(role), facts.adapter(role).get("name_or_path")
    return [*([] if base is None else base[:1]), *([adapter] if adapter else [])]


def link_to(name: str, revision: str) -> str:
    """Return a link to a repository at a commit."""
    return f"[{name}](https://huggingface.co/{name})" + (f" at `{revision[:12]}`" if revision else "")


def results_text(facts: Facts) -> str:
    """Return the curve and the table of thresholds."""
    if facts.results is None:
        return "Not measured: this repository holds no results of `citer evaluate`."
    ends = facts.results.ends
    provenance = facts.results.provenance
    about = [f"{provenance['problems']} problems" if "problems" in provenance else "Problems"]
    about += [f"of `{dataset(facts.results)}`"]
    about += [f"graded by `{provenance['checker']}`"] if "checker" in provenance else []
    rows = [
        ("SLM alone", ends["slm"]),
        *((f"{point.threshold:.4g}" if point.threshold is not None else "–", point) for point in facts.points),
        ("LLM alone", ends["llm"]),
    ]
    table = "\n".join(
        f"| {name} | {point.llm_share:.1%} | {point.accuracy:.1%} | "
        f"{point.accuracy_ci[0]:.1%} to {point.accuracy_ci[1]:.1%} |"
        for name, point in rows
    )
    curve = f"![Accuracy against the share of tokens that the LLM writes, and against bytes]({CURVE})\n\n"
    note = "" if facts.points else f"\n\nThe results do not measure this router (`{facts.method}`)."
    runs = len(provenance.get("runs", ()))
    note += f"\n\nMeans over {runs} routers of different seeds, of which this is one." if runs else ""
    note += UNSURE if facts.points and facts.measured_as is None else ""
    return (
        f"{curve if facts.has_curve else ''}{' '.join(about)}:\n\n"
        "| threshold | expected LLM share of the tokens | accuracy | 95 % interval |\n"
        f"| ---: | ---: | ---: | ---: |\n{table}{note}\n\nAll figures are in `results.json`."
    )


def training_text(facts: Facts) -> str:
    """Say how the router was trained."""
    provenance = facts.provenance
    if provenance is None:
        untrained = facts.config["router"]["type"] in ("confidence", "entropy", "random")
        return "This kind of router needs no training." if untrained else "This repository does not say how."
    labels, validation = provenance.get("labels") or {}, provenance.get("validation") or {}
    lines = [f"`citer train` with the objective `{provenance.get('objective')}`, rounds: {provenance.get('rounds')}."]
    if labels:
        data = f" (data `{str(labels['data'])[:12]}`)" if "data" in labels else ""
        lines.append(
            f"The labels were made from {labels.get('examples')} examples{data} with the checker "
            f"`{labels.get('checker')}`."
        )
    if validation.get("auc") is not None:
        lines.append(
            f"On {validation['questions']} held-out questions the router tells tokens that need the LLM from others "
            f"with an AUC of {validation['auc']:.3f} and a calibration error of {validation['calibration_error']:.3f}."
        )
    return " ".join(lines) + " All arguments and versions are in `provenance.json`."


def limits(facts: Facts) -> list[str]:
    """Return what to be careful about."""
    found = [
        "The router was made for these two models. Another SLM, or another revision of it, needs another router.",
        "The text can be no better than the two models; their licences, biases and limits are its own.",
    ]
    if facts.results is None:
        found.append("Nothing is known here about its accuracy. Measure it on your task with `citer evaluate`.")
    else:
        found.append(
            "The figures are of the problems above. On another task, find a threshold with `citer calibrate`."
        )
    return found
