"""The model card of a router repository, written from the facts that lie in its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .evaluation.evaluate import METHODS
from .evaluation.points import Point
from .evaluation.results import Results
from .files import written_beside

__all__ = ["CARD", "GENERATED", "Facts", "make_card", "write_card"]

CARD, CURVE = "README.md", "curve.png"
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

CHAT_INPUTS = """messages = [{"role": "user", "content": "What is 12 times 7?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
TEXT_INPUTS = 'inputs = tokenizer("What is 12 times 7?", return_tensors="pt")'


@dataclass(frozen=True)
class Facts:
    """What the files of a router repository say.

    Args:
        config: `config.json`.
        provenance: `provenance.json` of `citer train`, if it is there.
        results: `results.json` of `citer evaluate`, if it is there.
        has_curve: Whether the plot is there.
        has_chat: Whether the tokenizer has a chat template.
    """

    config: dict[str, Any]
    provenance: dict[str, Any] | None
    results: Results | None
    has_curve: bool
    has_chat: bool

    @classmethod
    def read(cls, directory: Path) -> Facts:
        """Read a directory.

        Args:
            directory: A router repository.

        Raises:
            OSError: when it has no `config.json`.
            ValueError: when a file holds something else than it should.
        """
        provenance, results = directory / "provenance.json", directory / "results.json"
        tokenizer = directory / "tokenizer_config.json"
        return cls(
            config=read_json(directory / "config.json"),
            provenance=read_json(provenance) if provenance.is_file() else None,
            results=Results.read(results) if results.is_file() else None,
            has_curve=(directory / CURVE).is_file(),
            has_chat=(directory / "chat_template.jinja").is_file()
            or (tokenizer.is_file() and "chat_template" in read_json(tokenizer)),
        )

    @property
    def method(self) -> str:
        """The method that the router belongs to, by the name that results use."""
        kind = self.config["router"]["type"]
        shipped = None if self.results is None else self.results.shipped
        return str(shipped or (self.provenance or {}).get("objective") or METHODS.get(kind, kind))

    @property
    def points(self) -> list[Point]:
        """The measured points of this router, from few to many LLM tokens."""
        return [] if self.results is None else self.results.methods.get(self.method, [])

    def reference(self, role: str) -> dict[str, Any]:
        """Where a base model is.

        Args:
            role: `slm` or `llm`.
        """
        return self.config.get(f"{role}_reference") or {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Write the file again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}. Write the file again.")
    return values


def write_card(directory: Path, repo_id: str, tags: Sequence[str] = ()) -> None:
    """Write the card into a directory, unless it holds one that a person wrote.

    The metadata of a card that is there already (a licence, languages) stays.

    Args:
        directory: A router repository.
        repo_id: Where it will be on the Hub.
        tags: More tags.

    Raises:
        OSError: when a file is missing or cannot be written.
        ValueError: when a file holds something else than it should.
    """
    path = directory / CARD
    metadata: dict[str, Any] = {}
    if path.is_file():
        present = path.read_text(encoding="utf-8")
        if GENERATED not in present:
            return
        metadata = dict(ModelCard(present, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    metadata["tags"] = [*(metadata.get("tags") or ()), *tags]
    card = make_card(Facts.read(directory), repo_id, metadata)
    with written_beside(path) as file:
        file.write(str(card).encode())


def make_card(facts: Facts, repo_id: str, metadata: dict[str, Any] | None = None) -> ModelCard:
    """Make the card.

    Args:
        facts: What the repository's files say.
        repo_id: Where the repository will be on the Hub.
        metadata: What a user has put into the card's metadata.
    """
    references = [facts.reference(role) for role in ("slm", "llm")]
    named = [one for reference in references for one in (reference, reference.get("adapter") or {})]
    bases = [name for one in named if (name := one.get("name_or_path"))]
    # The Hub's relation for a small set of weights that works on top of a model as it is.
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
    """Return the metadata of the evaluation: the measured point that is nearest to the saved threshold.

    Args:
        facts: What the repository's files say.
        name: The model's name.
    """
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
    """Name the data of an evaluation: as it was called, or by the fingerprint of its problems.

    Args:
        results: Of the evaluation.
    """
    given = (results.provenance.get("arguments") or {}).get("data")
    return str(given or f"sha256:{str(results.provenance.get('data_sha256', 'unknown'))[:12]}")


def parts(facts: Facts) -> list[tuple[str, str]]:
    """Return the two models, the router and the saved threshold, each with its name.

    Args:
        facts: What the repository's files say.
    """
    return [
        *((role.upper(), place(facts.reference(role), role)) for role in ("slm", "llm")),
        ("router", f"`{facts.config['router']['type']}`"),
        ("threshold", f"{facts.config.get('router_threshold', 0.5):.4g}"),
    ]


def place(reference: dict[str, Any], role: str) -> str:
    """Say where a base model is, and its adapter if it has one.

    Args:
        reference: What the configuration says.
        role: `slm` or `llm`.
    """
    if reference.get("adapter"):
        base = {key: value for key, value in reference.items() if key != "adapter"}
        return f"{place(base, role)} with the adapter {place(reference['adapter'], role)}"
    name, revision = reference.get("name_or_path"), reference.get("revision")
    if name is None:
        return f"in the folder `{reference['subfolder']}`" if "subfolder" in reference else "in `model.safetensors`"
    return f"[{name}](https://huggingface.co/{name})" + (f" at `{revision[:12]}`" if revision else "")


def results_text(facts: Facts) -> str:
    """Return the curve and the table of thresholds.

    Args:
        facts: What the repository's files say.
    """
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
    return (
        f"{curve if facts.has_curve else ''}{' '.join(about)}:\n\n"
        "| threshold | expected LLM share of the tokens | accuracy | 95 % interval |\n"
        f"| ---: | ---: | ---: | ---: |\n{table}{note}\n\nAll figures are in `results.json`."
    )


def training_text(facts: Facts) -> str:
    """Say how the router was trained.

    Args:
        facts: What the repository's files say.
    """
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
    """Return what to be careful about.

    Args:
        facts: What the repository's files say.
    """
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
