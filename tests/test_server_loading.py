"""Models that load slowly: what clients are told meanwhile, and what they get when loading fails or the server stops."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
import talking
import uvicorn
from serving import get, post, running
from waiting import wait_until

from rabbit_engine import AutoModel, Session
from rabbit_engine.errors import ConfigurationError, DamagedCheckpointError, QueueFullError
from rabbit_engine.server import streams
from rabbit_engine.server.app import create_app
from rabbit_engine.server.hosting import Host

HI: dict[str, Any] = {"model": "slow", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
OPTIONS = {"num_predict": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"))


class Slow:
    """Loads models as the test says: `go` ends the loading of "slow" and of "broken"."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.go, self.events = folder, threading.Event(), list[str]()

    @contextmanager
    def open(self, name: str) -> Iterator[Session]:
        self.events.append(f"?{name}")
        if name in ("slow", "broken"):
            assert self.go.wait(30)
        if name == "broken":
            raise ConfigurationError("it is broken")
        with AutoModel.from_pretrained(self._folder, device="cpu") as model, Session(model, max_new_tokens=3) as session:
            self.events.append(f"+{name}")
            try:
                yield session
            finally:
                self.events.append(f"-{name}")


@pytest.fixture
def slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(streams, "SILENCE_S", 0.05)
    return Slow(folder)


@pytest.fixture
def host(slow: Slow) -> Iterator[Host]:
    host = Host(["slow", "broken", "quick"], slow.open, most_loaded=2)
    yield host
    host.close()


@pytest.fixture
def url(host: Host) -> Iterator[str]:
    with running(uvicorn.Server(uvicorn.Config(create_app(host), port=0, http="h11", log_level="error"))) as port:
        yield f"http://127.0.0.1:{port}"


def when_read(slow: Slow, parts: Iterator[bytes]) -> bytes:
    """All parts; loading ends after three of them."""
    found = [next(parts), next(parts), next(parts)]
    slow.go.set()
    return b"".join([*found, *parts])


@pytest.mark.parametrize(
    ("path", "sign"),
    [
        ("/v1/chat/completions", b': loading {"model": "slow", "elapsed_s": 0.'),
        ("/v1/completions", b': loading {"model": "slow", "elapsed_s": 0.'),
        ("/v1/messages", b': loading {"model": "slow", "elapsed_s": 0.'),
        ("/v1/responses", b': loading {"model": "slow", "elapsed_s": 0.'),
        ("/api/chat", b'{"model": "slow", "created_at": '),
        ("/api/generate", b'{"model": "slow", "created_at": '),
    ],
)
def test_a_stream_shows_that_its_model_is_being_loaded(url: str, slow: Slow, path: str, sign: bytes) -> None:
    own = {"prompt": "Hi"} if path in ("/v1/completions", "/api/generate") else {"messages": HI["messages"]}
    body = {"model": "slow", "stream": True, **({"input": "Hi"} if path == "/v1/responses" else own)}
    limit = {"max_tokens": 2} if path == "/v1/messages" else {}
    with httpx.stream("POST", url + path, json={**body, **limit}, timeout=30) as answer:
        assert answer.status_code == 200
        assert answer.headers["x-accel-buffering"] == "no"
        told = when_read(slow, answer.iter_raw())
    assert told.count(sign) > 2
    assert told.isascii()
    warm = post(url + path, json={**body, **limit})
    assert warm.headers["content-type"] == answer.headers["content-type"]
    assert b"loading" not in warm.content
    assert warm.content.splitlines()[-1][:40] in told  # the same end, after the signs of life


