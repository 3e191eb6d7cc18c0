"""A column of prompts through a pipeline and through a trainer: the text of each row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TextGenerationPipeline,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from citer_hf import CiterForCausalLM
from citer_hf.demo import DEMO_PAIR
from citer_hf.demo.problems import problems

OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "router_threshold": 0.9}


@pytest.fixture(scope="module")
def pipe() -> TextGenerationPipeline:
    model = CiterForCausalLM.from_pretrained(DEMO_PAIR, dtype=torch.float32)
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(DEMO_PAIR))


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    """Prompts of many lengths; some texts end early."""
    told = [one.prompt for one in problems("test", 0, 10)]
    return Dataset.from_dict({"prompt": told + [" ".join(one.split()[:4]) for one in told[:3]]})


@pytest.fixture(scope="module")
def alone(pipe: Any, prompts: Dataset) -> list[str]:
    """The text of every row, one row after the other."""
    texts = [pipe(prompt, return_full_text=False, **OPTIONS)[0]["generated_text"] for prompt in prompts["prompt"]]
    assert len({len(text) for text in texts}) > 2
    return texts


def test_a_pipeline_over_a_column_writes_what_each_row_gets_alone(pipe: Any, prompts: Dataset, alone: Any) -> None:
    outputs = pipe(KeyDataset(prompts, "prompt"), batch_size=4, return_full_text=False, **OPTIONS)
    texts = [row[0]["generated_text"] for row in tqdm(outputs, total=len(prompts), disable=True)]
    assert texts == alone


def test_a_trainer_predicts_it_too(pipe: Any, prompts: Dataset, alone: Any, tmp_path: Path) -> None:
    tokenizer = pipe.tokenizer
    encoded = prompts.map(lambda batch: tokenizer(batch["prompt"]), batched=True, remove_columns=["prompt"])
    encoded = encoded.map(lambda row: {"labels": row["input_ids"]})
    settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = Seq2SeqTrainer(
        model=pipe.model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, per_device_eval_batch_size=4, **settings
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    found = trainer.predict(encoded, **OPTIONS)
    tokens = torch.tensor(found.predictions).masked_fill(torch.tensor(found.predictions) == -100, 0)
    longest = [max(len(row) for row in encoded["input_ids"][start : start + 4]) for start in range(0, len(encoded), 4)]
    texts = [
        tokenizer.decode(row[longest[index // 4] :], skip_special_tokens=True) for index, row in enumerate(tokens)
    ]
    assert texts == alone
    assert "test_loss" in found.metrics
