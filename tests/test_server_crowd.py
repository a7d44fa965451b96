"""Many clients at once, some of which leave: every answer is right, and nothing stays behind."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import talking
import uvicorn
from serving import running
from waiting import wait_until

from rabbit_engine import AutoModel, Session
from rabbit_engine.server.app import create_app
from rabbit_engine.server.hosting import Host

PROMPTS = ("abc", "hello", "x", "12345")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"), max_position_embeddings=8_000)


@pytest.fixture(scope="module")
def right(folder: Path) -> dict[str, str]:
    """The answers alone."""
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        return {prompt: session.generate([prompt], max_new_tokens=6, temperature=0)[0].text for prompt in PROMPTS}


@contextmanager
def hosting(folder: Path, names: list[str], **keywords: Any) -> Iterator[tuple[Host, str]]:
    """A host of models that are the same, and the address of its server."""

    @contextmanager
    def opening(_: str) -> Iterator[Session]:
        with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, max_queue=500) as session:
            yield session

    host = Host(names, opening, **keywords)
    try:
        with running(uvicorn.Server(uvicorn.Config(create_app(host), port=0, http="h11", log_level="warning"))) as port:
            yield host, f"http://127.0.0.1:{port}"
    finally:
        host.close()


def leave(url: str, body: dict[str, Any], after_s: float) -> None:
    """Ask, and close the connection soon after; the rest is not read, so that it is reset."""
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        time.sleep(after_s)


def is_idle(host: Host) -> bool:
    """Whether nothing runs, waits or is held."""
    idle = all(not (served.users or served.session.running or served.session.waiting) for served in host.loaded)
    return idle and not host.waiting


def test_fifty_clients_killed_at_random_leave_nothing_behind(folder: Path, caplog: Any) -> None:
    chance = random.Random(3)
    with hosting(folder, ["a"]) as (host, url):
        bodies = [
            {
                "model": "a",
                "prompt": "abc",
                "max_tokens": 3000,
                "ignore_eos": True,
                "stream": chance.random() < 0.7,
                "n": 1 + index % 2,
            }
            for index in range(50)
        ]
        with ThreadPoolExecutor(25) as pool:
            list(pool.map(lambda body: leave(url, body, chance.random() * 0.4), bodies))
        wait_until(lambda: is_idle(host), 30)
        assert httpx.post(f"{url}/v1/completions", json={"model": "a", "prompt": "abc", "max_tokens": 1}, timeout=30).is_success
        assert is_idle(host)
    said = [record.getMessage() for record in caplog.records if record.name in ("asyncio", "rabbit_engine.server.gate")]
    assert said == []  # no task was destroyed, no exception never retrieved, no answer interrupted


def test_two_models_under_random_load_answer_everyone_rightly(folder: Path, right: dict[str, str]) -> None:
    """One of them is in memory at a time, so they are loaded again and again. RABBIT_CROWD_S sets for how long."""
    answered, end_s = [0] * 8, time.monotonic() + float(os.environ.get("RABBIT_CROWD_S", "2"))

    def client(number: int, url: str) -> None:
        chance = random.Random(number)
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end_s:
                prompt, name = chance.choice(PROMPTS), chance.choice("ab")
                body = {"model": name, "prompt": prompt, "max_tokens": 6, "temperature": 0}
                if chance.random() < 0.3:
                    leave(url, {**body, "max_tokens": 2000, "stream": chance.random() < 0.5}, chance.random() * 0.03)
                    continue
                found = client.post(f"{url}/v1/completions", json=body)
                assert found.status_code == 200, found.text
                assert (found.json()["model"], found.json()["choices"][0]["text"]) == (name, right[prompt])
                answered[number] += 1

    with hosting(folder, ["a", "b"], keep_alive_s=0.05) as (host, url):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: client(number, url), range(8)))
        wait_until(lambda: is_idle(host), 30)
    assert all(answered)
