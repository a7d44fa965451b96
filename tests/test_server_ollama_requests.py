"""What Ollama's API refuses, ignores and reads, and that nothing a client sends is an error of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import ollama
import pictures
import pytest
import talking
import torch
import uvicorn
from odd import odd_requests
from serving import NAME, running, serving
from waiting import wait_until

from rabbit_engine import AutoModel, AutoModelForImageTextToText, Session
from rabbit_engine.server.app import create_app
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import FOREVER, Host
from rabbit_engine.server.ollama.asking import conversation, generate_question
from rabbit_engine.server.ollama.durations import read_duration
from rabbit_engine.server.ollama.schema import OllamaChat, OllamaGenerate, parse

HI = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
ALL_OPTIONS = {
    "num_keep": 5,
    "seed": 42,
    "num_predict": 3,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 0.7,
    "repeat_last_n": 64,
    "temperature": 0.8,
    "repeat_penalty": 1.2,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
    "mirostat": 0,
    "mirostat_tau": 0.8,
    "mirostat_eta": 0.6,
    "penalize_newline": True,
    "stop": ["~"],
    "numa": False,
    "num_ctx": 1024,
    "num_batch": 2,
    "num_gpu": 1,
    "main_gpu": 0,
    "low_vram": False,
    "vocab_only": False,
    "use_mmap": True,
    "use_mlock": False,
    "num_thread": 8,
}
"""Every option of Ollama's documentation."""


def as_embedder(folder: Path) -> Path:
    """The folder with the files of sentence-transformers."""
    steps = [{"path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"} for path in ("", "1_Pooling")]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """The tiny model that has words, and embeds them too."""
    folder = as_embedder(talking.save(tmp_path_factory.mktemp("talking")))
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, max_new_tokens=3) as session:
        yield session


@pytest.fixture(scope="module")
def address(tiny: Session) -> Iterator[str]:
    with serving(tiny) as url:
        yield url


def ask(address: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{address}/api/{path}", json={"model": NAME, "stream": False, **body}, timeout=60)


BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "chat",
        {
            **HI,
            "stream": False,
            "keep_alive": "5m",
            "think": None,
            "format": "",
            "logprobs": True,
            "top_logprobs": 2,
            "options": {"num_predict": 2, "temperature": 0.5, "seed": 1, "stop": ["~"], "num_ctx": 64, "top_k": 3},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        },
    ),
    (
        "chat",
        {
            "model": NAME,
            "options": {"num_predict": 1},
            "messages": [
                {"role": "user", "content": "Hi", "images": []},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": "5", "tool_name": "f"},
            ],
        },
    ),
    (
        "generate",
        {
            "model": NAME,
            "prompt": "Hi",
            "system": "Be",
            "raw": False,
            "context": [5, 6],
            "stream": True,
            "suffix": "",
            "options": {"num_predict": 2, "repeat_penalty": 1.1, "repeat_last_n": 64, "mirostat": 0, "min_p": 0.1},
        },
    ),
    ("embed", {"model": NAME, "input": ["a", "b"], "truncate": True, "dimensions": 4, "keep_alive": -1, "options": {}}),
    ("embeddings", {"model": NAME, "prompt": "a"}),
    ("show", {"model": NAME, "verbose": True, "name": NAME}),
]


def send_odd(address: str, count: int, seed: int) -> dict[int, int]:
    """How many answers had which status; every error is in Ollama's form."""
    found: dict[int, int] = {}
    with httpx.Client(base_url=address, timeout=60) as client:
        for path, content in odd_requests(BODIES, count, seed):
            answer = client.post(f"/api/{path}", content=content, headers={"Content-Type": "application/json"})
            found[answer.status_code] = found.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (path, content[:300], answer.text)
            if answer.status_code != 200:
                assert isinstance(answer.json()["error"], str)
            else:
                lines = [json.loads(line, parse_constant=pytest.fail) for line in answer.text.splitlines()]
                assert not [line for line in lines if "error" in line], (path, content[:300], answer.text)
    return found


def test_odd_requests_get_answers_or_errors_of_the_client(address: str) -> None:
    found = send_odd(address, 200, seed=1)
    assert found[200] > 20
    assert found[400] > 100


def refused(kind: Any, body: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        parse(kind, body)
    assert caught.value.status == 400
    return str(caught.value)


def test_every_option_of_the_documentation_is_decided(address: str, tiny: Session) -> None:
    assert ask(address, "chat", messages=HI["messages"], options=ALL_OPTIONS).status_code == 200
    assert parse(OllamaChat, {**HI, "options": {"mirostat_tau": 0.8, "unheard_of": 1}}).named_options() == {}
    for name, value in {
        "mirostat": 1,
        "tfs_z": 0.5,
        "repeat_last_n": 33,
        "top_p": 2,
        "temperature": "hot",
        "num_predct": 1,
    }.items():
        assert name in refused(OllamaChat, {**HI, "options": {name: value}})
    for name, value in {
        "suffix": "x",
        "template": "x",
        "temperature": 1,
        "max_tokens": 5,
        "format": "xml",
        "think": "much",
    }.items():
        assert name in refused(OllamaGenerate, {"prompt": "Hi", name: value})
    assert refused(OllamaChat, {"options": 5}) == "options: Input should be a valid dictionary"
    for _ in range(2):
        assert "33 unknown fields" in refused(OllamaChat, {f"quite_unknown_{index}": 1 for index in range(33)})


@pytest.mark.parametrize("count", [-2, -1, 0])
def test_an_unlimited_answer_has_all_the_room(tiny: Session, count: int) -> None:
    asked = parse(OllamaGenerate, {"prompt": "Hi", "options": {"num_predict": count}})
    question = generate_question(tiny, NAME, asked)
    assert question is not None
    assert len(question.request.prompt.ids) + question.request.prompt.answer_tokens == tiny.most_tokens == 128


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        *((None, None), ("", None), (0, 0.0), ("0", 0.0), (300, 300.0), (0.5, 0.5), ("300", 300.0), ("5m", 300.0)),
        *(("1h30m", 5400.0), ("1.5s", 1.5), ("100ms", 0.1), (-1, FOREVER), ("-1", FOREVER), ("-1m", FOREVER), ("-0", 0.0)),
        *((10**400, FOREVER), (float("inf"), FOREVER), ("9" * 400, FOREVER)),
    ],
)
def test_durations_are_read_as_ollama_does(given: Any, seconds: float | None) -> None:
    assert read_duration(given) == seconds


