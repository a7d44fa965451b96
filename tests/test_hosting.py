"""Several models in one server: loaded when they are asked for, one after another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
import talking
import uvicorn
from serving import running

from rabbit_engine import AutoModel, Session, capabilities
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.capabilities import Capabilities
from rabbit_engine.server import descriptions
from rabbit_engine.server.app import create_app
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Host

Opening = Callable[[str], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def opening(folder: Path, events: list[str]) -> Opening:
    @contextmanager
    def opening(name: str) -> Iterator[Session]:
        if name == "broken":
            raise ConfigurationError("it is broken")
        events.append(f"+{name}")
        with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, max_new_tokens=3) as session:
            yield session
        events.append(f"-{name}")

    return opening


async def use(host: Host, name: str, seconds: float = 0.0, keep_alive_s: float | None = None) -> str:
    async with host.use(name, keep_alive_s) as served:
        assert not served.closed
        await asyncio.sleep(seconds)
        return served.name


def test_models_are_loaded_when_asked_for_and_make_room(opening: Opening, events: list[str]) -> None:
    host = Host(["a", "b"], opening)

    async def work() -> None:
        assert events == []
        assert await asyncio.gather(use(host, "a", 0.2), use(host, "b"), use(host, "a")) == ["a", "b", "a"]

    asyncio.run(work())
    assert events == ["+a", "-a", "+b", "-b", "+a"]  # in turn, and never two at once
    host.close()
    assert events[-1] == "-a"


def test_as_many_stay_as_are_allowed_and_the_least_recently_used_goes(opening: Opening, events: list[str]) -> None:
    host = Host(["a", "b", "c"], opening, most_loaded=2)

    async def work() -> None:
        for name in ("a", "b", "a", "c"):
            await use(host, name)

    asyncio.run(work())
    assert events == ["+a", "+b", "-b", "+c"]
    host.close()


def test_an_idle_model_is_unloaded(opening: Opening, events: list[str]) -> None:
    host = Host(["a"], opening, keep_alive_s=0.05)

    async def work() -> None:
        await use(host, "a", 0.2)
        assert events == ["+a"]
        while host.loaded:
            await asyncio.sleep(0.01)
        await use(host, "a", keep_alive_s=1000)
        await asyncio.sleep(0.2)
        assert events == ["+a", "-a", "+a"]
        await use(host, "a", keep_alive_s=0)
        while host.loaded:
            await asyncio.sleep(0.01)

    asyncio.run(work())
    host.close()
    assert events == ["+a", "-a"] * 2


def test_a_cancelled_request_leaves_no_model_half_loaded(opening: Opening, events: list[str]) -> None:
    host = Host(["a", "b"], opening)

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(use(host, "a"), 0.001)
        assert await use(host, "a") == "a"
        assert events == ["+a"]
        holder = asyncio.ensure_future(use(host, "a", 0.2))
        await asyncio.sleep(0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(use(host, "b"), 0.02)
        assert await holder == "a"
        assert await use(host, "a") == "a"
        assert events == ["+a"]

    asyncio.run(work())
    host.close()


def test_a_model_that_cannot_be_loaded_is_said_and_blocks_nobody(opening: Opening) -> None:
    host = Host(["a", "broken"], opening)

    async def work() -> None:
        with pytest.raises(RequestError, match="broken cannot be loaded: it is broken") as caught:
            await use(host, "broken")
        assert caught.value.status == 503
        assert await use(host, "a") == "a"

    asyncio.run(work())
    host.close()


def test_names_are_checked(opening: Opening) -> None:
    with pytest.raises(ConfigurationError, match="'c' is not served: a, org/b"):
        Host(["a", "org/b"], opening, default="c")
    host = Host(["a", "org/b"], opening)
    assert (host.default, host.find("b"), host.find("org/b@main")) == ("a", "org/b", "org/b")
    assert Host(["org/b", "b"], opening).find("b") == "b"
    tagged = Host(["a", "a:latest", "b"], opening)
    assert (tagged.find("a"), tagged.find("a:latest"), tagged.find("b:latest")) == ("a", "a:latest", "b")
    with pytest.raises(RequestError, match="'x' is not served; 'a', 'org/b' are"):
        host.find("x")


TOOLS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% for tool in tools %}{{ tool }}{% endfor %}<think></think>"


def test_models_that_were_never_loaded_are_described(tmp_path: Path, opening: Opening, events: list[str]) -> None:
    folder, described = talking.save(tmp_path, max_position_embeddings=77), list[str]()
    (folder / "chat_template.jinja").write_text(TOOLS)

    def describe(name: str) -> Capabilities:
        described.append(name)
        if name == "broken":
            raise ConfigurationError("it is broken")
        return capabilities(folder)

    host = Host(["a", "broken"], opening, describe=describe)
    with running(uvicorn.Server(uvicorn.Config(create_app(host), port=0, http="h11", log_level="warning"))) as port:
        url, own = f"http://127.0.0.1:{port}", ollama.Client(f"http://127.0.0.1:{port}")
        for _ in range(2):
            a, broken = httpx.get(f"{url}/v1/models").json()["data"]
        assert (a["context_length"], "max_model_len" in a, "context_length" in broken) == (77, False, False)
        assert httpx.get(f"{url}/v1/models/a").json() == a
        listed = own.list().models[0]
        assert listed.details is not None
        assert (listed.details.family, listed.details.quantization_level) == ("llama", "F32")
        shown = own.show("a")
        assert shown.capabilities == ["completion", "tools", "thinking"]
        assert (shown.template, (shown.modelinfo or {})["llama.context_length"]) == (TOOLS, 77)
        assert own.show("broken").capabilities == ["completion"]
        assert described == ["a", "broken"]  # once each, also the one that failed
        assert events == []
        weights, parameters = listed.size, listed.details.parameter_size
        httpx.post(f"{url}/v1/completions", json={"model": "a", "prompt": "abc", "max_tokens": 2}, timeout=60)
        loaded = own.list().models[0]
        assert loaded.details is not None
        assert (loaded.details.parameter_size, loaded.details.family) == (parameters, "llama")
        assert loaded.size == weights
        assert httpx.get(f"{url}/v1/models/a").json()["max_model_len"] > 0
    host.close()


def test_a_slow_description_delays_no_list_for_long(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptions, "MOST_WAIT_S", 0.05)
    go = threading.Event()

    def describe(name: str) -> Capabilities:
        assert go.wait(20)
        raise ConfigurationError(name)

    found = Host(["a"], opening, describe=describe).descriptions

    async def work() -> None:
        await asyncio.wait_for(found.learn(["a"]), 5)
        assert found.find("a") is None
        go.set()

    asyncio.run(work())


def test_the_server_answers_for_each_of_its_models(opening: Opening, events: list[str]) -> None:
    host = Host(["a", "b"], opening, default="b")
    with running(uvicorn.Server(uvicorn.Config(create_app(host), port=0, http="h11", log_level="warning"))) as port:
        url = f"http://127.0.0.1:{port}"

        def ask(path: str, **body: object) -> httpx.Response:
            return httpx.post(f"{url}{path}", json=body, timeout=60)

        assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]] == ["a", "b"]
        assert httpx.get(f"{url}/health").json()["loaded"] == []
        assert httpx.get(f"{url}/lanes").status_code == 404
        for name in ("b", "a", "a"):
            answer = ask("/v1/completions", model=name, prompt="abc", max_tokens=2)
            assert (answer.status_code, answer.json()["model"]) == (200, name)
        assert events == ["+b", "-b", "+a"]
        assert httpx.get(f"{url}/plan").json()["model"] == "a"
        assert 'rabbit_passes_total{model="a"}' in httpx.get(f"{url}/metrics").text
        assert ask("/v1/completions", model="c", prompt="abc").status_code == 404
        talk = [{"role": "user", "content": "abc"}]
        for path, body in (
            ("/v1/completions", {"prompt": "abc", "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": talk, "max_tokens": 1}),
            ("/v1/responses", {"input": "abc", "max_output_tokens": 1}),
            ("/v1/score", {"input": "abc"}),
            ("/tokenize", {"prompt": "abc"}),
            ("/detokenize", {"tokens": [5]}),
        ):
            for unnamed in ({}, {"model": None}, {"model": ""}):
                answer = ask(path, **body, **unnamed)
                assert (answer.status_code, answer.json().get("model", "b")) == (200, "b"), path
        assert '"model": "b"' in ask("/load_model").text
    host.close()
