"""What is written beside labels: `labels.json` for programs, and a card for people and for `datasets`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from citer_hf.evaluation.provenance import versions
from citer_hf.runs import atomic_write

from .labels import INFO
from .outcomes import Outcome
from .reading import ReadTokens
from .rollouts import RollOut

__all__ = ["write_card"]

CASES = {1: "the SLM's token is the reference", 2: "the LLM's is, the SLM's is not", 3: "neither is"}
CARD = """---
configs:
- config_name: tokens
  default: true
  data_files: data/*.parquet
- config_name: questions
  data_files: questions/*.parquet
tags:
- citer
---

# Preferences of a pair of language models

Which of two models should write each token of {questions} reference answers ({tokens} tokens), labelled with
`citer label` for CITER ([arXiv 2502.01976](https://arxiv.org/abs/2502.01976)).

| case | | tokens | share | with a roll-out | of these right |
| --- | --- | --- | --- | --- | --- |
{cases}

- `label`: 1 where the SLM's token is good enough, 0 where the LLM must write (cases 1, 2, and 3 by its roll-out),
  empty where no roll-out was made.
- `rollout`: whether the answer is right when the SLM's token is taken and the policy (the pair's router at
  {rollout_threshold}) writes the rest. It is made for case 2 too, which the paper's `label` does not look at.
- `llm_rollout`: the same for the LLM's token, where the SLM's has failed.
- {unextracted:.1%} of the roll-outs had no answer that could be extracted; they count as wrong.
- Alone, the SLM answers {slm:.1%} of the questions rightly, the LLM {llm:.1%}.

Made with these arguments, seed and versions (`{info}` has them too; fingerprints are of what labels depend on):

```json
{arguments}
```
"""


def write_card(
    out: Path,
    arguments: dict[str, Any],
    read: ReadTokens,
    outcomes: Mapping[RollOut, Outcome],
    answers: Mapping[str, Sequence[Outcome]],
) -> None:
    """Write the card, and `labels.json`, which says that the labels are complete."""
    facts = count(read, outcomes, answers)
    cases = "\n".join(
        f"| {case} | {what} | {facts['cases'][case]} | {facts['cases'][case] / facts['tokens']:.1%} | "
        f"{facts['rollouts'][case]} | {share(facts['right'][case], facts['rollouts'][case])} |"
        for case, what in CASES.items()
    )
    card = CARD.format(
        cases=cases,
        info=INFO,
        arguments=json.dumps({**arguments, "versions": versions()}, indent=2),
        questions=facts["questions"],
        tokens=facts["tokens"],
        rollout_threshold=arguments["rollout_threshold"],
        unextracted=facts["unextracted"],
        slm=facts["slm_accuracy"],
        llm=facts["llm_accuracy"],
    )
    info = {**arguments, "counts": facts, "versions": versions()}
    for name, text in (("README.md", card), (INFO, json.dumps(info, indent=2) + "\n")):
        with atomic_write(out / name) as file:
            file.write(text.encode())


def count(
    read: ReadTokens, outcomes: Mapping[RollOut, Outcome], answers: Mapping[str, Sequence[Outcome]]
) -> dict[str, Any]:
    """Count tokens, cases and roll-outs."""
    cases, rolled, right = Counter(read.case.tolist()), Counter[int](), Counter[int]()
    for token in read.mismatches():
        outcome = outcomes.get(read.rollout(token))
        if outcome is not None:
            rolled[int(read.case[token])] += 1
            right[int(read.case[token])] += outcome.correct
    without = sum(not one.extracted for one in outcomes.values())
    return {
        "questions": len(answers["slm"]),
        "tokens": len(read.case),
        "cases": {case: cases[case] for case in CASES},
        "rollouts": {case: rolled[case] for case in CASES},
        "right": {case: right[case] for case in CASES},
        "positive_rollouts": sum(right.values()) / max(sum(rolled.values()), 1),
        "unextracted": without / max(len(outcomes), 1),
        "slm_accuracy": sum(one.correct for one in answers["slm"]) / len(answers["slm"]),
        "llm_accuracy": sum(one.correct for one in answers["llm"]) / len(answers["llm"]),
    }


def share(part: int, whole: int) -> str:
    """Return a share in percent, or a dash where there is nothing."""
    return f"{part / whole:.1%}" if whole else "–"
