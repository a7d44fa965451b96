"""`rabbit serve --cluster`: the server's application on Ray Serve, on a cluster of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import httpx
import openai
import psutil
import pytest
from fastapi import FastAPI
from serving import serving
from tiny import words
from waiting import wait_until

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.server import replicas as module
from rabbit_engine.server.keys import Key
from rabbit_engine.server.replicas import Replicas

SECRET, LONG = "secret", 700
ASKED = {"model": "tiny", "prompt": [3, 5, 7], "temperature": 0, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def asked(url: str, body: dict[str, Any], key: str = SECRET) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def told(answer: httpx.Response) -> str:
    """The body without what differs between two servers."""
    return re.sub(r'"(id|created)": ?("[^"]*"|\d+)', r'"\1"', answer.text)


@dataclass
class Cluster:
    """A Ray cluster of this machine, with a service."""

    address: str
    folder: Path
    port: int
    environment: dict[str, str]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, *options: object) -> subprocess.CompletedProcess[str]:
        """Run the command, which returns once the service answers."""
        command = [sys.executable, "-m", "rabbit_engine", "serve", "tiny=model", "--cluster", self.address, "--replicas", 2]
        given = ("--port", self.port, "--api-key-file", "keys", "--access-log", "access", "--prefix-store", "off")
        memory = ("--device", "cpu", "-m", "100MB", "--max-seq-len", 8192)
        told = {"env": self.environment, "cwd": self.folder, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([str(each) for each in (*command, *given, *memory, *options)], check=False, **told)

    def replicas(self) -> set[int]:
        """The processes of the replicas."""
        mine = [
            p for p in psutil.process_iter(["name", "environ"]) if (p.info["environ"] or {}).get("RAY_TEST") == str(self.folder)
        ]
        return {process.pid for process in mine if process.info["name"].startswith("ray::ServeReplica")}

    def client(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=SECRET, max_retries=retries, timeout=120)

    def stream(self, tokens: int) -> Any:
        return self.client().completions.create(
            model="tiny", prompt=[3, 5, 7], temperature=0, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With two replicas of a tiny model, of a core each."""
    folder = tmp_path_factory.mktemp("ray")
    words(96).save_pretrained(families.save("llama", folder / "model", max_position_embeddings=2048))
    (folder / "keys").write_text(f"all: {SECRET}\n")
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TEST": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    port, temporary, log = free_port(), tempfile.mkdtemp(prefix="ray"), folder / "ray.log"  # paths of sockets are short
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    ray += ["--include-dashboard=false", "--object-store-memory=100000000", f"--temp-dir={temporary}"]
    with log.open("w") as written:
        process = subprocess.Popen(ray, env=environment, stdout=written, stderr=written)
    try:
        line = re.compile(rf"--address='([^']+:{port})'")
        wait_until(lambda: bool(line.search(log.read_text())), 240)
        found = Cluster(line.findall(log.read_text())[0], folder, free_port(), environment)
        done = found.serve("--max-new-tokens", 5)
        assert done.returncode == 0, done.stderr
        assert done.stderr == f"tiny: {found.url}/ (a page to chat with), {found.url}/v1\n"
        yield found
    finally:
        for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def local(cluster: Cluster) -> Iterator[str]:
    """A server of the same model in this process."""
    with (
        AutoModel.from_pretrained(cluster.model, device="cpu", max_memory={"cpu": "100MB"}, max_seq_len=8192) as model,
        Session(model, max_new_tokens=5) as session,
        serving(session, keys=[Key("all", SECRET)]) as url,
    ):
        yield url


def text_of(local: str, tokens: int) -> str:
    """What the model says, from the local server."""
    text: str = asked(local, {**ASKED, "model": "smol", "max_tokens": tokens}).json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize(
    "more", [{}, {"max_tokens": 9, "logprobs": 2}, {"stream": True, "stream_options": {"include_usage": True}}, {"n": 0}]
)
def test_answers_are_those_of_a_local_server(cluster: Cluster, local: str, more: dict[str, Any]) -> None:
    here, there = asked(local, {**ASKED, "model": "smol", **more}), asked(cluster.url, {**ASKED, **more})
    assert told(there) == told(here).replace("test/smol", "tiny")
    assert (there.status_code, there.headers["content-type"]) == (here.status_code, here.headers["content-type"])
    assert there.status_code == (400 if "n" in more else 200)


def test_keys_are_refused_as_before(cluster: Cluster, local: str) -> None:
    here, there = asked(local, ASKED, "wrong"), asked(cluster.url, ASKED, "wrong")
    assert (there.status_code, there.json()) == (401, here.json())
    assert httpx.get(f"{cluster.url}/health").json()["loaded"] == ["tiny"]


def test_a_client_that_leaves_ends_its_answer(cluster: Cluster) -> None:
    def logged() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (cluster.folder / "access").read_text().splitlines()]
        return [line for line in lines if line["path"] == "/v1/completions"]

    before, stream = len(logged()), cluster.stream(LONG)
    next(stream)
    stream.close()
    wait_until(lambda: len(logged()) > before)
    assert 0 < logged()[-1]["answer_tokens"] < LONG


