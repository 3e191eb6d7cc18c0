"""Time `citer serve` over sockets with the `openai` client: one request at a time, and many.

    OMP_NUM_THREADS=1 python docs/benchmarks/serving.py inflated
    OMP_NUM_THREADS=1 python docs/benchmarks/serving.py random

`inflated` serves the shipped pair with an LLM that costs what an LLM costs beside its SLM (see `inflated.py`), with
real text, at its confidence router with a veto. `random` serves random weights in the shapes of models of 17 M and
302 M parameters that agree at 80 % of the tokens, at an LLM share of 0.2, and beside it `transformers serve
--continuous-batching` with the larger model alone. Every server runs on one thread, with the same requests; *first
token* is the time from a request to its first token, the median of one at a time and the 95th percentile of many.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
import transformers
from inflated import inflate
from random_pair import VOCABULARY, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from citer_hf import DEMO_PAIR, CiterForCausalLM
from citer_hf.demo.problems import problems

Prompts = list[str]
SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def save_inflated(folder: Path) -> Prompts:
    """Write the shipped pair with a larger LLM; return problems."""
    shipped = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    pair = CiterForCausalLM.from_pair(shipped.slm, inflate(shipped.llm, 28), router="confidence")
    save(pair, shipped.load_tokenizer(), folder)
    return [one.prompt for one in problems("test", 7, 200)]


def save_random(folder: Path) -> Prompts:
    """Write a pair of random weights that agrees at 80 % of the tokens; return prompts of 20 to 100 tokens."""
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = CiterForCausalLM.from_pair(
        build("mini", agreement=1.0), build("llama-300m", agreement=0.8), router="random", router_threshold=0.2
    )
    for one in (pair, pair.slm, pair.llm):
        one.generation_config.update(eos_token_id=None, pad_token_id=0)
    save(pair, PreTrainedTokenizerFast(tokenizer_object=tokenizer), folder)
    rng = random.Random(0)
    return [" ".join(f"t{rng.randrange(1, 40_000)}" for _ in range(rng.randint(20, 100))) for _ in range(200)]


def save(pair: CiterForCausalLM, tokenizer: Any, folder: Path) -> None:
    pair.save_pretrained(folder, save_base_models=True)
    for place in (folder, folder / "llm"):
        tokenizer.save_pretrained(place)


@contextmanager
def running(command: list[str], port: int) -> Iterator[openai.OpenAI]:
    """Run a server on one thread until the block ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--port", str(port)], env=environment, **SILENT)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=600)
    try:
        for _ in range(600):
            time.sleep(0.5)
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                continue
        yield client
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(client: openai.OpenAI, model: str, prompt: str, new_tokens: int) -> tuple[float, int]:
    """Stream one answer; return the seconds to its first token, and its tokens."""
    began, first, used = time.perf_counter(), 0.0, 0
    include: Any = {"include_usage": True}
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=new_tokens, temperature=0, stream=True, stream_options=include
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].text and not first:
            first = time.perf_counter() - began
        if chunk.usage is not None:
            used = chunk.usage.completion_tokens
    return first, used


def measure(
    client: openai.OpenAI, model: str, prompts: Prompts, clients: int, new_tokens: int
) -> tuple[float, list[float]]:
    """Ask all prompts with so many clients; return tokens per second, and the seconds to every first token."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda prompt: ask(client, model, prompt, new_tokens), prompts))
    return sum(used for _, used in found) / (time.perf_counter() - began), sorted(first for first, _ in found)


def show(name: str, client: openai.OpenAI, model: str, prompts: Prompts, wanted: Any) -> None:
    """Print a line for one request at a time, and for each number of clients."""
    new_tokens = wanted.new_tokens
    measure(client, model, prompts[-8:], 8, new_tokens)  # warms up
    one, first = measure(client, model, prompts[: wanted.alone], 1, new_tokens)
    idle = statistics.median(first)
    print(f"{name:44}{1:>8}{one:>10.1f}{'':>8}{idle * 1000:>10.0f} ms", flush=True)
    for count in wanted.clients:
        speed, first = measure(client, model, prompts[: wanted.requests], count, new_tokens)
        late = first[int(0.95 * (len(first) - 1))]
        print(f"{name:44}{count:>8}{speed:>10.1f}{speed / one:>7.2f}x{late * 1000:>10.0f} ms", flush=True)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=("inflated", "random"))
    parser.add_argument("--clients", type=int, nargs="+", default=[8])
    parser.add_argument("--alone", type=int, default=16, help="requests that are asked one at a time")
    parser.add_argument("--requests", type=int, default=48, help="requests that many clients ask together")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--port", type=int, default=8711)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores, load {load}")
    print(f"{'server':44}{'clients':>8}{'tokens/s':>10}{'':>8}{'first token':>13}")
    with tempfile.TemporaryDirectory() as folder:
        prompts = (save_inflated if wanted.pair == "inflated" else save_random)(Path(folder))
        serve = [sys.executable, "-m", "citer_hf.cli", "serve", folder]
        for name, options in (("the pair", []), ("the LLM's own text, lossless", ["--router-threshold", "2"])):
            with running([*serve, *options], wanted.port) as client:
                show(f"citer serve, {name}", client, folder, prompts, wanted)
        if wanted.pair == "random":
            llm = f"{folder}/llm"
            command = [str(Path(sys.executable).with_name("transformers")), "serve", llm, "--continuous-batching"]
            with running(command, wanted.port) as client:
                show("transformers serve, the LLM alone", client, llm, prompts, wanted)


if __name__ == "__main__":
    main()
