"""Keys and their limits, the access log, and the metrics of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import talking
from serving import NAME, SECRET, get, post, serving
from waiting import wait_until

from rabbit_engine import AutoModel, Session
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server import access
from rabbit_engine.server.access import Access
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.keys import Key, read_keys
from rabbit_engine.server.visits import AccessLog

ASKED = {"model": NAME, "prompt": "abc", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = talking.save(tmp_path_factory.mktemp("talking"), max_position_embeddings=100_000)
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        yield session


def keys_of(tmp_path: Path, text: str) -> list[Key]:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    return read_keys(path)


def test_a_file_of_keys(tmp_path: Path) -> None:
    text = "# clients\n\nsk-first\n  alice: sk:a=1 requests=2 per_minute=60\r\nbob:\tsk-b per_minute=1\n"
    assert keys_of(tmp_path, "\ufeff" + text) == [
        Key("key-3", "sk-first"),
        Key("alice", "sk:a=1", 2, 60),
        Key("bob", "sk-b", None, 1),
    ]
    assert keys_of(tmp_path, "secret\n") == [Key("key-1", "secret")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no key"),
        ("# nobody\n", "has no key"),
        ("a: hidden\na: other", "two keys are called 'a'"),
        ("a: hidden\nb: hidden", "'b' has the key of another name"),
        ("ok\na b: hidden", "line 2: after the key only"),
        ("a: hidden requests=0", "line 1: after the key only"),
        ("a: hidden requests=2 requests=3", "each once"),
        ("a: hidden request=2", "only requests=N"),
        ("../x: hidden", "a name has"),
        ("a: hiddén", "ASCII"),
        ("\n".join(map(str, range(1001))), "more than 1000"),
    ],
)
def test_a_wrong_file_of_keys_is_refused_without_telling_one(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        keys_of(tmp_path, text)
    assert "hidd" not in str(caught.value).replace(str(tmp_path), "")


def scope(secret: str = "", method: str = "POST") -> dict[str, Any]:
    return {"type": "http", "path": "/v1/x", "method": method, "headers": [(b"x-api-key", secret.encode())]}


def test_each_key_has_its_own_limits(monkeypatch: Any) -> None:
    clock = [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: clock[0])
    gate = Access([Key("a", "sa", requests=2), Key("b", "sb", per_minute=2)], local=False)
    with gate.admitting(scope("sa")) as name, gate.admitting(scope("sa")):
        assert name == "a"
        with pytest.raises(RequestError, match="2 requests of the key 'a' are under way") as busy, gate.admitting(scope("sa")):
            pass
        with gate.admitting(scope("sa", "GET")), gate.admitting(scope("sb")):  # only what asks a model counts, and only its own
            pass
    assert (busy.value.status, busy.value.headers()["Retry-After"]) == (429, "10")
    with gate.admitting(scope("sa")):  # those have ended
        pass
    clock[0] += 20
    with gate.admitting(scope("sb")):
        pass
    with pytest.raises(RequestError, match="2 requests a minute: wait 40 s") as fast, gate.admitting(scope("sb")):
        pass
    assert fast.value.headers()["Retry-After"] == "40"
    clock[0] += 41
    with gate.admitting(scope("sb")):
        pass
    with pytest.raises(RequestError, match="wait 19 s"), gate.admitting(scope("sb")):
        pass
    with pytest.raises(RequestError, match="requires its key"), gate.admitting(scope("sa ")), gate.admitting(scope("s")):
        pass


def test_a_key_at_its_limit_gets_429_and_another_is_answered(session: Session) -> None:
    keys = [Key("a", "sa", requests=1), SECRET]
    with serving(session, keys=keys) as url, httpx.Client(timeout=60, headers={"Authorization": "Bearer sa"}) as client:
        endless = {**ASKED, "max_tokens": 10_000, "stream": True}
        with client.stream("POST", f"{url}/v1/completions", json=endless) as answer:
            lines = answer.iter_lines()  # kept: httpx closes the connection when its iterator is collected
            assert next(lines)
            assert answer.status_code == 200
            refused = client.post(f"{url}/v1/completions", json=ASKED)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
            assert refused.headers["Retry-After"] == "10"
            assert client.get(f"{url}/v1/models").status_code == 200
            assert post(f"{url}/v1/completions", json=ASKED, headers={"x-api-key": "secret"}).status_code == 200
            assert next(lines) is not None
        wait_until(lambda: client.post(f"{url}/v1/completions", json=ASKED).status_code == 200)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_access_log_and_metrics_tell_who_asked_and_how_much_and_never_what(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    with serving(session, keys=[Key("alice", "sa")], access_log=log) as url:
        headers = {"Authorization": "Bearer sa"}
        assert post(f"{url}/v1/completions?prompt=whispered", json={**ASKED, "n": 2}, headers=headers).status_code == 200
        assert post(f"{url}/v1/completions", json={**ASKED, "model": "?"}, headers=headers).status_code == 404
        assert get(f"{url}/%0a{'x' * 5000}", headers={"x-api-key": "wrong"}).status_code == 401
        wait_until(lambda: len(lines_of(path)) == 3)
        path.rename(tmp_path / "older.log")  # as logrotate does
        with httpx.stream("POST", f"{url}/v1/completions", json={**ASKED, "max_tokens": 10_000, "stream": True}, headers=headers):
            wait_until(lambda: session.running == 1)
        wait_until(path.exists)
        metrics = get(f"{url}/metrics", headers=headers).text
    log.close()
    answered, unknown, refused = lines_of(tmp_path / "older.log")
    assert answered | {"time": "", "seconds": 0} == {
        "time": "",
        "key": "alice",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/completions",
        "model": NAME,
        "status": 200,
        "seconds": 0,
        "prompt_tokens": 6,
        "answer_tokens": 6,
    }
    assert answered["time"].endswith("+00:00")
    assert answered["seconds"] > 0
    assert (unknown["status"], unknown["key"], unknown["model"]) == (404, "alice", "")
    assert (refused["status"], refused["key"], len(refused["path"])) == (401, "", 200)
    left = lines_of(path)[0]  # the client of the stream
    assert (left["status"], left["prompt_tokens"]) == (200, 3)
    assert 'rabbit_key_requests_total{key="alice",status="404"} 1.0' in metrics
    assert f'rabbit_tokens_total{{kind="prompt",model="{NAME}"}} 9.0' in metrics
    assert 'rabbit_key_tokens_total{key="alice",kind="prompt"} 9.0' in metrics
    assert f'rabbit_first_token_seconds_count{{model="{NAME}"}} 2.0' in metrics
    assert 'rabbit_requests_total{path="other",status="401"} 1.0' in metrics
    assert "xxx" not in metrics


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot write --access-log"):
        AccessLog(tmp_path / "nowhere" / "log")
