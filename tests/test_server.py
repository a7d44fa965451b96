"""The service, over real HTTP, with OpenAI's own client, and with clients that mean no good."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
import uvicorn
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from rabbit_engine import Session, errors
from rabbit_engine.server.app import check_exposure, create_app
from rabbit_engine.server.body import MOST_BODY_BYTES
from rabbit_engine.server.tools import ToolCall, may_be_call, parse_calls
from rabbit_engine.tasks.embedding import Embedder, find_embedder

QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2+2?", "Who wrote Hamlet?")
NAME = "test/smol"
post, get = (
    partial(httpx.post, timeout=60),
    partial(httpx.get, timeout=60),
)  # httpx itself waits for 5 s: too short on a busy machine


@contextmanager
def serving(session: Session, **keywords: Any) -> Iterator[str]:
    """The address of a server in a new thread."""
    config = uvicorn.Config(create_app(session, NAME, **keywords), port=0, log_level="warning", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def model(smollm_model: Any) -> Any:
    return smollm_model


@pytest.fixture(scope="module")
def session(model: Any) -> Iterator[Session]:
    with Session(model, max_new_tokens=8, max_queue=8) as session:
        yield session


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with serving(session) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def alone(model: Any, text: str, **keywords: Any) -> str:
    """What `generate` says."""
    ids = model.tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = ids["input_ids"].shape[1]
    tokens = model.generate(**ids, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, **keywords})[0, start:]
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


def test_the_openai_client_gets_a_whole_answer(client: openai.OpenAI, model: Any) -> None:
    found = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[0]))
    assert found.choices[0].message.content == alone(model, QUESTIONS[0]) == "The capital of France is Paris."
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8
    assert [card.id for card in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def events_of(answer: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, without the last."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def extras(value: Any) -> Iterator[str]:
    """The fields that a value of the openai package's types has and its type does not know."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from extras(part)
    elif isinstance(value, BaseModel):
        yield from (f"{type(value).__name__}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from extras(getattr(value, name))


@pytest.mark.parametrize(
    "body", [{"messages": user("Hi"), "logprobs": True, "top_logprobs": 2}, {"messages": user("Hi"), "n": 2, "seed": 1}]
)
def test_chat_answers_are_of_the_openai_packages_own_types(url: str, body: Any) -> None:
    asked = {"model": NAME, "max_tokens": 4, **body}
    answer = ChatCompletion.model_validate(post(f"{url}/v1/chat/completions", json=asked).json(), strict=True)
    streamed = post(f"{url}/v1/chat/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events_of(streamed)]
    assert not [*extras(answer), *extras(chunks)]
    assert chunks[-1].usage == answer.usage


def test_completions_are_of_the_openai_packages_own_types(url: str) -> None:
    asked = {"model": NAME, "max_tokens": 3, "prompt": ["One", "Two"], "logprobs": 2}
    answer = Completion.model_validate(post(f"{url}/v1/completions", json=asked).json(), strict=True)
    assert not [*extras(answer)]
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_models_and_errors_are_of_the_openai_packages_own_types(url: str) -> None:
    cards = [Model.model_validate(card, strict=True) for card in get(f"{url}/v1/models").json()["data"]]
    assert [*extras(cards)] == ["Model.max_model_len"]  # as vLLM's server says it
    refused = ErrorObject.model_validate(post(f"{url}/v1/completions", json={"model": NAME}).json()["error"], strict=True)
    assert (refused.type, refused.param, [*extras(refused)]) == ("invalid_request_error", "prompt", [])


def test_the_openai_client_gets_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[1])).choices[0]
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=user(QUESTIONS[1]), stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.message.content
    assert len([text for text in texts if text]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_four_at_once_each_get_their_own_in_the_passes_of_one(url: str, model: Any) -> None:
    expected = [alone(model, text) for text in QUESTIONS]

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(model=NAME, messages=user(text)) for text in QUESTIONS]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    before = model.profile.passes
    assert asyncio.run(all_of_them()) == expected
    assert model.profile.passes - before < 2 * 8


def test_n_seed_stop_and_logprobs(client: openai.OpenAI, model: Any) -> None:
    torch.manual_seed(5)
    expected = alone(model, QUESTIONS[1], do_sample=True, temperature=0.8)
    drawn = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[1]), n=2, seed=5, temperature=0.8)
    assert [choice.index for choice in drawn.choices] == [0, 1]
    assert drawn.choices[0].message.content == expected != drawn.choices[1].message.content
    assert drawn.usage is not None
    assert drawn.usage.completion_tokens == 16
    stopped = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[0]), stop=[" of"]).choices[0]
    assert stopped.message.content == "The capital"
    assert stopped.finish_reason == "stop"
    told = client.chat.completions.create(
        model=NAME, messages=user(QUESTIONS[0]), logprobs=True, top_logprobs=2, max_tokens=3
    ).choices[0]
    assert told.logprobs is not None
    assert told.logprobs.content is not None
    assert "".join(token.token for token in told.logprobs.content) == told.message.content
    assert [len(token.top_logprobs) for token in told.logprobs.content] == [2, 2, 2]
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in told.logprobs.content)


