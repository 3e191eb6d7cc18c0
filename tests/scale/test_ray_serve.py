"""Replicas on Ray Serve, started and asked as users do."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from citer_hf import CiterForCausalLM
from tests.chat_pairs import chat_pair, save_demo_pair
from tests.conftest import make_pair
from tests.served import HeldRouter, serving, wait_until

SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
PROMPTS = [f"What is {number} + 5?" for number in range(16)]


class Cluster:
    """Two replicas of a tiny pair with two routers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path):
        self.process, self.folder, self.url = process, folder, f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def text(self, prompt: str, model: str = "pair", **options: Any) -> str:
        return (
            self.client.completions.create(model=model, prompt=prompt, **{"max_tokens": 20, **options}).choices[0].text
        )

    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if one.name().startswith("ray::ServeRepl")]

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
                return answer.read().decode()
        except OSError as error:
            return str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories `pair` and `other`: two routers of the same models."""
    folder = tmp_path_factory.mktemp("routers")
    model = CiterForCausalLM.from_pretrained(save_demo_pair(folder))
    other = CiterForCausalLM.from_pair(model.slm, model.llm, router="confidence", router_threshold=0.3)
    other.save_pretrained(folder / "other")
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    pytest.importorskip("ray.serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = {"model": str(folder / "pair"), "routers": str(folder / "other"), "replicas": 2, "num_cpus": 0.5}
    one = {"name": "pair", "import_path": "citer_hf.scale.ray_serve:app", "args": {**arguments, "device_map": "cpu"}}
    # JSON is YAML.
    config = {"http_options": {"port": port, "host": "127.0.0.1"}, "applications": [one]}
    (folder / "serve.yaml").write_text(json.dumps(config))
    # Paths of Ray's sockets must be short.
    place = tempfile.mkdtemp(prefix="ray")
    here = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": place}
    process = subprocess.Popen([*SERVE, str(folder / "serve.yaml")], env=here, cwd=folder)
    running = Cluster(process, port, folder)
    try:
        wait_until(lambda: '"ok"' in running.get("/health") or process.poll() is not None, 240)
        wait_until(lambda: len(running.replicas()) == 2)
        yield running
    finally:
        processes = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        for left in filter(psutil.Process.is_running, processes):
            left.kill()
        shutil.rmtree(place, ignore_errors=True)


def texts_of_one_process(folder: Path, name: str) -> list[str]:
    model = CiterForCausalLM.from_pretrained(folder / name)
    tokenizer = CiterForCausalLM.from_pretrained(folder / "pair").load_tokenizer()
    with serving(model, tokenizer) as server:
        return [server.complete(prompt, max_tokens=20).choices[0].text for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pair", "other"])
def test_sixteen_clients_get_the_answers_of_one_process_from_the_router_that_they_name(cluster: Cluster, name: str):
    with ThreadPoolExecutor(16) as clients:
        texts = [*clients.map(lambda prompt: cluster.text(prompt, name), PROMPTS)]
    assert texts == texts_of_one_process(cluster.folder, name)
    assert [one.id for one in cluster.client.models.list()] == [str(cluster.folder / one) for one in ("pair", "other")]
    with pytest.raises(openai.NotFoundError, match="this server has"):
        cluster.text("a", "another")


@pytest.mark.slow
def test_a_client_that_leaves_its_stream_ends_the_answer(cluster: Cluster) -> None:
    stream = cluster.client.completions.create(model="pair", prompt="ab", max_tokens=200, n=2, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: 'status="499"} 1.0' in (told := cluster.get("/metrics")) and "in_progress 0.0" in told)


@pytest.mark.slow
def test_a_killed_replica_loses_only_its_own_requests_and_is_replaced(cluster: Cluster) -> None:
    before = cluster.replicas()

    def ask(prompt: str) -> str:
        try:
            return cluster.text(prompt, max_tokens=100, n=2)
        except openai.InternalServerError as error:
            return f"error {error.status_code}"

    expected = [ask(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(16) as clients:
        asked = [clients.submit(ask, prompt) for prompt in PROMPTS]
        time.sleep(0.3)
        before[0].kill()
        found = [one.result(timeout=120) for one in asked]
    lost = found.count("error 500")
    assert 0 < lost < len(PROMPTS)
    assert all(one in ("error 500", text) for one, text in zip(found, expected, strict=True))
    wait_until(lambda: len(cluster.replicas()) == 2 and before[0] not in cluster.replicas(), 240)
    assert [ask(prompt) for prompt in PROMPTS] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either model="),
        ({"model": "a/b", "slm": "c/d", "llm": "e/f"}, "expected either model="),
        ({"model": "a/b", "slm": "c/d"}, "expected either model="),
        ({"model": "./pair"}, "./pair: replicas see no relative path"),
        ({"model": "tests/scale"}, "tests/scale: replicas see no relative path"),
        (
            {"model": "user/router", "routers": "/no/such/place"},
            "/no/such/place: expected a directory that every machine",
        ),
        ({"model": "user/router", "port": 1}, "host, port: they are those of Ray's proxy"),
        ({"model": "user/router", "max_batch_size": "0"}, "max_batch_size: expected at least 1, got 0"),
        ({"model": "user/router", "max_batchsize": 1}, "max_batchsize"),
    ],
)
def test_what_replicas_could_not_serve_or_see_is_an_error_before_anything_starts(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.serve")
    from citer_hf.scale.ray_serve import ReplicaOptions, app

    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError, match=message):
        app(ReplicaOptions(**options))


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delitem(sys.modules, "citer_hf.scale.ray_serve", raising=False)
    with pytest.raises(ImportError, match=r"^ray is not installed: pip install 'citer-hf\[ray\]'$"):
        import citer_hf.scale.ray_serve  # noqa: F401


def test_the_silence_of_the_inference_thread_lasts_while_a_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    router = HeldRouter()
    model = make_pair(router=router)
    model._tokenizer = chat_pair().load_tokenizer()
    with serving(model) as server:
        assert server.server.worker.silence == 0
        asking = threading.Thread(target=lambda: server.complete("ab", max_tokens=2))
        asking.start()
        wait_until(lambda: server.server.worker.silence > 0.2)
        router.permits.release(100)
        asking.join(60)
        wait_until(lambda: server.server.worker.silence == 0)
