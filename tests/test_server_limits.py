"""What no client can do to the server, and what the server does to no client: bodies, connections, and its end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import talking
from serving import running
from waiting import wait_until

from rabbit_engine import AutoModel, Session
from rabbit_engine.server import app, body, gate, listen, parsing
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.timeouts import Timeouts

ENDLESS = {"model": "mine", "prompt": "abc", "max_tokens": 50_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = talking.save(tmp_path_factory.mktemp("talking"), max_position_embeddings=100_000)
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        yield session


@contextmanager
def serving(session: Session, **timeouts: float) -> Iterator[tuple[Any, int]]:
    """The server of `rabbit serve` in a thread, and its port."""
    chosen = Timeouts(**timeouts)
    server = listen.make_server(app.create_app(session, "mine", timeouts=chosen), timeouts=chosen)
    with running(server) as port:
        yield server, port


@contextmanager
def asking(port: int, asked: dict[str, Any], *, missing: int = 0) -> Iterator[socket.socket]:
    """A connection on which this was asked, but for the last bytes that are `missing`."""
    content = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (len(content) + missing) + content)
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while part := connection.recv(65_536):
        found += part
    return found


def until(connection: socket.socket, last: bytes) -> bytes:
    """What comes up to `last`, or until the server closes."""
    found = b""
    while last not in found and (part := connection.recv(65_536)):
        found += part
    return found


# Bodies.


def test_a_body_of_too_many_values_is_refused_unparsed(monkeypatch: Any) -> None:
    monkeypatch.setattr(parsing.json, "loads", None)  # it would fail
    for values in (b"5," * 300_000, b"[]," * 300_000, b"{" * 300_000):
        with pytest.raises(RequestError, match="more than 131072") as caught:
            parsing.parse_object(b'{"prompt": [' + values + b"5]}")
        assert caught.value.status == 400


def test_a_text_may_have_as_many_commas_as_it_likes() -> None:
    text = 'a, b, [c], {d}, "quoted" \\ ' * 60_000
    assert parsing.parse_object(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    ids = list(range(100_000))
    assert parsing.parse_object(json.dumps({"prompt": ids}).encode()) == {"prompt": ids}


@pytest.mark.parametrize(
    "bad", [b'{"a": "\\ud83d"}', b'{"a": "\xed\xa0\xbd"}', b"\xff\xfe{\x00}\x00", b"nul", b"", b"[" * 50_000]
)
def test_invalid_json_is_refused(bad: bytes) -> None:
    with pytest.raises(RequestError, match=r"not valid JSON|not a JSON object") as caught:
        parsing.parse_object(bad)
    assert caught.value.status == 400
    assert parsing.parse_object(b'{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}


def test_small_requests_do_not_wait_for_a_large_one_that_is_being_read(session: Session, monkeypatch: Any) -> None:
    reads, go_on = threading.Event(), threading.Event()
    take, given_back = session.request_text, threading.Event()

    def slowly(text: Any, **options: Any) -> Any:
        if len(text) > 1000:
            reads.set()
            assert go_on.wait(30)
        return take(text, **options)

    monkeypatch.setattr(session, "request_text", slowly)
    monkeypatch.setattr(gate, "give_free_memory_back", given_back.set)
    with serving(session) as (_, port):
        url = f"http://127.0.0.1:{port}"
        large = {"model": "mine", "prompt": "x" * 200_000, "max_tokens": 1}
        with asking(port, large) as first, asking(port, large) as second:
            assert reads.wait(30)
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
            assert httpx.post(f"{url}/v1/completions", json={**large, "prompt": "abc"}, timeout=30).status_code == 200
            assert not given_back.is_set()
            go_on.set()
            for connection in (first, second):
                assert b"context_length_exceeded" in until(connection, b"exceeded")
        wait_until(given_back.is_set)


@pytest.mark.parametrize(("mebibytes", "headers", "status"), [(21, {}, 413), (40, {}, 413), (20, {"Host": "elsewhere"}, 400)])
def test_a_client_that_sends_everything_before_it_reads_gets_the_refusal(
    session: Session, mebibytes: int, headers: dict[str, str], status: int
) -> None:
    with serving(session) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        whole = b" " * (mebibytes * 2**20)
        connection.request(
            "POST", "/v1/completions", whole, {"Content-Type": "application/json", "Connection": "close", **headers}
        )
        answer = connection.getresponse()
        assert answer.status == status
        assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
        connection.close()


def test_a_body_of_a_size_without_reason_is_not_taken(session: Session) -> None:
    with serving(session) as (_, port), asking(port, {}, missing=body.MOST_DRAINED_BYTES) as connection:
        assert rest_of(connection).startswith(b"HTTP/1.1 413")


def test_a_refused_body_that_does_not_arrive_is_not_waited_for(session: Session) -> None:
    with serving(session, drain_s=0.1) as (_, port), asking(port, {}, missing=body.MOST_BODY_BYTES) as connection:
        assert rest_of(connection).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_is_given_up(session: Session) -> None:
    with serving(session, body_s=0.1) as (_, port), asking(port, {"model": "mine"}, missing=10) as connection:
        assert rest_of(connection).startswith(b"HTTP/1.1 408")


# Connections.


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_connection_without_a_request_is_closed(session: Session, sent: bytes) -> None:
    with serving(session, idle_s=0.1) as (_, port), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        assert rest_of(connection) == b""


def test_a_second_request_that_never_ends_its_head_is_closed_and_a_slow_answer_is_not(session: Session) -> None:
    with serving(session, idle_s=0.1) as (_, port), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert until(connection, b"}").startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert rest_of(connection) == b""
        with asking(port, {**ENDLESS, "max_tokens": 300}) as slow:
            assert slow.recv(4096).startswith(b"HTTP/1.1 200")


# The end.


def test_shutdown_answers_every_client(session: Session) -> None:
    with (
        serving(session, grace_s=0.2) as (server, port),
        asking(port, {**ENDLESS, "stream": True}) as stream,
        asking(port, {**ENDLESS, "n": 16}) as whole,
        asking(port, ENDLESS) as waiting,
        asking(port, {"model": "mine"}, missing=10) as unfinished,
    ):
        assert stream.recv(15).startswith(b"HTTP/1.1 200")
        wait_until(lambda: session.running == 16 and session.waiting == 2)
        server.handle_exit(signal.SIGTERM, None)
        told = rest_of(stream)
        assert b'"code": "shutting_down"' in told
        assert b"data: [DONE]" in told[told.index(b'"error"') :]
        for connection in (whole, waiting, unfinished):
            answer = rest_of(connection)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after" in answer
    wait_until(lambda: session.running == session.waiting == 0)
    assert session.generate("abc", max_new_tokens=1)  # it is the caller's still


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_gives_answers_no_more_time(session: Session, second: signal.Signals) -> None:
    with serving(session, grace_s=600.0) as (server, port), asking(port, ENDLESS) as whole:
        wait_until(lambda: session.running == 1)
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(second, None)
        assert rest_of(whole).startswith(b"HTTP/1.1 503")


def test_an_answer_that_finishes_in_time_is_whole(session: Session) -> None:
    with serving(session) as (server, port), asking(port, {**ENDLESS, "max_tokens": 200}) as whole:
        wait_until(lambda: session.running == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert b'"finish_reason":"length"' in rest_of(whole)