@pytest.mark.parametrize("given", ["m", "5 m", "5x", "--5", "5m3", True, [], {}, float("nan"), "٣s"])
def test_what_is_no_duration_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"duration|seconds"):
        read_duration(given)
    assert refused(OllamaChat, {"keep_alive": given}).startswith("keep_alive: ")


def test_answers_of_tools_belong_to_calls() -> None:
    def call(name: str, **more: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {}}, **more}

    found = conversation(
        [
            {"role": "assistant", "thinking": "hm", "tool_calls": [call("a"), call("b"), call("a", id="mine")]},
            {"role": "tool", "tool_name": "b", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "tool", "tool_name": "a", "content": "3"},
            {"role": "tool", "tool_name": "a", "content": "4"},
        ]
    )
    ids = [one["id"] for one in found[0]["tool_calls"]]
    assert (len(set(ids)), ids[2], len(ids[0])) == (3, "mine", 9)
    assert [one.get("tool_call_id") for one in found[1:]] == [ids[1], ids[0], "mine", None]
    assert (found[0]["reasoning_content"], found[1]["name"]) == ("hm", "b")


def test_vectors_are_those_of_the_session(address: str, tiny: Session) -> None:
    client, texts = ollama.Client(host=address), ["hello", "a" * 500]
    found = client.embed(NAME, texts)
    expected = tiny.embed(texts, truncation=True)
    assert torch.equal(torch.tensor(found.embeddings), expected)
    assert found.prompt_eval_count == 5 + 128
    assert found.total_duration > found.load_duration > 0
    short = client.embed(NAME, "hello", dimensions=4).embeddings
    assert torch.equal(torch.tensor(short[0]), tiny.embed("hello", dimensions=4))
    assert torch.equal(torch.tensor(client.embeddings(NAME, "hello").embedding), tiny.embed("hello"))
    with pytest.raises(ollama.ResponseError, match="more than the 128 that fit"):
        client.embed(NAME, texts, truncate=False)
    assert [*client.embed(NAME, []).embeddings, *client.embed(NAME, "").embeddings, *client.embeddings(NAME, "").embedding] == []


def test_images_of_ollamas_messages_reach_the_model(tmp_path: Path) -> None:
    image = pictures.as_bytes(pictures.picture(5))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "w5 w6"}]
    model = AutoModelForImageTextToText.from_pretrained(pictures.save(tmp_path), device="cpu")
    with model, Session(model) as session, serving(session) as address:
        client, options = ollama.Client(host=address), {"num_predict": 6}
        expected = session.chat([{"role": "user", "content": parts}], max_new_tokens=6).text
        asked = [{"role": "user", "content": "w5 w6", "images": [image]}]
        assert client.chat(NAME, asked, options=options).message.content == expected
        assert client.generate(NAME, "w5 w6", images=[image], options=options).response == expected
        assert client.generate(NAME, "w5 w6", options=options).response != expected
        assert "vision" in (client.show(NAME).capabilities or ())
        for wrong in ("bm8gaW1hZ2U=", "http://127.0.0.1:1/cat", "%%%", ""):
            answer = ask(address, "generate", prompt="w5", images=[wrong])
            assert (answer.status_code, "error" in answer.json()) == (400, True)


def test_models_are_loaded_and_unloaded_as_clients_ask(tmp_path: Path) -> None:
    folder, events = talking.save(tmp_path), list[str]()

    @contextmanager
    def opening(name: str) -> Iterator[Session]:
        events.append(f"+{name}")
        with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, max_new_tokens=3) as session:
            yield session
        events.append(f"-{name}")

    host = Host(["a", "org/b:7b"], opening)
    with running(uvicorn.Server(uvicorn.Config(create_app(host), port=0, http="h11", log_level="warning"))) as port:
        client = ollama.Client(host=f"http://127.0.0.1:{port}")
        assert [card.model for card in client.list().models] == ["a:latest", "org/b:7b"]
        assert client.show("a").capabilities == ["completion"]  # nothing describes it
        assert client.chat("a", [], keep_alive=0).done_reason == "unload"
        assert events == list(client.ps().models) == []
        assert client.generate("a:latest", keep_alive="10m").done_reason == "load"
        (loaded,) = client.ps().models
        assert (loaded.name, loaded.expires_at is not None) == ("a:latest", True)
        assert timedelta(minutes=9) < (loaded.expires_at or datetime.now(UTC)) - datetime.now(UTC) < timedelta(minutes=10)
        assert client.chat("org/b:7b", HI["messages"], keep_alive=-1).message.content
        assert events == ["+a", "-a", "+org/b:7b"]
        assert client.list().models[0].size == client.list().models[1].size  # of "a" it is still known
        assert client.generate("org/b:7b", keep_alive=0).done_reason == "unload"
        wait_until(lambda: events[-1] == "-org/b:7b")
        assert client.ps().models == []
    host.close()
