"""Conversations in the forms in which clients and chat interfaces hand them over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from rabbit_engine import errors
from rabbit_engine.sessions import read_messages


@dataclass
class ChatMessage:
    """As Gradio has it."""

    content: Any
    role: str = "assistant"
    metadata: dict[str, Any] = field(default_factory=dict)
    options: list[Any] = field(default_factory=list)


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


HI = said(("user", "Hi"))
TALK = said(("user", "Hi"), ("assistant", "Yes?"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hi", HI),
        (HI[0], HI),
        (HI, HI),
        (tuple(HI), HI),
        (("user", "Hi"), HI),
        ({"text": "Hi", "files": []}, HI),
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "metadata": None, "options": None}], HI),
        ([{"role": "user", "content": {"text": "Hi", "files": []}}], HI),
        ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], HI),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"text": "b"}, "c"]}], said(("user", "a\nb\nc"))),
        ([{"role": "user", "content": None}], said(("user", ""))),
        ([{"role": "user", "content": []}], said(("user", ""))),
        ([("user", "Hi"), ("assistant", "Yes?")], TALK),
        ([("human", "Hi"), ("ai", "Yes?")], TALK),
        ([["user", [{"type": "text", "text": "Hi"}]], ("assistant", "Yes?")], TALK),
        ([("Hi", "Yes?")], TALK),
        ([["Hi", None]], HI),
        ([ChatMessage("Hi", "user", {"title": "x"}), ChatMessage([{"type": "text", "text": "Yes?"}])], TALK),
        (ChatMessage("Hi", "user"), HI),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}], said(("assistant", "No."))),
    ],
)
def test_every_form_becomes_roles_and_texts(given: Any, expected: list[dict[str, str]]) -> None:
    assert read_messages(given) == expected


def test_messages_of_the_openai_package_and_their_calls_are_read() -> None:
    from openai.types.chat import ChatCompletionMessage

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    (found,) = read_messages([ChatCompletionMessage(role="assistant", tool_calls=[call])])  # type: ignore[list-item]
    assert found["content"] == ""
    assert found["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content: .*'image_url'"),
        ([{"role": "user", "content": [{"type": "file", "file": {"path": "/a/cat.png"}}]}], "cat.png"),
        ([{"role": "user", "content": {"text": "look", "files": ["/a/cat.png"]}}], "cat.png"),
        ({"text": "look", "files": [{"path": "/a/cat.png"}]}, "cat.png"),
        ([{"role": "user", "content": ("/a/cat.png",)}], "messages.0.content"),
        ([*HI, ("assistant", {"path": "/a/cat.png"})], "messages.1.content"),
        ([{"role": "user", "content": 5}], "type int"),
        ([{"role": "user", "content": b"Hi"}], "type bytes"),
        ([{"role": "user", "content": [5]}], "type int"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "'text'"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "cannot be read"),
        ([{"content": "Hi"}], "messages.0.role"),
        ([{"role": 5, "content": "Hi"}], "messages.0.role"),
        (["Hi"], "messages.0.role"),
        ([("a", "b", "c")], "2 items"),
        ([None], "messages.0.role"),
        (None, "NoneType"),
        (5, "int"),
        (b"Hi", "bytes"),
        ([{"role": "assistant", "tool_calls": True}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "no JSON"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(given: Any, says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        read_messages(given)
