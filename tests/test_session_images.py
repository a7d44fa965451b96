"""Images in conversations: the answers are those of transformers' processor and model."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import aligned
from pictures import as_bytes, as_url, picture, save
from serving import post, serving
from transformers import AutoModelForImageTextToText, AutoProcessor

from rabbit_engine import AutoModelForImageTextToText as Streamed
from rabbit_engine import Lookup, Session
from rabbit_engine.errors import ConfigurationError

Parts = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    with Streamed.from_pretrained(folder, device="cpu", max_memory={"cpu": "369KB"}) as model, Session(model) as session:
        assert model.plan.streamed
        yield session


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    processor, model = AutoProcessor.from_pretrained(folder), aligned(AutoModelForImageTextToText.from_pretrained(folder).eval())

    def answer(parts: Parts, **options: Any) -> list[int]:
        messages = [{"role": "user", "content": parts}]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=8, pad_token_id=0, **{"do_sample": False, **options})
        return [int(token) for token in found[0, inputs["input_ids"].shape[1] :]]

    return answer


def asked(image: object, key: str = "image", text: str = "w5 w6 w7") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": key, key: image}, {"type": "text", "text": text}]}]


def shown(*images: Any, text: str = "w5 w6 w7") -> Parts:
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]


def test_an_image_in_every_form_is_seen_as_by_transformers(session: Session, oracle: Any) -> None:
    image = picture()
    expected = oracle(shown(image))
    data = as_bytes(image)
    forms: list[Any] = [
        asked(image),
        asked(data),
        asked(as_url(data)),
        asked({"url": as_url(data)}, "image_url"),
        asked(as_url(data), "image_url"),
        [{"role": "user", "content": [{"type": "input_image", "image_url": as_url(data)}, "w5 w6 w7"]}],
    ]
    for form in forms:
        reply = session.chat(form, max_new_tokens=8, temperature=0)
        assert list(reply.tokens) == expected
        assert reply.prompt_tokens > 8
    assert expected != oracle(shown(picture(1)))  # the model does look


def test_several_images_and_turns(session: Session, oracle: Any) -> None:
    one, two = picture(2), picture(3, (28, 50))
    assert list(session.chat([{"role": "user", "content": shown(one, two)}], max_new_tokens=8).tokens) == oracle(shown(one, two))


def test_texts_with_and_without_images_share_passes(session: Session, oracle: Any) -> None:
    images = [picture(seed) for seed in range(3)]
    alone = [session.chat("w8 w9", max_new_tokens=8).tokens]
    requests = [session.request(asked(image), max_new_tokens=8) for image in images] + [
        session.request("w8 w9", max_new_tokens=8)
    ]
    found = session.answers(requests)
    assert [list(reply.tokens) for reply in found[:3]] == [oracle(shown(image)) for image in images]
    assert [reply.tokens for reply in found[3:]] == alone


def test_speculation_keeps_the_answer(session: Session, oracle: Any) -> None:
    image = picture(4)
    with Session(session.model, speculate=Lookup(nodes=8)) as guessing:
        assert list(guessing.chat(asked(image), max_new_tokens=8).tokens) == oracle(shown(image))


def test_the_server_takes_data_urls_and_fetches_nothing(session: Session, oracle: Any) -> None:
    image = picture(5)
    with serving(session) as url:
        body = {"model": "test/smol", "messages": asked({"url": as_url(as_bytes(image))}, "image_url"), "max_tokens": 8}
        answer = post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == session.chat(asked(image), max_new_tokens=8).text
        for bad, told in (
            ("http://127.0.0.1:1/cat.png", "addresses are not fetched"),
            ("file:///etc/passwd", "addresses are not fetched"),
            ("/etc/passwd", "addresses are not fetched"),
            ("data:image/png,abc", "must be base64"),
            ("data:image/png;base64,%%%", "not valid base64"),
            (as_url(b"no image"), "cannot read the image"),
            (as_url(as_bytes(image)[:200]), "cannot read the image"),
        ):
            answer = post(f"{url}/v1/chat/completions", json={**body, "messages": asked({"url": bad}, "image_url")})
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "messages.0.content"


def test_every_api_shows_images_of_users_and_of_tools(session: Session) -> None:
    image, other = picture(6), picture(7)
    data = base64.b64encode(as_bytes(image)).decode()
    result = [{"role": "tool", "tool_call_id": "call00001", "content": shown(image)}]
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "", "tool_calls": [call]}, *result]
    expected = {len(one): session.chat(one, max_new_tokens=8) for one in (asked(image), turns)}
    assert session.chat(asked(other), max_new_tokens=8).text != expected[1].text
    named = {"call_id": "call00001"}
    output = [{"type": "input_image", "image_url": as_url(as_bytes(image))}, {"type": "input_text", "text": "w5 w6 w7"}]
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "w8"},
        {"type": "function_call", "name": "look", "arguments": "{}", **named},
    ]
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    blocks = [{"type": "text", "text": "w5 w6 w7"}, source]
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": "call00001", "name": "look", "input": {}}]}
    answered = {"type": "tool_result", "tool_use_id": "call00001", "content": blocks}
    with serving(session) as url:
        for given in (
            [{"role": "user", "content": output}],
            [*items, {"type": "function_call_output", "output": output, **named}],
        ):
            found = post(f"{url}/v1/responses", json={"input": given, "max_output_tokens": 8}).json()
            assert found["output"][0]["content"][0]["text"] == expected[min(3, len(given))].text
        bad = post(
            f"{url}/v1/responses", json={"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]}
        )
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "input.0.content")
        talk = [{"role": "user", "content": "w8"}, used, {"role": "user", "content": [answered]}]
        body = {"model": "test/smol", "messages": talk}
        tokens = post(f"{url}/v1/messages/count_tokens", json=body).json()["input_tokens"]
        whole = post(f"{url}/v1/messages", json={**body, "max_tokens": 8}).json()
    assert tokens == whole["usage"]["input_tokens"]


def test_an_image_that_claims_too_many_pixels_is_refused_undecoded(session: Session) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 2_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ConfigurationError, match=r"60000 x 2000 pixels, more than 50,000,000"):
        session.request(asked(bomb))


def test_a_model_without_eyes_or_processor_says_so(smollm_model: Any, tmp_path: Path) -> None:
    with Session(smollm_model) as text, pytest.raises(ConfigurationError, match="cannot read a part of type 'image', only text"):
        text.request(asked(picture()))
    folder = families.save("gemma3_image", tmp_path)
    with (
        Streamed.from_pretrained(folder, device="cpu") as model,
        Session(model) as session,
        pytest.raises(ConfigurationError, match="image processor"),
    ):
        session.request(asked(picture()))
