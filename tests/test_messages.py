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
        ([{"role": "user", "content": ""}], said(("user", ""))),
        ([{"role": "assistant", "content": None}], said(("assistant", ""))),
        ([{"role": "assistant"}], said(("assistant", ""))),
        ([{"role": "user", "content": []}], said(("user", ""))),
        ([("user", "Hi"), ("assistant", "Yes?")], TALK),
        ([("human", "Hi"), ("ai", "Yes?")], TALK),
        ([["user", [{"type": "text", "text": "Hi"}]], ("assistant", "Yes?")], TALK),
        ([("Hi", "Yes?")], TALK),
        ([["Hi", None]], HI),
        ([ChatMessage("Hi", "user", {"title": "x"}), ChatMessage([{"type": "text", "text": "Yes?"}])], TALK),
        (ChatMessage("Hi", "user"), HI),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}], said(("assistant", "No."))),
        ([{"role": "assistant", "content": None, "refusal": "No."}], [{"role": "assistant", "content": "No.", "refusal": "No."}]),
        ([{"role": "user", "content": ({"type": "text", "text": "a"}, {"text": "b"})}], said(("user", "a\nb"))),
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
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "cannot read a part of type"),
        ([{"role": "user", "content": {"path": "/a/cat.png"}}], "cannot read the file /a/cat.png"),
        ([{"role": "user", "content": ("/a/cat.png", "a cat")}], "cannot read the file /a/cat.png"),
        ([{"role": "user", "content": {"component": "image", "value": {"path": "/a/cat.png"}}}], r"'image' \(/a/cat.png\)"),
        ([{"role": "user", "content": {"x": 1, "y": 2}}], "keys x, y"),
        ([{"content": "Hi"}], "messages.0.role"),
        ({"content": "Hi"}, "messages.0.role"),
        ([{"role": 5, "content": "Hi"}], "messages.0.role"),
        (["Hi"], "messages.0.role"),
        ([("a", "b", "c")], "2 items"),
        ([None], "messages.0.role"),
        (None, "NoneType"),
        (5, "int"),
        (b"Hi", "bytes"),
        ([{"role": "assistant", "tool_calls": True}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not valid JSON"),
    ],
)
def test_anything_but_text_is_refused_with_its_place(given: Any, says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        read_messages(given)


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool", "function"])
@pytest.mark.parametrize("rest", [{}, {"content": None}])
def test_a_message_without_content_is_not_an_empty_question(role: str, rest: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError, match=rf"^messages\.1\.content: .*{role}"):
        read_messages([*HI, {"role": role, **rest}])


@pytest.mark.parametrize(
    ("key", "meant"),
    [("contents", "content"), ("Content", "content"), ("contnet", "content"), ("text", "content"), ("toolCalls", "tool_calls")],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(role: str, key: str, meant: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=rf"^messages\.0\..*did you mean '{meant}'"):
        read_messages([{"role": role, key: "Hi"}])


@pytest.mark.parametrize(
    ("role", "meant"), [("usr", "user"), ("User", "user"), ("asistant", "assistant"), ("SYSTEM", "system"), ("tol", "tool")]
)
def test_a_misspelt_role_is_refused_with_the_one_that_was_meant(role: str, meant: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=rf"^messages\.0\.role: .*did you mean '{meant}'"):
        read_messages([{"role": role, "content": "Hi"}])


@pytest.mark.parametrize("role", ["ipython", "model", "human", "tool_response", "observation", "context"])
def test_other_roles_and_keys_go_to_the_template(role: str) -> None:
    message = {"role": role, "content": "Hi", "step": 3, "weight": 0.5, "name": "x", "reasoning_content": "Hm", "audio": None}
    assert read_messages([message]) == [message]


@pytest.mark.parametrize("key", ["images", "image_url", "files", "audio", "videos"])
def test_media_in_a_message_are_refused_by_name(key: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=rf"^messages\.0\.{key}: .*/a/cat.png.*only text is supported"):
        read_messages([{"role": "user", "content": "look", key: ["/a/cat.png"]}])
    assert read_messages([{"role": "user", "content": "look", key: []}])[0]["content"] == "look"


def test_other_keys_that_would_change_the_answer_are_refused() -> None:
    for extra, says in (({"prefix": True}, "continue_final_message"), ({"function_call": {"name": "f"}}, "use tool_calls")):
        with pytest.raises(errors.ConfigurationError, match=says):
            read_messages([*HI, {"role": "assistant", "content": "x", **extra}])
    nothing = {"prefix": False, "function_call": None, "audio": None, "annotations": None, "refusal": None}
    assert read_messages([*HI, {"role": "assistant", "content": "x", **nothing}])[1]["content"] == "x"


def test_keys_without_end_are_refused_not_compared() -> None:
    many = [{"role": "user", "content": "Hi", f"x{index}": 1} for index in range(50_000)]
    with pytest.raises(errors.ConfigurationError, match="50000 unknown keys"):
        read_messages(many)
