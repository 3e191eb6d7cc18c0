"""`generate` with settings that people publish, keep and combine: the pair does what the plain model does."""

import copy
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, GenerationConfig, PreTrainedModel, Seq2SeqTrainer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import citer_hf
from citer_hf import CiterForCausalLM
from citer_hf.demo import DEMO_PAIR
from citer_hf.demo.problems import problems
from tests.chat_pairs import character_tokenizer
from tests.conftest import left_padded, make_pair, random_prompts
from tests.families import tiny_model

ONE = left_padded(random_prompts((6,)))
THREE = left_padded(random_prompts((5, 9, 12)))
BATCHES = [ONE, THREE]
SHORT: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_model("llama", seed=1)


@pytest.fixture
def model() -> CiterForCausalLM:
    """A pair whose SLM is the plain model."""
    return make_pair(router="random", threshold=0.5)


def alike(pair: CiterForCausalLM, alone: PreTrainedModel, batch: dict[str, torch.Tensor], **settings: Any) -> None:
    """The pair at threshold 0 generates, or raises, what its SLM does alone."""
    try:
        expected = alone.generate(**batch, **SHORT, **settings)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            pair.generate(**batch, **SHORT, **settings, router_threshold=0.0)
        assert str(caught.value) == str(error)
    else:
        assert torch.equal(pair.generate(**batch, **SHORT, **settings, router_threshold=0.0), expected)


PUBLISHED: list[dict[str, Any]] = [
    *({"cache_implementation": name} for name in ("static", "offloaded_static", "hybrid", "hybrid_chunked")),
    *({"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"stop_strings": ["ab"]}),
]


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "three"])
@pytest.mark.parametrize("settings", PUBLISHED, ids=str)
def test_published_settings_do_what_they_do_with_the_plain_model(plain, model, batch, settings):
    alone = copy.deepcopy(plain)
    model.generation_config.update(**settings)
    # The plain model generates the same with these, and tells that they are deprecated or that a CPU has no streams.
    if settings.get("cache_implementation", "static") == "static":
        alone.generation_config.update(**settings)
    alike(model, alone, batch)


def test_a_cache_that_a_pair_lacks_gives_one_warning(model, caplog):
    model.generation_config.cache_implementation = "offloaded_hybrid"
    for _ in range(2):
        model.generate(**ONE, **SHORT)
    told = [record.getMessage() for record in caplog.records if "uses its dynamic cache" in record.getMessage()]
    assert len(told) == 1 and "cache_implementation='offloaded_hybrid'" in told[0]


def llm_share(pair: CiterForCausalLM, *args: Any, **options: Any) -> float:
    output = pair.generate(ONE["input_ids"], *args, max_new_tokens=4, return_dict_in_generate=True, **options)
    return output.past_key_values.routing.llm_share


def test_a_threshold_among_the_settings_acts_and_a_keyword_wins(model):
    assert llm_share(model, GenerationConfig(router_threshold=2.0)) == 1.0
    assert llm_share(model, GenerationConfig(router_threshold=2.0), router_threshold=0.0) == 0.0
    model.config.router_threshold = 0.0
    assert llm_share(model) == model.default_threshold == 0.0
    model.generation_config.router_threshold = 2.0
    assert llm_share(model) == llm_share(model, GenerationConfig()) == 1.0
    assert llm_share(model, GenerationConfig(router_threshold=0.0)) == llm_share(model, router_threshold=0.0) == 0.0
    assert model.generation_config.router_threshold == 2.0
    model.generation_config.router_threshold = 70
    with pytest.raises(ValueError, match="router_threshold: expected a number from 0"):
        llm_share(model)


def test_a_threshold_among_the_settings_is_saved_and_acts_in_a_pipeline(model, tmp_path: Path):
    model.generation_config.router_threshold = 2.0
    model.save_pretrained(tmp_path)
    loaded = CiterForCausalLM.from_pretrained(tmp_path)
    assert loaded.default_threshold == 2.0 and llm_share(loaded) == 1.0
    text = pipeline("text-generation", model=loaded, tokenizer=character_tokenizer())
    calls = loaded.generate
    shares: list[float] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = calls(*args, **kwargs, return_dict_in_generate=True)
        shares.append(output.past_key_values.routing.llm_share)
        return output.sequences

    loaded.generate = recorded  # type: ignore[method-assign]
    text("abc", **SHORT)
    text("abc", generation_config=GenerationConfig(**SHORT, router_threshold=0.0))
    text("abc", **SHORT, router_threshold=2.0)
    # A pipeline of transformers 5.17 drops what it does not know from a call's generation config.
    assert shares == [1.0, 1.0 if transformers.__version__.startswith("5.17") else 0.0, 1.0]


def test_an_assistant_that_is_a_pair_keeps_its_own_threshold(model, count_calls):
    assistant = make_pair(router="random", threshold=0.0)
    calls = count_calls(assistant.llm)
    model.generation_config.router_threshold = 2.0
    model.generate(**ONE, **SHORT, assistant_model=assistant)
    assert calls == []


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "three"])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=["plain", "lookup"])
def test_stop_strings_stop_where_they_stop_the_plain_model(plain, model, batch, options):
    tokenizer = character_tokenizer()
    whole = plain.generate(**ONE, **SHORT)
    stop = tokenizer.decode(whole[0, -4:-2])
    alike(model, plain, batch, tokenizer=tokenizer, stop_strings=[stop], **options)