def test_the_packages_of_the_apis_take_the_signs_of_life(url: str, slow: Slow) -> None:
    timeout_s = 2.5  # for the signs, on a machine that much else uses; loading takes longer than it
    wait = threading.Timer(timeout_s + 0.3, slow.go.set)
    wait.start()
    keywords: dict[str, Any] = {"api_key": "none", "timeout": timeout_s, "max_retries": 0}
    chats = openai.OpenAI(base_url=f"{url}/v1", **keywords).chat.completions
    messages = anthropic.Anthropic(base_url=url, **keywords).messages
    chat = ollama.Client(url, timeout=timeout_s).chat
    answers: list[Any] = []
    for ask in (
        lambda: chats.create(**HI).choices[0].message.content,
        lambda: "".join(chunk.choices[0].delta.content or "" for chunk in chats.create(**HI, stream=True)),
        lambda: messages.create(**HI).content[0].text,  # type: ignore[union-attr]
        lambda: "".join(event.text for event in messages.stream(**HI).__enter__() if event.type == "text"),
        lambda: chat("slow", HI["messages"], options=OPTIONS).message.content,
        lambda: "".join(part.message.content or "" for part in chat("slow", HI["messages"], options=OPTIONS, stream=True)),
    ):
        one = threading.Thread(target=lambda ask=ask: answers.append(ask()))
        one.start()
        answers.append(one)
    threads = [one for one in answers if isinstance(one, threading.Thread)]
    for one in threads:
        one.join(30)
    told = [answer for answer in answers if isinstance(answer, str)]
    assert len(told) == len(threads) == 6
    assert len(set(told)) == 1


def test_a_whole_answer_begins_with_newlines_and_pages_say_what_is_loading(url: str, slow: Slow) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=HI, timeout=30) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b"\n"
        health = get(f"{url}/health").json()
        assert (health["loaded"], health["loading"]["model"], health["waiting"]) == ([], "slow", 1)
        assert health["loading"]["elapsed_s"] >= 0
        metrics = get(f"{url}/metrics").text
        assert 'rabbit_loaded{model="slow"} 0.0' in metrics
        assert 'rabbit_loading_seconds{model="slow"} 0.0\n' not in metrics
        told = when_read(slow, parts)
    assert json.loads(told)["choices"][0]["message"]["content"]
    assert get(f"{url}/health").json()["loading"] is None
    metrics = get(f"{url}/metrics").text
    assert 'rabbit_loaded{model="slow"} 1.0' in metrics
    assert 'rabbit_loads_total{model="slow"} 1.0' in metrics


BROKEN = "broken cannot be loaded: it is broken"


@pytest.mark.parametrize(
    ("path", "first", "error", "rest"),
    [
        ("/v1/chat/completions", "", {"error": {"message": BROKEN, "code": "model_not_loaded"}}, ["data: [DONE]"]),
        ("/v1/messages", "event: error", {"type": "error", "error": {"type": "overloaded_error", "message": BROKEN}}, []),
        ("/v1/responses", "event: error", {"type": "error", "sequence_number": 0, "message": BROKEN}, []),
        ("/api/chat", "", {"error": BROKEN}, []),
    ],
)
def test_a_load_that_fails_late_is_the_last_event_of_a_stream(
    url: str, slow: Slow, monkeypatch: pytest.MonkeyPatch, path: str, first: str, error: dict[str, Any], rest: list[str]
) -> None:
    asked = {"input": "Hi"} if path == "/v1/responses" else {"messages": HI["messages"]}
    body = {**asked, "model": "broken", "stream": True, **({"max_tokens": 2} if path == "/v1/messages" else {})}
    with httpx.stream("POST", url + path, json=body, timeout=30) as answer:
        told = when_read(slow, answer.iter_raw()).decode()
    lines = [line for line in told.splitlines() if line and not line.startswith(":") and '"done": false' not in line]
    if first:
        assert lines.pop(0) == first
    found = json.loads(lines.pop(0).removeprefix("data: "))
    assert lines == rest
    assert contains(found, error)
    monkeypatch.setattr(streams, "SILENCE_S", 10.0)
    early = post(url + path, json=body)  # nothing was sent before
    assert (early.status_code, early.headers["content-type"]) == (503, "application/json")


def contains(found: Any, part: Any) -> bool:
    """Whether a JSON value has all that a part of it says."""
    if isinstance(part, dict):
        return all(contains(found.get(name), value) for name, value in part.items())
    return bool(found == part)


def test_a_whole_answer_whose_model_fails_late_has_the_error_and_no_end(url: str, slow: Slow) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**HI, "model": "broken"}, timeout=30) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b"\n"
        slow.go.set()
        while not (last := next(parts)).strip():
            pass
        with pytest.raises(httpx.RemoteProtocolError):  # so that no client takes it for an answer
            next(parts)
    assert json.loads(last)["error"]["message"] == BROKEN


