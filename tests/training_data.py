"""Tasks for tiny random pairs: examples, a checker that random texts pass at times, and labels that are made up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from citer_hf import CiterForCausalLM
from citer_hf.data.checkers import Verdict
from citer_hf.data.examples import Example
from citer_hf.data.tokens import Encoded
from citer_hf.training.labels import BOTH_WRONG, LLM_RIGHT, SLM_RIGHT, Labels
from tests.chat_pairs import CHARACTERS, character_tokenizer
from tests.conftest import make_pair, random_prompts
from tests.families import BOS, EOS, PAD
from tests.reference import naive_generate

THRESHOLD = 0.5
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012345"


class LetterTokenizer:
    """One token per letter."""

    eos_token_id, bos_token_id, pad_token_id, unk_token_id = EOS, BOS, PAD, None
    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) + 3 for letter in text]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(LETTERS[index - 3] for index in ids if index >= 3)


def examples(lengths: Sequence[int] = (5, 9, 12, 7, 3, 9), answer: str | None = "y") -> list[Example]:
    """Random prompts in letters, which start at row 11."""
    prompts = enumerate(map(LetterTokenizer().decode, random_prompts(tuple(lengths))), 11)
    return [Example(id=str(row), row=row, prompt=prompt, answer=answer) for row, prompt in prompts]


def task_pair(slm: str = "llama", llm: str = "llama", router: Any = "confidence") -> CiterForCausalLM:
    """A tiny random pair with a tokenizer of characters, which writes a few tokens before it ends."""
    model = make_pair(slm, llm, router=router, threshold=THRESHOLD)
    model._tokenizer = character_tokenizer()
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS, max_length=None)
    return model


def task(count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Random prompts and references of different lengths; the answer is a letter that random texts have at times."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> str:
        return "".join(CHARACTERS[index] for index in torch.randint(0, 36, (length,), generator=generator).tolist())

    texts = [(text(4 + 2 * index), text(5 + index % 3)) for index in range(count)]
    return [
        {"id": f"q{index}", "prompt": prompt, "response": response, "answer": "etao"[index % 4]}
        for index, (prompt, response) in enumerate(texts)
    ]


def has_letter(response: str, example: Example) -> Verdict:
    """Right when the answer is among the letters; a text without an `e` gives no answer."""
    return Verdict(str(example.answer) in response, "e" if "e" in response else None)


def naive_outcome(model: Any, labels: Labels, token: int, action: int, threshold: float, new: int) -> bool:
    """Whether the answer is right when an action is taken and the pair goes on, one token after the other."""
    question = labels.questions[int(labels.question[token])]
    response = [*question.response_ids[: int(labels.position[token])], action]
    if action != EOS and len(response) < new:
        response += naive_generate(model, question.prompt_ids + response, new - len(response), threshold)[0]
    return has_letter(model.load_tokenizer().decode(response, skip_special_tokens=True), question.example).correct


def made_up_labels(questions: int = 24, tokens: int = 20, hidden_size: int = 6, seed: int = 0) -> Labels:
    """Labels that can be learned: the LLM is preferred where the first two numbers of the hidden state are large."""
    generator = torch.Generator().manual_seed(seed)
    count = questions * tokens
    hidden = torch.randn((count, hidden_size), generator=generator).half()
    hard = (hidden[:, 0] + hidden[:, 1]) > 1.5
    case = torch.where(hard, torch.tensor([2, 3, 3])[torch.randint(0, 3, (count,), generator=generator)], SLM_RIGHT)
    case = torch.where((case == SLM_RIGHT) & (torch.rand(count, generator=generator) < 0.2), LLM_RIGHT, case)
    rollout = torch.where(case == SLM_RIGHT, -1, (~hard).long())
    asked = Encoded(Example(id="q", row=1, prompt="p", answer="a"), [3], [4])
    return Labels(
        directory=Path("made-up"),
        info={},
        questions=[asked] * questions,
        slm_correct=torch.rand(questions, generator=generator) < 0.5,
        llm_correct=torch.ones(questions, dtype=torch.bool),
        question=torch.arange(questions).repeat_interleave(tokens),
        position=torch.arange(tokens).repeat(questions),
        hidden=hidden,
        top_logprobs=-torch.rand((count, 8), generator=generator).sort(dim=1).values.half(),
        case=case,
        reference_token=torch.full((count,), 4),
        slm_token=torch.where(case == SLM_RIGHT, 4, 5),
        llm_token=torch.where((case == BOTH_WRONG) & hard, 6, torch.where(case == BOTH_WRONG, 5, 4)),
        slm_logprob=-torch.rand(count, generator=generator),
        llm_logprob=-torch.rand(count, generator=generator),
        label=torch.where(case == 3, rollout, (case == SLM_RIGHT).long()),
        rollout=rollout,
        llm_rollout=torch.where(rollout == 0, 1, -1),
    )
