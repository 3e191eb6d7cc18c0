"""EleutherAI's evaluation harness, unmodified: `lm_eval --model hf` on a router directory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from citer_hf import CiterForCausalLM
from tests.chat_pairs import character_tokenizer
from tests.reference import naive_generate, naive_logits
from tests.repositories import save_base_models
from tests.served import NAME, serving

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
{more}
"""
STOPS = ("qu", "z")
# Of each task: the kind, the target, the metric, its aggregation, and what else there is.
MORE = {"written": "generation_kwargs: {until: [qu, z], max_gen_toks: 12}"}
MORE["chosen"] = "doc_to_choice: '{{choices}}'\ntarget_delimiter: ''"
TASKS = {
    "written": ("generate_until", "a", "exact_match", "mean"),
    "chosen": ("multiple_choice", 0, "acc", "mean"),
    "read": ("loglikelihood_rolling", "'{{question}}'", "word_perplexity", "weighted_perplexity"),
}
SCORES = (("chosen", "acc"), ("read", "word_perplexity"), ("written", "exact_match"))
GENERATED = 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a router on them, and three tasks with five problems of different lengths."""
    home = tmp_path_factory.mktemp("lm_eval")
    save_base_models(home)
    tokenizer = character_tokenizer()
    for role in ("slm", "llm"):
        # A limit of the model's own would win over the tasks'.
        GenerationConfig(do_sample=False, eos_token_id=[2, 5], pad_token_id=0).save_pretrained(home / role)
        tokenizer.save_pretrained(home / role)
    torch.manual_seed(0)
    pair = CiterForCausalLM.from_pair(home / "slm", home / "llm", router="linear")
    with torch.no_grad():
        pair.router.score.weight.normal_(std=0.3)
    pair.save_pretrained(home / "router")
    answers = ("a", "bc", "def", "g", "hijk", "lm", "n", "o", "pq", "r")
    questions = ("how many", "a longer question: 12 + 7 =", "x", "what is the last one?", "of six or seven,")
    choices = zip(answers[::2], answers[1::2], strict=True)
    problems = [{"question": one, "choices": two} for one, two in zip(questions, choices, strict=True)]
    (home / "tasks").mkdir()
    data = home / "tasks" / "problems.jsonl"
    data.write_text("\n".join(json.dumps(problem) for problem in problems))
    for name, task in TASKS.items():
        about = dict(zip(("kind", "target", "metric", "aggregation"), task, strict=True), more=MORE.get(name, ""))
        (home / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data, cache=home / "cache", **about))
    return home


def evaluate(
    home: Path, pair: Any, batch_size: int, gen_kwargs: str = "", backend: str = "hf", **options: Any
) -> tuple[Any, Any]:
    """The scores of every task, and what the model answered to every request."""
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(home / pair) if isinstance(pair, str) else pair, "dtype": "float32", **options}
    settings = {"batch_size": batch_size, "device": "cpu", "gen_kwargs": gen_kwargs or None, "bootstrap_iters": 0}
    settings["model_args"] = arguments if backend == "hf" else options
    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(model=backend, tasks=list(TASKS), task_manager=manager, **settings)
    return results["results"], {name: [one["resps"] for one in results["samples"][name]] for name in TASKS}


@pytest.mark.parametrize(("role", "threshold", "batch_size"), [("slm", 0, 1), ("slm", 0, 3), ("llm", 1.5, 3)])
def test_the_ends_of_the_threshold_have_exactly_the_scores_of_the_bare_models(home, role, threshold, batch_size):
    bare = evaluate(home, role, batch_size)
    assert evaluate(home, "router", batch_size, router_threshold=threshold, trust_remote_code=True) == bare


def test_a_threshold_in_between_scores_every_token_by_the_model_that_writes_it(home):
    threshold = 0.5
    model = CiterForCausalLM.from_pretrained(home / "router")
    tokenizer = model.load_tokenizer()
    _, answers = evaluate(home, "router", 3, router_threshold=threshold)
    by_llm = []

    def log_likelihood(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        total, greedy = 0.0, True
        for index, token in enumerate(continuation):
            logits, _, to_llm = naive_logits(model, context + continuation[:index], threshold)
            by_llm.append(to_llm)
            total += float(logits.log_softmax(-1)[token])
            greedy &= int(logits.argmax()) == token
        return total, greedy

    for index, line in enumerate((home / "tasks" / "problems.jsonl").read_text().splitlines()):
        problem = json.loads(line)
        question = tokenizer(problem["question"])["input_ids"]
        for choice, (answer,) in zip(problem["choices"], answers["chosen"][index], strict=True):
            expected = log_likelihood(question, tokenizer(choice)["input_ids"])
            assert answer[0] == pytest.approx(expected[0], abs=1e-4) and answer[1] == expected[1]
        # A text without a context starts after the first token of texts.
        expected = log_likelihood([tokenizer.bos_token_id], question)
        assert answers["read"][index][0] == pytest.approx([expected[0]], abs=1e-4)
        text, *_ = naive_generate(model, question, GENERATED, threshold, eos=(2, 5))
        written = tokenizer.decode(text, skip_special_tokens=True)
        for stop in STOPS:
            written = written.split(stop)[0]
        assert answers["written"][index] == [[written]]
    assert 0.2 < sum(by_llm) / len(by_llm) < 0.8


def test_a_threshold_for_generation_leaves_likelihoods_as_they_are_and_so_does_offloading(home, tmp_path):
    _, answers = evaluate(home, "router", 3, gen_kwargs="router_threshold=0")
    _, expected = evaluate(home, "router", 3)
    assert answers == expected | {"written": evaluate(home, "slm", 3)[1]["written"]} != expected
    # Without a GPU, this leaves all weights on disk.
    assert evaluate(home, "router", 3, parallelize=True, offload_folder=str(tmp_path))[1] == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_server_has_the_scores_of_the_pair(home: Path, batch_size: int) -> None:
    expected, answers = evaluate(home, "router", 1, router_threshold=0.5, trust_remote_code=True)
    pair = CiterForCausalLM.from_pretrained(home / "router")
    with serving(pair, pair.load_tokenizer(), router_threshold=0.5) as server:
        options = {"base_url": f"{server.url}/v1/completions", "model": NAME, "tokenizer": str(home / "router")}
        found, told = evaluate(home, "", batch_size, backend="local-completions", max_length=255, **options)
    assert told["written"] == answers["written"]
    for task, score in SCORES:
        assert found[task][f"{score},none"] == pytest.approx(expected[task][f"{score},none"], rel=1e-4)
    for own, theirs in zip(told["chosen"], answers["chosen"], strict=True):
        for (one,), (other,) in zip(own, theirs, strict=True):
            assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-4) and str(one[1]) == str(other[1])


def test_longer_texts_than_the_smaller_context_are_cut_there(home):
    from lm_eval.models.huggingface import HFLM

    assert HFLM(pretrained=str(home / "router"), device="cpu").max_length == 256
    short = CiterForCausalLM.from_pretrained(home / "router")
    short.config.slm_config.max_position_embeddings = 100
    assert HFLM(pretrained=short, tokenizer=short.load_tokenizer()).max_length == 100