def test_when_a_replica_is_killed_its_streams_break_off_and_the_rest_is_answered(cluster: Cluster, local: str) -> None:
    right, before, begun = text_of(local, LONG), cluster.replicas(), threading.Semaphore(0)

    def streamed() -> str | None:
        """A whole text, or None for one that broke off."""
        parts, ended = [], False
        try:
            for chunk in cluster.stream(LONG):
                parts.append(chunk.choices[0].text)
                ended = ended or chunk.choices[0].finish_reason is not None
                begun.release()
        except (openai.APIError, httpx.HTTPError):
            return None
        assert ended
        return "".join(parts)

    def whole() -> str:
        """By a client that asks again, as openai's does unless told."""
        found = cluster.client(retries=4).completions.create(
            model="tiny", prompt=[3, 5, 7], temperature=0, max_tokens=LONG, extra_body={"ignore_eos": True}
        )
        return found.choices[0].text

    assert len(before) == 2
    with ThreadPoolExecutor(12) as pool:
        streams, wholes = [pool.submit(streamed) for _ in range(6)], [pool.submit(whole) for _ in range(6)]
        for _ in range(6):
            begun.acquire()
        os.kill(victim := min(before), 9)
        texts = [each.result() for each in streams]
        assert {each.result() for each in wholes} == {right}
    assert set(texts) - {right} == {None}  # all of them may have been that replica's
    wait_until(lambda: len(cluster.replicas() - {victim}) == 2, 240)
    assert asked(cluster.url, ASKED).status_code == 200


def test_a_rolling_update_loses_nothing(cluster: Cluster, local: str) -> None:
    before, right, done = cluster.replicas(), text_of(local, LONG), threading.Event()

    def ask() -> list[httpx.Response]:
        found = []
        while not done.is_set():
            found.append(asked(cluster.url, ASKED))
            time.sleep(0.05)
        return found

    def stream() -> set[str]:
        found = set()
        while not done.is_set():
            found.add("".join(chunk.choices[0].text for chunk in cluster.stream(LONG)))
        return found

    with ThreadPoolExecutor(2) as pool:
        asking, streaming = pool.submit(ask), pool.submit(stream)
        try:
            updated = cluster.serve("--max-new-tokens", 7)
        finally:
            done.set()
        answers = asking.result()
        assert streaming.result() == {right}
    assert updated.returncode == 0, updated.stderr
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {5, 7}
    assert not before & cluster.replicas()
    assert asked(cluster.url, ASKED).json()["usage"]["completion_tokens"] == 7


GPU, CPU = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}


@pytest.mark.parametrize(
    ("replicas", "machines", "cpus", "gpus"),
    [
        (Replicas(count=1), [CPU], 4, 0),
        (Replicas(count=2), [CPU, {"CPU": 2.0}], 2, 0),
        (Replicas(count=3, share_machines=True), [CPU, {"CPU": 2.0}], 2, 0),
        (Replicas(count=2, share_machines=True, cpus=0.5), [CPU], 0.5, 0),
        (Replicas(count=2, share_machines=True), [GPU, CPU], 4, 1),
        (Replicas(count=2, gpus=0), [GPU, CPU], 4, 0),
    ],
)
def test_replicas_get_the_cores_that_let_all_of_them_run(replicas: Replicas, machines: Any, cpus: float, gpus: float) -> None:
    found = replicas.options(machines)
    assert found["ray_actor_options"] == {"num_cpus": cpus, "num_gpus": gpus}
    assert found["max_ongoing_requests"] > replicas.most_requests  # so that the session itself refuses


def test_an_update_starts_new_replicas_first_where_a_machine_is_free() -> None:
    free = {"CPU": 4.0}
    assert Replicas(count=1).options([CPU, CPU], free)["max_surge_percent"] == 100
    assert Replicas(count=2).options([CPU, CPU], free)["max_surge_percent"] == 0, "each machine has a replica"
    assert Replicas(count=1).options([CPU, CPU], {"CPU": 1.0})["max_surge_percent"] == 0, "it has other work"
    assert Replicas(count=1, share_machines=True).options([CPU, CPU], free)["max_surge_percent"] == 0, "for its memory"
    assert Replicas(count=1, gpus=1).options([GPU, GPU], {"CPU": 8.0})["max_surge_percent"] == 0


@pytest.mark.parametrize(
    ("replicas", "says"),
    [
        (Replicas(count=2), "one a machine, as --max-memory is not given"),
        (Replicas(count=5, share_machines=True), "machines have 4 cores"),
        (Replicas(count=1, cpus=8), "give fewer --replicas, or --replica-cpus"),
        (Replicas(count=1, gpus=1), "and 0 GPUs"),
    ],
)
def test_replicas_that_never_fit_are_refused(replicas: Replicas, says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        replicas.options([CPU])


def test_the_reason_of_a_failed_start_is_told_without_its_traceback() -> None:
    told = "failed:\nTraceback:\n  raise\nrabbit_engine.errors.CheckpointNotFoundError: /x is empty\n"
    assert module._reason(told) == "/x is empty"
    assert module._reason("Traceback:\n  import\nModuleNotFoundError: No module\n") == "ModuleNotFoundError: No module"


def test_a_route_comes_before_the_paths_of_the_application() -> None:
    app = FastAPI()
    app.get("/")(lambda: "page")
    app.get("/health")(lambda: "ok")
    app.add_middleware(module._Mounted)

    async def get(path: str) -> str:
        transport = httpx.ASGITransport(app=app, root_path="/coder")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get(path)).json()

    assert [asyncio.run(get(path)) for path in ("/coder", "/coder/", "/coder/health")] == ["page", "page", "ok"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cluster", "auto"], "cluster needs a package that is not installed"),
        (["--replicas", "2"], "are for --cluster"),
        (["--cluster", "auto", "--port", "0"], "--port 0 is for one machine"),
        (["--cluster", "auto", "--route", "x"], "begin it with /"),
    ],
)
def test_wrong_options_are_refused_before_a_cluster_is_asked(
    options: list[str], says: str, rabbit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = rabbit("serve", tmp_path, *options)
    assert done.code in (1, 2)
    assert says in done.err