@pytest.mark.parametrize("max_drafts", [None, 0, 2])
def test_a_stop_string_inside_drafts_ends_the_text_there(model, max_drafts):
    tokenizer, dials = character_tokenizer(), {"router_threshold": 0.5, "llm_veto": 0.9, "max_drafts": max_drafts}
    whole = model.generate(**ONE, **SHORT, **dials)[0].tolist()
    begin = ONE["input_ids"].shape[1]
    for end in range(begin + 2, len(whole)):
        stop = tokenizer.decode(whole[end - 2 : end])
        # The string may be there before.
        first = next(place for place in range(begin, end + 1) if stop in tokenizer.decode(whole[begin:place]))
        found = model.generate(**ONE, **SHORT, **dials, tokenizer=tokenizer, stop_strings=[stop])
        assert found[0].tolist() == whole[:first]


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "three"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_token_ids_may_be_of_32_bits(model, batch, options):
    generated = []
    for dtype in (torch.int64, torch.int32):
        torch.manual_seed(0)
        inputs = {key: value.to(dtype) for key, value in batch.items()}
        generated.append(model.generate(**inputs, **{**SHORT, **options}))
        generated.append(model(**inputs).logits)
    assert generated[0].dtype == generated[2].dtype == torch.int64
    assert torch.equal(generated[0], generated[2]) and torch.equal(generated[1], generated[3])


@pytest.mark.parametrize("router", ["mlp", "linear", "confidence", "r2r"])
@pytest.mark.parametrize("first", [True, False])
def test_passes_with_and_without_autocast_follow_each_other_in_any_order(router, first):
    pair = make_pair(router={"type": router})
    expected = pair.generate(**THREE, **SHORT)

    def write() -> None:
        pair.eval().generate(**THREE, **SHORT)

    def read() -> None:
        with torch.no_grad():
            pair(**THREE)

    def train() -> None:
        pair.train()(**THREE, labels=THREE["input_ids"])

    others = [(write, not first)]
    for use, autocast in [(write, first), *others, (read, first), *others, (train, first), *others]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            use()
    assert torch.equal(pair.generate(**THREE, **SHORT), expected)


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "three"])
@pytest.mark.parametrize("first", [True, False])
def test_a_text_goes_on_with_and_without_autocast(model, first, batch):
    text, mask, cache = batch["input_ids"], batch["attention_mask"], None
    options: dict[str, Any] = {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0, **SHORT}
    for autocast in (first, not first, first):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model.generate(text, attention_mask=mask, past_key_values=cache, **options)
        text, cache = output.sequences, output.past_key_values
        mask = torch.cat([mask, torch.ones_like(text[:, -6:])], dim=1)
    assert text.shape == (len(mask), batch["input_ids"].shape[1] + 3 * 6)


OWN = {
    "from_pair": ("slm", "llm", "router", "router_threshold", "llm_veto"),
    "from_pretrained": ("pretrained_model_name_or_path", "config"),
    "generate": ("inputs", "generation_config", "router_threshold", "llm_veto", "max_drafts"),
}


@pytest.mark.parametrize("name", OWN)
def test_our_keywords_are_documented_and_typed_and_so_is_what_comes_back(name: str) -> None:
    method = getattr(CiterForCausalLM, name)
    hints, text = get_type_hints(method), str(inspect.getdoc(method))
    assert inspect.signature(method).parameters.keys() >= set(OWN[name])
    for keyword in OWN[name]:
        assert hints[keyword] is not Any and f"\n    {keyword}: " in text
    returned = hints["return"]
    assert returned is not Any
    # Loading returns the class that was asked.
    assert name == "generate" or hints["cls"] == type[returned]
    assert (Path(citer_hf.__file__).parent / "py.typed").is_file()


# ---- a column of prompts through a pipeline and a trainer ----


def test_a_pipeline_and_a_trainer_write_for_every_row_of_a_column_what_it_gets_alone(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "router_threshold": 0.9}
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_PAIR)
    pair = CiterForCausalLM.from_pretrained(DEMO_PAIR, dtype=torch.float32)
    pipe = pipeline("text-generation", model=pair, tokenizer=tokenizer)
    told = [one.prompt for one in problems("test", 0, 10)]
    # Of many lengths; some texts end early.
    prompts = Dataset.from_dict({"prompt": told + [" ".join(one.split()[:4]) for one in told[:3]]})
    alone = [pipe(prompt, return_full_text=False, **wanted)[0]["generated_text"] for prompt in prompts["prompt"]]
    assert len({len(text) for text in alone}) > 2
    outputs = pipe(KeyDataset(prompts, "prompt"), batch_size=4, return_full_text=False, **wanted)
    assert [row[0]["generated_text"] for row in tqdm(outputs, total=len(prompts), disable=True)] == alone

    encoded = prompts.map(lambda batch: tokenizer(batch["prompt"]), batched=True, remove_columns=["prompt"])
    encoded = encoded.map(lambda row: {"labels": row["input_ids"]})
    settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"predict_with_generate": True, "per_device_eval_batch_size": 4}
    parts: dict[str, Any] = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "processing_class": tokenizer}
    arguments = transformers.Seq2SeqTrainingArguments(str(tmp_path), **settings)
    trainer = Seq2SeqTrainer(pair, arguments, **parts)
    found = trainer.predict(encoded, **wanted)
    tokens = torch.tensor(found.predictions).masked_fill(torch.tensor(found.predictions) == -100, 0)
    longest = [max(len(row) for row in encoded["input_ids"][start : start + 4]) for start in range(0, len(encoded), 4)]
    answers = [row[longest[index // 4] :] for index, row in enumerate(tokens)]
    assert [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers] == alone
    assert "test_loss" in found.metrics
