"""Train the pair that ships with citer_hf, from scratch.

    python docs/examples/word_problems/train.py --out pair

The command writes pair/slm, pair/llm, and pair/router, which wraps both with the `confidence` router. The same command
resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from citer_hf import CiterForCausalLM
from citer_hf.demo.problems import PHRASES, Problem, drill, is_correct, problem, problems

SEED = 0
CONTEXT = 1024
# On 300 validation problems the pair solves 96 % with 28 % of the tokens from the LLM, which alone solves 99 %.
THRESHOLD = 0.8
IGNORED = -100

# --- Tokenizer: one token per word, digit or sign, with the space before it -----------------------------------------

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PIECE = r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s"

# A turn of a chat reads as a problem does: the question, a line break, the response, the end.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '\\n' + message['content'] | trim + eos_token }}"
    "{%- else -%}"
    "{{ message['content'] | trim }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the words of the phrases; the same words always get the same ids."""
    entries = [PAD, EOS, UNKNOWN, *_pieces()]
    tokenizer = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    # The tokens carry their own spaces: text is what they give when joined.
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _pieces() -> list[str]:
    """Return the signs, the digits and the words of the phrases, each in the forms that a text can have it in."""
    phrases = [re.sub(r"\{[a-z ]+\}", " ", phrase) for options in PHRASES["phrases"].values() for phrase in options]
    told = " ".join([*phrases, *PHRASES["names"], *PHRASES["names"].values(), *PHRASES["items"], *PHRASES["things"]])
    words = sorted(set(re.findall(r"[A-Za-z]+", told)))
    digits = [str(digit) for digit in range(10)]
    # A text opens with a capital or a digit, so only these also occur without a space before them.
    openings = [word for word in words if word[0].isupper()]
    signs = ["\n", ".", ",", "?", " +", " -", " *", " ="]
    return [*signs, *digits, *(f" {digit}" for digit in digits), *openings, *(f" {word}" for word in words)]


# --- Batches: each is made from its number alone --------------------------------------------------------------------

# A block is what is sorted by length together, so that a batch holds little padding.
SINGLES, CHATS, DRILLS = 15, 4, 1
BLOCK = SINGLES + CHATS + DRILLS

