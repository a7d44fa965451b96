"""Slow tokens: what a client that waits is told, and estimates of how long it will."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import talking
import uvicorn
from serving import NAME, get, post, running, serving
from waiting import wait_until

from rabbit_engine import AutoModel, Session
from rabbit_engine.errors import QueueFullError
from rabbit_engine.server import service, streams
from rabbit_engine.server.app import create_app
from rabbit_engine.sessions.waiting import AnswerLength, passes_until_start

ASKED = {"model": NAME, "prompt": "abc", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"), max_position_embeddings=20_000)


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    """One answer at a time, and two may wait."""
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, max_requests=1, max_queue=2) as session:
        yield session


def slow_down(session: Session, seconds: float) -> None:
    """Every pass takes longer."""
    session.model.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(seconds))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("running", "waiting", "most", "passes"),
    [
        ([], [], 1, 0),
        ([5], [], 2, 0),
        ([5, 3], [], 2, 3),
        ([5, 3], [4], 2, 5),
        ([5, 3], [4, 1], 2, 6),
        ([5], [4, 1], 8, 10),  # memory holds one
        ([], [4], 1, 4),
    ],
)
def test_the_passes_until_a_request_starts(running: list[float], waiting: list[float], most: int, passes: float) -> None:
    assert passes_until_start(running, waiting, most) == passes


def test_the_length_of_answers_is_learned() -> None:
    length = AnswerLength()
    assert length.left(100) == 50
    for _ in range(30):
        length.add(10)
    assert length.left(100) == pytest.approx(10)
    assert length.left(4) == 4
    assert length.left(100, 8) == pytest.approx(2)
    assert length.left(100, 50) == 1


def test_a_session_says_when_a_request_would_start(session: Session) -> None:
    assert session.start_s == 0
    slow_down(session, 0.05)
    session.generate(["abc"], max_new_tokens=10, ignore_eos=True)
    tickets = session.ask([session.request_text("abc", max_new_tokens=10_000)] * 3, lambda *_: None)
    wait_until(lambda: session.running == 1)
    assert [ticket.place for ticket in tickets] == [None, 1, 2]
    with pytest.raises(QueueFullError, match=r"1 under way, 2 waiting, the last of them for about [23] s") as caught:
        session.ask([session.request_text("abc")], lambda *_: None)
    assert caught.value.retry_after_s == 1
    assert 1 < session.start_s < 4  # three answers of about ten passes of 0.05 s
    for ticket in tickets:
        ticket.cancel()
    assert tickets[2].place is None


def test_a_stream_tells_its_place_and_a_whole_answer_keeps_its_connection(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.1)
    slow_down(session, 0.4)
    with serving(session) as url, httpx.Client(base_url=url, timeout=0.35) as hasty:
        with (
            hasty.stream("POST", "/v1/completions", json={**ASKED, "max_tokens": 5000, "stream": True}) as first,
            hasty.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as second,
        ):
            queued, under_way = second.iter_lines(), first.iter_lines()
            assert next(queued) == ': queued {"place": 1}'
            assert next(under_way).startswith((": progress", "data:"))
            health = get(f"{url}/health").json()
            assert (health["running"], health["waiting"]) == (1, 1)
            assert health["start_s"][NAME] > 0
        wait_until(lambda: session.running == session.waiting == 0)
        whole = hasty.post("/v1/completions", json={**ASKED, "max_tokens": 3})
        assert whole.status_code == 200
        assert whole.headers["content-type"] == "application/json"
        assert whole.text.startswith("\n\n")
        assert json.loads(whole.text)["usage"]["completion_tokens"] == 3
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=0.35, max_retries=0)
        assert client.completions.create(model=NAME, prompt="abc", max_tokens=3).choices
        assert list(client.completions.create(model=NAME, prompt="abc", max_tokens=3, stream=True))


def test_a_late_answer_is_cancelled_with_its_client_and_broken_off_when_it_fails(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.05)
    slow_down(session, 0.05)
    endless = {**ASKED, "max_tokens": 10_000}
    with serving(session) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=endless) as answer:
            assert next(answer.iter_raw()) == b"\n"
        wait_until(lambda: session.running == 0)
        with httpx.stream("POST", f"{url}/v1/completions", json=endless) as answer:
            parts = answer.iter_raw()
            assert next(parts) == b"\n"
            session.close()
            with pytest.raises(httpx.RemoteProtocolError):
                list(parts)
        assert post(f"{url}/v1/completions", json=ASKED).status_code == 503


def test_a_late_answer_ends_with_the_server(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.05)
    app = create_app(session, NAME)
    with running(uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_level="warning"))) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        with httpx.stream("POST", url, json={**ASKED, "max_tokens": 10_000}) as answer:
            parts = answer.iter_raw()
            assert next(parts) == b"\n"
            app.state.end_answers()
            with pytest.raises(httpx.RemoteProtocolError):
                list(parts)
    wait_until(lambda: session.running == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
def test_what_the_server_fails_at_within_a_stream_is_in_its_log(
    session: Session, monkeypatch: Any, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    async def fail(*_: object) -> Any:
        raise TypeError("a mistake")
        yield

    monkeypatch.setattr(service, "follow", fail)
    hi = [{"role": "user", "content": "Hi"}]
    own = {
        "/v1/completions": {"prompt": "Hi"},
        "/v1/responses": {"input": "Hi"},
        "/v1/messages": {"messages": hi, "max_tokens": 2},
    }
    with serving(session) as url:
        answer = post(url + path, json={"model": NAME, "stream": True, **own.get(path, {"messages": hi})})
    assert answer.status_code == 200
    assert "the server failed (TypeError); see its log" in answer.text
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["a request failed: a mistake"]