def test_streamed_choices_have_their_index(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=user("Hi"), n=2, seed=3, temperature=1.0)
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=NAME, messages=user("Hi"), n=2, seed=3, temperature=1.0, stream=True, logprobs=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_completions_of_several_prompts(client: openai.OpenAI, model: Any) -> None:
    prompts = ["Once upon a time", "The sky is"]
    found = client.completions.create(model=NAME, prompt=prompts, max_tokens=5, logprobs=2, temperature=0)
    for prompt, choice in zip(prompts, found.choices, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert choice.text == model.tokenizer.decode(tokens)
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert [len(top) for top in choice.logprobs.top_logprobs or []] == [2] * 5
    ids = model.tokenizer(prompts[1])["input_ids"]
    assert client.completions.create(model=NAME, prompt=ids, max_tokens=5).choices[0].text == found.choices[1].text
    keywords: dict[str, Any] = {"model": NAME, "prompt": ["A much longer prompt than the other", "B"], "n": 2, "max_tokens": 3}
    ended = list(client.completions.create(**keywords, stream=True, stream_options={"include_usage": True}))[-1]
    assert ended.usage == client.completions.create(**keywords).usage
    pieces = client.completions.create(model=NAME, prompt=prompts[0], max_tokens=5, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == prompts[0] + found.choices[0].text


def test_the_chat_client_of_transformers_is_understood(url: str, model: Any) -> None:
    """`transformers chat` looks at /health, asks for the model to be loaded, and sends its generation config as JSON."""
    with httpx.stream("POST", f"{url}/load_model", json={"model": NAME}) as loaded:
        assert json.loads(next(loaded.iter_lines()).removeprefix("data: "))["status"] == "ready"
    from huggingface_hub import InferenceClient
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=4)
    client = InferenceClient(f"{url}/v1")  # it closes its streams when it goes
    stream = client.chat_completion(
        user(QUESTIONS[0]), stream=True, model=NAME, extra_body={"generation_config": config.to_json_string(), "model": NAME}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == alone(model, QUESTIONS[0], max_new_tokens=4)


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


def test_a_full_queue_answers_429_with_retry_after(model: Any) -> None:
    with Session(model, max_requests=1, max_queue=0) as session, serving(session) as url:
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
def test_a_client_that_disconnects_before_the_first_chunk_frees_its_places(model: Any, n: int) -> None:
    body = json.dumps({"model": NAME, "messages": user("Count."), "max_tokens": 500, "stream": True, "n": n}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with Session(model, max_requests=16, max_queue=200) as session, serving(session) as url:
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


HI = {"model": NAME, "messages": user("Hi")}


@pytest.mark.parametrize(
    ("status", "body", "path", "says", "param"),
    [
        bad(400, "{", says="not valid JSON"),
        bad(400, "[1]", says="not a JSON object"),
        bad(400, "[" * 100_000, says="not valid JSON"),
        bad(400, '{"model": "\\ud800", "messages": []}', says="not valid JSON"),
        bad(400, {}, says="model"),
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
        bad(400, {**HI, "response_format": {"type": "json_schema"}}, says="response_format", param="response_format"),
        bad(400, {**HI, "tool_choice": "required"}, says="tool_choice", param="tool_choice"),
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
    with serving(session, api_key="secret", local=False) as url:
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
            check_exposure(host, None)
        check_exposure(host, "secret")
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_exposure(host, None)


def test_a_page_of_another_origin_may_use_it_if_allowed(session: Session) -> None:
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    with serving(session, api_key="secret", origins=["https://chat.example"]) as url:
        answer = httpx.options(f"{url}/v1/chat/completions", headers=asked)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    with serving(session) as url:
        assert "Access-Control-Allow-Origin" not in httpx.options(f"{url}/v1/chat/completions", headers=asked).headers


def test_health_metrics_plan_lanes_and_page(url: str, client: openai.OpenAI, model: Any) -> None:
    assert get(f"{url}/lanes").json()["lanes"] == []  # recording begins when somebody looks
    client.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=2)
    lanes = get(f"{url}/lanes?seconds=30").json()
    assert {"compute", "wait"} <= {row["lane"] for row in lanes["lanes"]}
    assert any(row["lane"].startswith("disk") and row["spans"] for row in lanes["lanes"])
    assert lanes["passes"] == model.profile.passes
    assert get(f"{url}/health").json() == {"status": "ok", "model": NAME, "running": 0, "waiting": 0}
    plan = get(f"{url}/plan").json()
    assert plan["rows"] == [list(row) for row in model.plan.rows()]
    metrics = get(f"{url}/metrics").text
    assert f"rabbit_passes_total {float(model.profile.passes)}" in metrics
    assert 'rabbit_requests_total{path="/v1/chat/completions",status="200"}' in metrics
    page = get(url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_tool_calls_are_parsed_from_the_text(url: str, client: openai.OpenAI, monkeypatch: Any, model: Any) -> None:
    """A model this small calls nothing by itself: its template is made to, and what it writes is replaced, token by token."""
    wanted = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    tokens = [*model.tokenizer(wanted)["input_ids"], model.tokenizer.eos_token_id]
    forward = model.lm_head.forward
    sent: list[int] = []

    def say(states: torch.Tensor) -> torch.Tensor:
        logits = forward(states)
        logits[..., tokens[min(len(sent), len(tokens) - 1)]] = 1e4
        sent.append(1)
        return logits

    monkeypatch.setattr(model.lm_head, "forward", say)
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Weather?"), "tools": TOOLS, "max_tokens": 64}
    whole = client.chat.completions.create(**keywords).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "I look."
    assert whole.message.tool_calls is not None
    call: Any = whole.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    sent.clear()
    chunks = list(client.chat.completions.create(**keywords, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "tool_call" not in "".join(delta.content or "" for delta in deltas)
    assert [delta.tool_calls[0].function.name for delta in deltas if delta.tool_calls] == ["weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    monkeypatch.undo()
    history = [
        *user("Weather?"),
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert client.chat.completions.create(model=NAME, messages=history, max_tokens=1).choices


@pytest.mark.parametrize(
    ("text", "rest", "names"),
    [
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', "", ["a"]),
        ('Yes.<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>', "Yes.", ["a", "b"]),
        ('[TOOL_CALLS] [{"name": "a", "arguments": {}}]', "", ["a"]),
        ('<|python_tag|>{"name": "b", "parameters": {"q": "é"}}', "", ["b"]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ("just text", "just text", []),
        ("{" * 5000, "{" * 5000, []),
    ],
)
def test_calls_in_the_commonest_forms(text: str, rest: str, names: list[str]) -> None:
    found, calls = parse_calls(text, ["a", "b"])
    assert (found, [call.name for call in calls]) == (rest, names)
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    if calls:
        assert any(may_be_call(text[:length]) for length in range(1, len(text)))
        assert may_be_call(text)
    assert not may_be_call("Certainly")
    assert may_be_call("Sure:\n<")
    assert may_be_call("Sure:\n<tool_c")
    assert ToolCall("a", "{}") == ToolCall("a", "{}")


@pytest.fixture
def embedding_folder(own_checkpoint: Any) -> Callable[..., Path]:
    def make(pooling: str, normalize: bool = True) -> Path:
        folder = own_checkpoint("qwen3")
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
        steps = [
            {"idx": index, "path": "" if index == 0 else f"{index}_{kind}", "type": f"sentence_transformers.models.{kind}"}
            for index, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(steps))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        return folder

    return make


@pytest.mark.parametrize("pooling", ["lasttoken", "mean_tokens", "cls_token"])
def test_embeddings_of_a_model_that_embeds(
    embedding_folder: Any, streamed: Any, plain: Any, smollm_model: Any, pooling: str
) -> None:
    folder = embedding_folder(pooling)
    model = streamed(folder)

    class Words:
        """The tiny model has no words: 96 tokens, letters."""

        eos_token_id, pad_token_id, padding_side, chat_template = 2, 2, "left", None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

        def __len__(self) -> int:
            return 96

    model.tokenizer = Words()
    whole = plain(folder)
    texts = ["hello", "a longer text"]
    with Session(model) as session, serving(session) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = client.embeddings.create(model=NAME, input=texts)  # base64, as the client asks by itself
        floats = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
        short = client.embeddings.create(model=NAME, input=texts[0], dimensions=4).data[0].embedding
    assert found.usage.prompt_tokens == sum(map(len, texts))
    for text, one, other in zip(texts, found.data, floats.data, strict=True):
        with torch.no_grad():
            ids = torch.tensor([Words()(text)["input_ids"]])
            states = whole.model(ids).last_hidden_state[0]
        vector = {"lasttoken": states[-1], "mean_tokens": states.mean(0), "cls_token": states[0]}[pooling]
        expected = torch.nn.functional.normalize(vector, dim=0)
        assert one.embedding == other.embedding
        torch.testing.assert_close(torch.tensor(one.embedding), expected, rtol=0, atol=1e-6)
    assert len(short) == 4
    assert sum(value**2 for value in short) == pytest.approx(1, abs=1e-5)


def test_unknown_ways_of_embedding_are_reported(embedding_folder: Any) -> None:
    folder = embedding_folder("weightedmean_tokens")
    with pytest.raises(errors.ConfigurationError, match="weightedmean"):
        find_embedder(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    assert find_embedder(folder) == Embedder("pooling_mode_mean_tokens", True)
    (folder / "modules.json").unlink()
    assert find_embedder(folder) is None


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize(
    "text", ['{"a"', "[1]", '"x"', "\x00", "[" * 100_000, '[{"type": 5}]', '{"pooling_mode_mean_tokens": 1}', "\xff"]
)
def test_damaged_files_of_embedding_are_named(name: str, text: str, embedding_folder: Any) -> None:
    folder = embedding_folder("mean_tokens")
    assert find_embedder(folder) == Embedder("pooling_mode_mean_tokens", True)
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.DamagedCheckpointError, match=re.escape(str(folder / name))):
        find_embedder(folder)


def test_pooling_outside_of_the_checkpoint_is_refused(embedding_folder: Any) -> None:
    folder = embedding_folder("mean_tokens")
    (folder / "modules.json").write_text('[{"type": "a.Pooling", "path": "../other"}]')
    with pytest.raises(errors.DamagedCheckpointError, match=r"'../other' leads outside"):
        find_embedder(folder)


def test_the_tokenizer_is_loaded_before_the_first_request(own_checkpoint: Any, streamed: Any, smollm_model: Any) -> None:
    folder = own_checkpoint("qwen3")
    smollm_model.tokenizer.save_pretrained(folder)
    with Session(streamed(folder)) as session:
        app = create_app(session, NAME)
        for path in folder.glob("*token*"):
            path.unlink()
        assert session.model.tokenizer("Hello")["input_ids"] == smollm_model.tokenizer("Hello")["input_ids"]
    assert app.title == "rabbit_engine"


def test_a_model_that_only_embeds_is_served(own_checkpoint: Any, streamed: Any, smollm_model: Any) -> None:
    """Of a class without a head, as many checkpoints of sentence-transformers are; it cannot chat, and says so."""
    folder = own_checkpoint("qwen3")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)  # the class without a head
    assert "lm_head" not in (folder / "config.json").read_text()
    kinds = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model = streamed(folder)
    model.tokenizer = smollm_model.tokenizer
    assert type(model).__name__ == "Qwen3Model"
    with Session(model) as session, serving(session) as url:
        answer = post(f"{url}/v1/embeddings", json={"model": NAME, "input": [[5, 6, 7]]}).json()
        chat = post(f"{url}/v1/chat/completions", json=HI)
    with torch.no_grad():
        whole = transformers.AutoModel.from_pretrained(folder)(torch.tensor([[5, 6, 7]])).last_hidden_state[0].mean(0)
    found = CreateEmbeddingResponse.model_validate(answer, strict=True)
    assert not [*extras(found)]
    torch.testing.assert_close(torch.tensor(found.data[0].embedding), whole, rtol=0, atol=1e-6)
    assert chat.status_code == 400
    assert "does not generate" in chat.json()["error"]["message"]


def rabbit(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from rabbit_engine.cli import main; main()", "serve", *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )


def test_the_command_serves_until_it_is_stopped(smollm: Path, smollm_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    process = rabbit(
        *(smollm, "--port", 0, "--name", NAME, "--max-memory", "150MB", "--api-key-file", tmp_path / "key"),
        *("--saving-path", smollm_shards),
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith(f"{NAME}: http"))
        base = line.split()[1]
        client = openai.OpenAI(base_url=f"{base}v1", api_key="secret", timeout=120)
        stream = client.chat.completions.create(model=NAME, messages=user("Count to a thousand."), stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "api-key-file"),
        (["--api-key-file", "/nowhere/key"], "cannot read"),
        (["--overflow", "maybe"], "'--overflow'"),
    ],
)
def test_serve_refuses_wrong_options_before_it_loads(arguments: list[str], says: str) -> None:
    process = rabbit("no-such-model-anywhere", *arguments)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert says in told
    assert "Traceback" not in told


def test_a_port_in_use_is_reported_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = rabbit("no-such-model-anywhere", "--port", taken.getsockname()[1])
        _, told = process.communicate(timeout=120)
    assert "cannot listen" in told