Labelled = tuple[list[int], list[int]]
"""The tokens of a sequence, and its labels."""


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Item `i` is training batch number `i`: single problems, chats of two or three problems, or bare calculations."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, count: int, size: int = 32) -> None:
        self.tokenizer, self.seed, self.count, self.size = tokenizer, seed, count, size
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return collate(self._block(index // BLOCK)[index % BLOCK], self.tokenizer.pad_token_id)

    def _make_block(self, number: int) -> list[list[Labelled]]:
        rng = random.Random(f"block/{self.seed}/{number}")
        told = (SINGLES + CHATS) * self.size
        fresh = (problem("train", self.seed, number * told + index) for index in range(told))
        singles = [labelled(self.tokenizer, [single]) for single in islice(fresh, SINGLES * self.size)]
        chats = [labelled(self.tokenizer, turns) for turns in _groups(fresh, rng)]
        drills = [labelled(self.tokenizer, [drill(rng) for _ in range(6)]) for _ in range(DRILLS * self.size)]
        batches = _cut(singles, SINGLES) + _cut(chats, CHATS) + _cut(drills, DRILLS)
        rng.shuffle(batches)
        return batches


def labelled(tokenizer: PreTrainedTokenizerFast, turns: list[Problem]) -> Labelled:
    """Encode problems one after the other as a chat does; labels are the responses and the end of each."""
    tokens: list[int] = []
    labels: list[int] = []
    for turn in turns:
        prompt, response = tokenizer([turn.prompt, turn.response + tokenizer.eos_token]).input_ids
        tokens += prompt + response
        labels += [IGNORED] * len(prompt) + response
    return tokens, labels


def collate(sequences: list[Labelled], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad sequences on the right, where causal attention needs no mask."""
    longest = max(len(tokens) for tokens, _ in sequences)
    return {
        "input_ids": torch.tensor([tokens + [pad_token_id] * (longest - len(tokens)) for tokens, _ in sequences]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in sequences]),
    }


def _groups(fresh: Iterator[Problem], rng: random.Random) -> Iterator[list[Problem]]:
    while group := list(islice(fresh, rng.choice([2, 3]))):
        yield group


def _cut(sequences: list[Labelled], count: int) -> list[list[Labelled]]:
    """Cut sequences into batches of similar lengths."""
    sequences = sorted(sequences, key=lambda pair: len(pair[0]))
    bounds = [len(sequences) * cut // count for cut in range(count + 1)]
    return [sequences[start:end] for start, end in pairwise(bounds)]


# --- Evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], batch_size: int = 100
) -> float:
    """Return the share of problems that a model answers correctly, greedily."""
    correct = 0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        inputs = tokenizer([problem.prompt for problem in batch], padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=160, use_cache=True)
        responses = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        correct += sum(map(is_correct, responses, batch))
    return correct / len(problems)


@torch.inference_mode()
def agreement(model: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> float:
    """Return the share of tokens of the reference responses that are the model's best token there."""
    right = total = 0
    for told in problems:
        prompt, response = tokenizer([told.prompt, told.response + tokenizer.eos_token]).input_ids
        tokens = torch.tensor([prompt + response], device=model.device)
        best = model(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += int((best == tokens[0, len(prompt) :]).sum())
        total += len(response)
    return right / total


# --- Training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The shape of a model and how long it is trained."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    steps: int
    learning_rate: float


RECIPES = {
    # Four heads copy numbers reliably; the narrow MLP is what the model errs by, mostly in subtractions.
    "slm": Recipe(hidden_size=40, layers=2, heads=4, intermediate_size=16, steps=8000, learning_rate=4e-3),
    "llm": Recipe(hidden_size=160, layers=4, heads=5, intermediate_size=432, steps=2600, learning_rate=2e-3),
}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model with fresh weights."""
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=160, **special)
    return model


def train(recipe: Recipe, out: Path, evaluate_every: int = 400, batch_size: int = 32) -> LlamaForCausalLM:
    """Train one model, from its last checkpoint if there is one, and save it with its tokenizer."""
    set_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    checkpoints = out / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        # An item of the data set is a whole batch, and their order is the data set's.
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        save_steps=evaluate_every,
        save_total_limit=2,
        logging_steps=50,
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=SEED,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Batches(tokenizer, SEED, recipe.steps, batch_size),
        data_collator=lambda items: items[0],
        callbacks=[ValidationAccuracy(tokenizer)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    # `Trainer` turns the cache off for good, and a saved model would decode without one.
    model.config.use_cache = True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


class ValidationAccuracy(TrainerCallback):
    """Prints the accuracy on validation problems at every checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, count: int = 200) -> None:
        self.tokenizer, self.problems = tokenizer, list(problems("validation", SEED, count))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Solve the problems."""
        model = kwargs["model"].eval()
        share = accuracy(model, self.tokenizer, self.problems)
        model.train()
        print(f"step {state.global_step}: {share:.1%} of {len(self.problems)} validation problems", flush=True)


def report(name: str, model: LlamaForCausalLM, count: int = 500) -> None:
    """Print the size of a trained model and how it does on test problems."""
    tokenizer, test = build_tokenizer(), list(problems("test", SEED, count))
    model.eval()
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    solved, followed = accuracy(model, tokenizer, test), agreement(model, tokenizer, test)
    print(f"{name}: {weights} parameters beside the embeddings, {solved:.1%} of {count} test problems right,")
    print(f"{followed:.1%} of the tokens of the reference responses are its best token", flush=True)


def make_router_repository(pair: Path, out: Path, threshold: float) -> None:
    """Wrap the trained pair into the self-contained directory that ships."""
    model = CiterForCausalLM.from_pair(
        str(pair / "slm"), str(pair / "llm"), router="confidence", router_threshold=threshold
    )
    model.save_pretrained(out, save_base_models=True)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and wrap the pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for slm/, llm/ and router/")
    parser.add_argument("--model", choices=["slm", "llm", "both"], default="both")
    parser.add_argument("--router-threshold", type=float, default=THRESHOLD, help="of the confidence router")
    parser.add_argument("--threads", type=int, help="threads to train with (default: torch's choice)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in RECIPES if options.model == "both" else [options.model]:
        report(name, train(RECIPES[name], options.out / name))
    if options.model == "both":
        make_router_repository(options.out, options.out / "router", options.router_threshold)


if __name__ == "__main__":
    main()
