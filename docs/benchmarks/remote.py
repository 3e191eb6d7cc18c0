"""Time a pair whose LLM is on a server against the same pair with its LLM in the process.

    OMP_NUM_THREADS=1 python docs/benchmarks/remote.py
    OMP_NUM_THREADS=1 python docs/benchmarks/remote.py --url http://127.0.0.1:8000/v1

The pair is the shipped one, with the confidence router and a veto of 0.3. Without `--url`, the server is the tests'
stand-in for vLLM, in a process of its own; with it, a real one: `vllm serve citer_hf/demo/pair/llm --tokenizer
citer_hf/demo/pair --dtype float32`. The first table has one, 8 and 32 sequences at a time. The second adds round trips
to the stand-in, for LLMs whose step takes so long, and states how much longer one sequence takes than without: there
the stand-in tells what it computed before, so that the way alone is timed.
Labels per second are those of 24 examples with 48 roll-outs, which the LLM writes.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from citer_hf import DEMO_PAIR, CiterForCausalLM, RemoteLM, label_preferences
from citer_hf.demo.problems import problems
from citer_hf.evaluation.decode import decode
from tests.llm_server import serving_llm

ROUND_TRIPS, STEPS = (0.001, 0.005, 0.02), (0.0, 0.01, 0.03, 0.1, 0.3)


def stand_in(added: Any, ready: Any) -> None:
    """Serve the shipped pair's LLM until the process is ended; each request takes the added seconds longer."""
    torch.set_num_threads(1)
    pair = CiterForCausalLM.from_pretrained(DEMO_PAIR)

    def later(handler: Any, body: Any) -> bool:
        time.sleep(added.value)
        return False

    with serving_llm(pair.llm, pair.load_tokenizer(), fault=later, remembers=True) as server:
        ready.put(server.url)
        time.sleep(1 << 20)


@contextmanager
def served() -> Iterator[tuple[str, Any]]:
    """Give the address of a stand-in in a process of its own, and the seconds that it adds to each request."""
    spawn = multiprocessing.get_context("spawn")
    ready, added = spawn.Queue(), spawn.Value("d", 0.0)
    process = spawn.Process(target=stand_in, args=(added, ready), daemon=True)
    process.start()
    try:
        yield ready.get(), added
    finally:
        process.terminate()
        process.join()


def pair_of(url: str | None) -> Any:
    """Return the shipped pair with the confidence router, with its LLM here or there."""
    shipped = CiterForCausalLM.from_pretrained(DEMO_PAIR)
    llm: Any = shipped.llm if url is None else RemoteLM(url, config=DEMO_PAIR / "llm")
    pair = CiterForCausalLM.from_pair(shipped.slm, llm, router="confidence")
    pair.generation_config, pair._tokenizer = shipped.generation_config, shipped.load_tokenizer()
    return pair


def measured(pair: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Decode prompts at once; return seconds per token, and what was asked of the server."""
    server = getattr(pair.llm, "endpoint", None)
    before = (server.requests, server.sent + server.received, server.waited) if server else (0, 0, 0.0)
    began = time.perf_counter()
    outputs = decode(pair, prompts, router_threshold=0.5, llm_veto=0.3, max_new_tokens=new_tokens)
    seconds, tokens = time.perf_counter() - began, sum(len(one.tokens) for one in outputs)
    after = (server.requests, server.sent + server.received, server.waited) if server else (0, 0, 0.0)
    requests, size, waited = (now - then for now, then in zip(after, before, strict=True))
    return {"s": seconds / tokens, "requests": requests / tokens, "bytes": size / tokens, "waiting": waited / seconds}


def median(pair: Any, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, float]:
    measured(pair, prompts, 8)
    runs = [measured(pair, prompts, args.max_new_tokens) for _ in range(args.repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def round_trips(prompt: list[int], args: argparse.Namespace) -> dict[str, float]:
    """Return how much longer a sequence takes with a round trip than without, for steps of the LLM, in turns."""
    found: dict[str, float] = {}
    with served() as (url, added):
        pair = pair_of(url)
        measured(pair, [prompt], args.max_new_tokens)
        for step in STEPS:
            times: dict[float, list[float]] = {delay: [] for delay in (0.0, *ROUND_TRIPS)}
            for _ in range(args.repeats):
                for delay, one in times.items():
                    added.value = step + delay
                    one.append(measured(pair, [prompt], args.max_new_tokens)["s"])
            base = statistics.median(times.pop(0.0))
            found |= {f"{delay}, {step}": statistics.median(one) / base for delay, one in times.items()}
    return found


def labels_per_second(pair: Any) -> float:
    """Label reference answers, with answers of the LLM where the SLM is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        examples = [vars(one) for one in problems("train", 5, 24)]
        began = time.perf_counter()
        labels = label_preferences(pair, examples, "math", Path(folder) / "labels", router_threshold=2, rollouts=48)
        return len(labels.case) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="A vLLM or SGLang server that has the shipped pair's LLM.")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    local = pair_of(None)
    prompts = [local.load_tokenizer()(one.prompt).input_ids for one in problems("test", 5, 32)]
    found: dict[str, Any] = {"sequences": {}, "round_trips": {}}
    with served() as (stand_in_url, _):
        remote = pair_of(args.url or stand_in_url)
        for count in (1, 8, 32):
            here, there = (median(pair, prompts[:count], args) for pair in (local, remote))
            found["sequences"][count] = {**there, "local_s": here["s"]}
        found["labels"] = {"remote": labels_per_second(remote), "local": labels_per_second(local)}
    if args.url is None:
        found["round_trips"] = round_trips(prompts[0], args)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(
        "| sequences | remote, tokens/s | local, tokens/s | requests per token | bytes per token | share of waiting |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for count, one in found["sequences"].items():
        speeds = f"{1 / one['s']:.1f} | {1 / one['local_s']:.1f}"
        print(f"| {count} | {speeds} | {one['requests']:.2f} | {one['bytes']:.0f} | {one['waiting']:.2f} |")
    print("\nLabels per second: remote {remote:.1f}, local {local:.1f}".format(**found["labels"]))
    if found["round_trips"]:
        print("\n| round trip | " + " | ".join(f"LLM step of {1000 * step:g} ms" for step in STEPS) + " |")
        print("| --- " * (len(STEPS) + 1) + "|")
        for delay in ROUND_TRIPS:
            cells = [f"{found['round_trips'][f'{delay}, {step}']:.2f}" for step in STEPS]
            print(f"| {1000 * delay:g} ms | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
