"""Requests that are wrong, odd, without a key or given up: errors in OpenAI's words, and a server that answers on."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import HI, NAME, SECRET, get, post, serving
from smol import QUESTIONS, user
from waiting import wait_until

from rabbit_engine import Session, errors
from rabbit_engine.server.access import check_exposure
from rabbit_engine.server.body import MOST_BODY_BYTES


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_disconnects_frees_its_place(url: str, session: Session, streams: bool) -> None:
    body = {"model": NAME, "messages": user("Count to a thousand."), "max_tokens": 1000, "stream": streams}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(30, read=1.0)) as hasty:  # noqa: PT012
        if not streams:
            hasty.post(f"{url}/v1/chat/completions", json=body)
        with hasty.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if '"content": " ' in line:
                    raise httpx.ReadTimeout("seen enough")
    wait_until(lambda: session.running == 0)
    assert post(f"{url}/v1/chat/completions", json={**body, "stream": False, "max_tokens": 1}).status_code == 200


def test_a_full_queue_answers_429_with_retry_after(smollm_model: Any) -> None:
    with Session(smollm_model, max_requests=1, max_queue=0) as session, serving(session) as url:
        stream = session.stream("Count to a thousand.", max_new_tokens=1000)
        next(stream)
        for streams in (False, True):
            answer = post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": user("Hi"), "stream": streams})
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        stream.close()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=1).choices


@pytest.mark.parametrize("n", [1, 8])
def test_a_client_that_disconnects_before_the_first_chunk_frees_its_places(smollm_model: Any, n: int) -> None:
    body = json.dumps({"model": NAME, "messages": user("Count."), "max_tokens": 500, "stream": True, "n": n}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with Session(smollm_model, max_requests=16, max_queue=200) as session, serving(session) as url:
        for delay_s in (0, 0.001, 0.002, 0.004, 0.008, 0.016) * 2:
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                time.sleep(delay_s)
        wait_until(lambda: session.running == session.waiting == 0, 30)
        time.sleep(0.3)  # one that was read late may begin now
        wait_until(lambda: session.running == session.waiting == 0, 30)


def test_cancelled_embeddings_affect_no_other_request(
    url: str, session: Session, client: openai.OpenAI, monkeypatch: Any
) -> None:
    futures = session.call([(lambda: time.sleep(0.2), 1)] * 3)
    for future in futures[1:]:
        future.cancel()
    assert client.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=1).choices


def bad(status: int, body: Any, *, path: str = "/v1/chat/completions", says: str = "", param: str | None = None) -> Any:
    return pytest.param(status, body, path, says, param, id=f"{status}-{says or str(body)[:30]}")


@pytest.mark.parametrize(
    ("status", "body", "path", "says", "param"),
    [
        bad(400, "{", says="not valid JSON"),
        bad(400, "[1]", says="not a JSON object"),
        bad(400, "[" * 100_000, says="not valid JSON"),
        bad(400, '{"model": "\\ud800", "messages": []}', says="not valid JSON"),
        bad(400, {}, says="messages"),
        bad(400, {"model": NAME}, says="messages", param="messages"),
        bad(404, {**HI, "model": "gpt-4"}, says="not served", param="model"),
        bad(400, {**HI, "messages": "Hi"}, says="messages", param="messages"),
        bad(400, {**HI, "messages": [{"content": "Hi"}]}, says="role"),
        bad(400, {**HI, "messages": [{"role": "user", "content": 5}]}, says="content"),
        bad(400, {**HI, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, says="image_url"),
        bad(400, {**HI, "temperature": -1}, says="temperature", param="temperature"),
        bad(400, {**HI, "temperature": "hot"}, says="temperature", param="temperature"),
        bad(400, {**HI, "top_p": 2}, says="top_p", param="top_p"),
        bad(400, {**HI, "n": 0}, says="n:", param="n"),
        bad(400, {**HI, "n": 1000}, says="n:", param="n"),
        bad(400, {**HI, "max_tokens": 0}, says="max_tokens", param="max_tokens"),
        bad(400, {**HI, "max_tokens": 10**6}, says="fit: shorten"),
        bad(400, {**HI, "stop": [""]}, says="stop"),
        bad(400, {**HI, "logit_bias": {"x": 1}}, says="logit_bias"),
        bad(400, {**HI, "logit_bias": {"99999999": 1}}, says="logit_bias"),
        bad(400, {**HI, "top_logprobs": 21, "logprobs": True}, says="top_logprobs", param="top_logprobs"),
        bad(400, {**HI, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, says="chat_template"),
        bad(400, {**HI, "chat_template_kwargs": {"messages": [], "self": 1}}, says="messages, self"),
        bad(400, {**HI, "generation_config": "{"}, says="generation_config", param="generation_config"),
        bad(400, {**HI, "generation_config": {"do_sample": True, "top_k": 1.5}}, says="generation_config.top_k"),
        bad(400, {**HI, "messages": user("word " * 20_000)}, says="fit: shorten"),
        bad(400, {"model": NAME, "prompt": []}, path="/v1/completions", says="no prompt", param="prompt"),
        bad(400, {"model": NAME, "prompt": [10**9]}, path="/v1/completions", says="vocabulary"),
        bad(400, {"model": NAME, "prompt": [True, None]}, path="/v1/completions", says="prompt"),
        bad(400, {"model": NAME, "prompt": "a", "suffix": "b"}, path="/v1/completions", says="suffix", param="suffix"),
        bad(400, {"model": NAME, "input": "a"}, path="/v1/embeddings", says="cannot embed texts", param="model"),
        bad(400, {**HI, "messages": [{"role": "assistant", "tool_calls": 5}]}, says="tool_calls"),
        bad(400, {**HI, "messages": [{"role": "assistant", "tool_calls": True}]}, says="tool_calls"),
        bad(400, {**HI, "stop": [1]}, says="stop"),
        bad(400, {"model": NAME, "prompt": ["a"] * 200, "n": 16}, path="/v1/completions", says="answers at once", param="prompt"),
        bad(404, {}, path="/v1/images/generations", says="nothing at this path"),
    ],
)
def test_wrong_requests_get_errors_in_openais_words(
    url: str, status: int, body: Any, path: str, says: str, param: str | None
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = post(f"{url}{path}", content=content, headers={"Content-Type": "application/json"})
    found = answer.json()["error"]
    assert answer.status_code == status, found
    assert says in found["message"]
    assert found["type"] == "invalid_request_error"
    if param is not None:
        assert found["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        {**HI, "chat_template_kwargs": {"limits": 1, "template": 4, "overflow": 5}},
        {**HI, "temperature": 1e-38},
        {**HI, "temperature": 1e-4},
        {**HI, "logit_bias": {str(token): 1 for token in range(20_000)}},
        {**HI, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {**HI, "stop": None, "n": None, "stream": None, "user": "somebody", "unheard_of": 1},
    ],
)
def test_odd_requests_that_can_be_answered_are(url: str, body: Any) -> None:
    answer = post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_too_large_and_of_another_type(url: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(MOST_BODY_BYTES // 2**20 + 2):
            yield b" " * 2**20

    json_type = {"Content-Type": "application/json"}
    assert post(f"{url}/v1/completions", content=parts(), headers=json_type).status_code == 413
    assert post(f"{url}/v1/completions", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert post(f"{url}/v1/completions", content=json.dumps(HI)).status_code == 415  # a page elsewhere can send this
    assert get(f"{url}/v1/completions").status_code == 405
    wrong = get(f"{url}/lanes?seconds=abc")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")


def test_another_name_for_this_machine_is_refused(url: str) -> None:
    """A foreign web page may point its own name at 127.0.0.1."""
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1", "", "a/health?x="):
        assert get(f"{url}/v1/models", headers={"Host": host}).status_code == 400
    for host in ("localhost", "localhost:1234", "127.0.0.1", "[::1]:80"):
        assert get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


def test_garbage_by_the_hundred_and_it_answers_on(url: str, client: openai.OpenAI, session: Session) -> None:
    chance = random.Random(1)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    good = json.dumps({**HI, "max_tokens": 1}).encode()
    for index in range(300):
        body = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(address, timeout=30) as connection:
            match index % 3:
                case 0:
                    connection.sendall(chance.randbytes(200))
                case 1:
                    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (len(body) + 50) + bytes(body))
                case _:
                    connection.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + bytes(body))
                    assert connection.recv(4096).startswith(b"HTTP/1.1 ")
    assert client.chat.completions.create(model=NAME, messages=user(QUESTIONS[0])).choices[0].message.content is not None
    wait_until(lambda: session.running == 0)
    assert session.waiting == 0


def test_a_key_is_required_when_set_and_for_public_hosts(session: Session) -> None:
    with serving(session, keys=[SECRET], local=False) as url:
        assert get(f"{url}/health").status_code == 200
        for path in ("/v1/models", "/plan", "/lanes", "/metrics"):
            assert get(f"{url}{path}").status_code == 401
            assert get(f"{url}{path}", headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert get(f"{url}{path}", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert get(f"{url}/v1/models", headers={"Authorization": "Bearer sécret".encode()}).status_code == 401
        assert get(f"{url}/v1/models", headers={"Host": "a/health?x="}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(errors.ConfigurationError, match="api-key-file"):
            check_exposure(host, [])
        check_exposure(host, [SECRET])
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_exposure(host, [])


def test_a_page_of_another_origin_may_use_it_if_allowed(session: Session) -> None:
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    with serving(session, keys=[SECRET], origins=["https://chat.example"]) as url:
        answer = httpx.options(f"{url}/v1/chat/completions", headers=asked)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    with serving(session) as url:
        assert "Access-Control-Allow-Origin" not in httpx.options(f"{url}/v1/chat/completions", headers=asked).headers


def test_health_metrics_plan_lanes_and_page(url: str, client: openai.OpenAI, smollm_model: Any) -> None:
    assert get(f"{url}/lanes").json()["lanes"] == []  # recording begins when somebody looks
    client.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=2)
    lanes = get(f"{url}/lanes?seconds=30").json()
    assert {"compute", "wait"} <= {row["lane"] for row in lanes["lanes"]}
    assert any(row["lane"].startswith("disk") and row["spans"] for row in lanes["lanes"])
    assert lanes["passes"] == smollm_model.profile.passes
    health = {
        "status": "ok",
        "model": NAME,
        "loaded": [NAME],
        "loading": None,
        "running": 0,
        "waiting": 0,
        "start_s": {NAME: 0.0},
    }
    assert get(f"{url}/health").json() == health
    plan = get(f"{url}/plan").json()
    assert plan["rows"] == [list(row) for row in smollm_model.plan.rows()]
    metrics = get(f"{url}/metrics").text
    assert f'rabbit_passes_total{{model="{NAME}"}} {float(smollm_model.profile.passes)}' in metrics
    assert f'rabbit_speculation_tokens_total{{model="{NAME}"}} {float(smollm_model.profile.speculation.tokens)}' in metrics
    assert 'rabbit_requests_total{path="/v1/chat/completions",status="200"}' in metrics
    page = get(url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
