"""How much faster `label_preferences` is than labelling token by token: `python docs/benchmarks/labelling.py`.

Token by token is what the method's released code does: one `generate(max_new_tokens=1)` per model and token, along
the references and in roll-outs. A second comparison gives every roll-out one `generate` of ours, with its caches. All
label the same questions of the shipped pair with the same policy, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from citer_hf import DEMO_PAIR, CiterForCausalLM
from citer_hf.data.checkers import get_checker
from citer_hf.data.tokens import Encoded
from citer_hf.demo.problems import problems
from citer_hf.training.label import label_preferences

MAX_NEW_TOKENS = 160


def token_by_token(
    model: Any, tokenizer: Any, questions: Sequence[Encoded], threshold: float, step: int
) -> tuple[list[int], list[int]]:
    """Return case and outcome (-1 without a roll-out) of every token; a roll-out's `generate` writes `step` tokens."""
    checker = get_checker("math")
    settings = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    cases, outcomes = [], []
    for question in questions:
        for place, reference in enumerate(question.response_ids):
            text = question.prompt_ids + question.response_ids[:place]
            ids = torch.tensor([text])
            slm, llm = (
                int(part.generate(ids, max_new_tokens=1, **settings)[0, -1]) for part in (model.slm, model.llm)
            )
            cases.append(1 if slm == reference else 2 if llm == reference else 3)
            outcome = -1
            for action in (slm, llm) if slm != reference else ():
                state, longest = torch.tensor([[*text, action]]), len(question.prompt_ids) + MAX_NEW_TOKENS
                while state[0, -1] != tokenizer.eos_token_id and state.shape[1] < longest:
                    room = min(step, longest - state.shape[1])
                    state = model.generate(state, max_new_tokens=room, router_threshold=threshold, **settings)
                response = tokenizer.decode(state[0, len(question.prompt_ids) :], skip_special_tokens=True)
                correct = int(checker(response, question.example).correct)
                if outcome < 0:
                    outcome = correct
                if correct:
                    break
            outcomes.append(outcome)
    return cases, outcomes


def main() -> None:
    """Measure, and print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=64, help="labelled by `label_preferences`")
    parser.add_argument("--one-by-one", type=int, default=4, help="of them, labelled token by token")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    tokenizer = model.load_tokenizer()
    examples = [asdict(problem) for problem in problems("train", 0, options.questions)]
    for threshold in (0.0, model.config.router_threshold, 2.0):
        ours: list[float] = []
        one_by_one: list[float] = []
        cached: list[float] = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                labels = label_preferences(
                    model,
                    examples,
                    "math",
                    Path(folder) / "labels",
                    router_threshold=threshold,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
                ours.append((time.perf_counter() - began) / len(labels.case))
            # Questions are in the order of their lengths: evenly spread, some are as long as all on average.
            every = max(options.questions // options.one_by_one, 1)
            asked = list(range(every // 2, options.questions, every))
            chosen = torch.isin(labels.question, torch.tensor(asked))
            for times, step in ((one_by_one, 1), (cached, MAX_NEW_TOKENS)):
                questions = [labels.questions[one] for one in asked]
                began = time.perf_counter()
                cases, outcomes = token_by_token(model, tokenizer, questions, threshold, step)
                times.append((time.perf_counter() - began) / len(cases))
                assert cases == labels.case[chosen].tolist()
                same = float((torch.tensor(outcomes) == labels.rollout[chosen]).float().mean())
        by_token, by_rollout = (
            statistics.median(one / other for one, other in zip(times, ours, strict=True))
            for times in (one_by_one, cached)
        )
        slow, fast = (statistics.median(times) * 1e3 for times in (one_by_one, cached))
        print(
            f"policy at threshold {threshold:.3g}: {statistics.median(ours) * 1e3:.2f} ms per token; token by token "
            f"{slow:.2f} ms, {by_token:.1f} times as long; one cached generate per roll-out {fast:.2f} ms, "
            f"{by_rollout:.1f} times (all cases and {same:.2%} of the outcomes are the same)",
            flush=True,
        )


if __name__ == "__main__":
    main()