def test_a_client_that_leaves_while_its_model_loads_waits_no_longer(url: str, slow: Slow, host: Host) -> None:
    for stream in (True, False):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**HI, "stream": stream}, timeout=30) as answer:
            parts = answer.iter_raw()  # kept: its end would close the connection
            next(parts)
            assert host.waiting == 1
        wait_until(lambda: host.waiting == 0)
    assert host.loading is not None
    slow.go.set()
    wait_until(lambda: bool(host.loaded))
    assert post(f"{url}/v1/chat/completions", json=HI).status_code == 200
    assert slow.events == ["?slow", "+slow"]


def test_the_server_ends_while_a_model_loads(host: Host, slow: Slow) -> None:
    app = create_app(host)
    with running(uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_level="error"))) as port:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", url, json={**HI, "stream": True}, timeout=30) as answer:
            parts = answer.iter_raw()
            assert next(parts).startswith(b": loading")
            app.state.end_answers()
            assert b"".join(parts).endswith(b"data: [DONE]\n\n")
    assert slow.events == ["?slow"]  # the server has ended, and did not wait for the model
    host.close()
    slow.go.set()
    wait_until(lambda: slow.events == ["?slow", "+slow", "-slow"])


def test_a_loaded_model_answers_while_another_one_is_loaded(url: str, slow: Slow, host: Host) -> None:
    assert post(f"{url}/v1/chat/completions", json={**HI, "model": "quick"}).status_code == 200
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=HI, timeout=30) as answer:
        parts = answer.iter_raw()
        next(parts)
        assert post(f"{url}/v1/chat/completions", json={**HI, "model": "quick"}).status_code == 200
        assert host.loading is not None
        when_read(slow, parts)


def test_the_last_load_says_how_long_the_next_one_takes(host: Host, slow: Slow) -> None:
    host.loads["slow"] = host.loads["slow"].one_more(8.0)

    async def work() -> None:
        task = asyncio.ensure_future(use(host, "slow"))
        while host.loading is None:
            await asyncio.sleep(0)
        assert 7.9 <= float(str(host.loading.facts()["remaining_s"])) <= 8.0
        slow.go.set()
        await task

    asyncio.run(work())


async def use(host: Host, name: str, seconds: float = 0.0) -> None:
    async with host.use(name):
        await asyncio.sleep(seconds)


def test_without_a_queue_models_are_loaded_and_used(slow: Slow) -> None:
    host = Host(["quick", "slow"], slow.open, most_waiting=0)

    async def work() -> None:
        await use(host, "quick")
        await asyncio.gather(use(host, "quick", 0.1), use(host, "quick"))
        loading = asyncio.ensure_future(use(host, "slow"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="1 requests wait for a model already"):
            await use(host, "quick")
        slow.go.set()
        await loading

    asyncio.run(work())
    host.close()


def test_a_model_that_nobody_waits_for_any_more_is_unloaded_in_time(slow: Slow) -> None:
    host = Host(["slow"], slow.open, keep_alive_s=0.05)

    async def work() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(use(host, "slow"), 0.05)
        slow.go.set()
        while slow.events[-1:] != ["-slow"]:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 10))
    host.preload("slow")

    async def later() -> None:
        host.start()
        while host.loaded:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(later(), 10))


def test_a_model_whose_files_are_damaged_is_closed_again(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise DamagedCheckpointError("modules.json is damaged")

    monkeypatch.setattr(Session, "embedder", property(fail))
    with pytest.raises(DamagedCheckpointError):
        Host(["quick"], slow.open).preload("quick")
    assert slow.events == ["?quick", "+quick", "-quick"]


def test_a_client_does_not_unload_the_session_of_the_caller(folder: Path) -> None:
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        host = Host.of(session, "own")

        async def work(call: Callable[[str], object]) -> None:
            host.start()
            assert not host.unload("own")
            async with host.use("own", 0.0):
                pass
            await asyncio.sleep(0.05)
            assert host.loaded

        asyncio.run(work(host.unload))
        with running(uvicorn.Server(uvicorn.Config(create_app(session, "own"), port=0, http="h11", log_level="error"))) as port:
            client = ollama.Client(f"http://127.0.0.1:{port}", timeout=30)
            assert client.chat("own", [], keep_alive=0).done_reason == "load"
            assert client.chat("own", HI["messages"], keep_alive=0, options=OPTIONS).done
            (loaded,) = client.ps().models
            assert loaded.expires_at is not None
            assert loaded.expires_at.year > 2100
        assert session.chat("Hi", max_new_tokens=1).tokens
