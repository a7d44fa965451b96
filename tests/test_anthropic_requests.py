"""Requests of Anthropic's Messages API, read and refused; and the input of tools, in any pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rabbit_engine.server.anthropic.content import ToolInput
from rabbit_engine.server.anthropic.conversation import read_conversation
from rabbit_engine.server.anthropic.schema import CountRequest, MessagesRequest, parse
from rabbit_engine.server.anthropic.tools import read_tools
from rabbit_engine.server.errors import RequestError

ASKED: dict[str, Any] = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_a_conversation_with_tools_is_read_in_its_order() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("a"), text("b")]}
    failed = {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": "no such file"}
    says_so = {**failed, "content": "Error: no such file"}
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    found_page = {"type": "search_result", "title": "P", "source": "https://p", "content": [text("page")]}
    calls = [{"type": "tool_use", "id": f"t{index}", "name": "look", "input": {"at": index}} for index in (1, 2)]
    messages = [
        {"role": "user", "content": "One"},
        {"role": "user", "content": [text("Two"), document, found_page]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": ""}, text("Look."), calls[0]]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, calls[1]]},
        {"role": "user", "content": [result, failed, says_so, text("And?")]},
    ]
    functions = [{"id": f"t{n}", "type": "function", "function": {"name": "look", "arguments": {"at": n}}} for n in (1, 2)]
    assert read_conversation(None, messages) == [
        {"role": "user", "content": [text("One"), text("Two"), text("T\nD"), text("P\nhttps://p\npage")]},
        {"role": "assistant", "content": [text("Look.")], "reasoning_content": "Hm", "tool_calls": functions},
        {"role": "tool", "tool_call_id": "t1", "name": "look", "content": "a\nb"},
        {"role": "tool", "tool_call_id": "t2", "name": "look", "content": "Error: no such file"},
        {"role": "tool", "tool_call_id": "t2", "name": "look", "content": "Error: no such file"},
        {"role": "user", "content": [text("And?")]},
    ]


def of_user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([5], "messages.0: "),
        ([{"role": "human", "content": "Hi"}], "messages.0.role: "),
        ([{"role": "user"}], "messages.0.content: "),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages.0.content: "),
        (of_user("Hi"), "messages.0.content.0: "),
        (of_user({"type": "text"}), "messages.0.content.0.text: "),
        (of_user({"type": "video"}), "messages.0.content.0: cannot read a block of type 'video'"),
        (of_user(text("x"), {"type": "tool_use", "id": "a", "name": "b", "input": {}}), "messages.0.content.1: cannot read"),
        (of_user(IMAGE), "messages.0.content.0.source: the server fetches nothing"),
        (
            of_user({"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}),
            "content.0.content.0.source: the server fetches",
        ),
        (of_user({"type": "tool_result"}), "messages.0.content.0.tool_use_id: "),
        (
            of_user({"type": "document", "source": {"type": "base64", "data": ""}}),
            "content.0.source: only documents of",
        ),
        (of_user({"type": "document", "source": {"type": "url", "url": "x"}}), "messages.0.content.0.source: the server fetches"),
        (of_user({"type": "document", "source": None}), "messages.0.content.0.source: "),
        (of_user({"type": "document", "source": {"type": "text", "data": "x"}, "citations": {"enabled": True}}), "citations: "),
        ([{"role": "assistant", "content": [{"type": "server_tool_use"}]}], "messages.0.content.0: cannot read a block"),
        ([{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": []}]}], "content.0.input: "),
    ],
)
def test_what_cannot_be_read_is_named(messages: Any, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_conversation(None, messages)
    assert says in str(refused.value)
    assert refused.value.status == 400


def test_what_tools_return_besides_text_never_ends_a_conversation() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    paper = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
    results = [
        {"type": "tool_result", "tool_use_id": f"t{index}", "content": content} for index, content in enumerate(([image], "read"))
    ]
    messages = of_user(*results, paper, image, text("And?"))
    seen, blind = (read_conversation(None, messages, with_images=with_images) for with_images in (True, False))
    shown, told = {"type": "image", "base64": "aGk="}, text("(A document that is not text, which you cannot read.)")
    assert [message["content"] for message in seen] == [
        "(The image is in the next message.)",
        "read",
        [shown, told, shown, text("And?")],
    ]
    unseen = "(An image, which you cannot see.)"
    assert [message["content"] for message in blind] == [unseen, "read", [told, text(unseen), text("And?")]]
    assert [message["role"] for message in seen] == ["tool", "tool", "user"]
    assert read_conversation(None, of_user(image), with_images=False)[0]["content"] == [shown]  # the session refuses the user's


def test_system_texts_lose_the_lines_that_change() -> None:
    changing = "x-anthropic-billing-header: cc_version=2.1; cch=1;"
    kept = "Answer.\nx-anthropic-billing-header: is a header."
    for system in (f"{changing}\n{kept}", [text(changing), text(kept)], [text(f"\n{changing}\n{changing}\n{kept}")]):
        assert read_conversation(system, ASKED["messages"])[0] == {"role": "system", "content": [text(kept)]}
    assert read_conversation(changing, ASKED["messages"])[0]["role"] == "user"
    for wrong in (5, [IMAGE], [text("x"), {"type": "text", "text": None}]):
        with pytest.raises(RequestError, match="system"):
            read_conversation(wrong, ASKED["messages"])


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        (5, "tools.0: "),
        ({"type": "web_search_20250305", "name": "web_search"}, "tools.0: the tool 'web_search_20250305' is Anthropic's own"),
        ({"input_schema": {}}, "tools.0.name: "),
        ({"name": "a"}, "tools.0.input_schema: "),
        ({"name": "a", "input_schema": {}, "description": 5}, "tools.0.description: "),
        ({"name": "a", "input_schema": {}, "allowed_callers": ["code_execution_20250825"]}, "tools.0.allowed_callers: "),
    ],
)
def test_a_tool_that_cannot_be_offered_is_named(tool: Any, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_tools([tool])
    assert str(refused.value).startswith(says)
    with pytest.raises(RequestError, match="two of them are called 'a'"):
        read_tools([{"name": "a", "input_schema": {}}] * 2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": "5"}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": {}}, "messages: "),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"stop_sequences": "END"}, "stop_sequences: "),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences: "),
        ({"stream": "yes"}, "stream: "),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type: "),
        ({"thinking": {"type": "deep"}}, "thinking.type: "),
        ({"output_config": {"effort": "most"}}, "output_config.effort: "),
        ({"container": "c"}, "container is not supported: "),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported: "),
        ({"stop": "END"}, "stop is not supported: use stop_sequences"),
        ({"stop_sequence": ["END"]}, "did you mean 'stop_sequences'"),
        ({"max_token": 5}, "did you mean 'max_tokens'"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(MessagesRequest, {**ASKED, **fields})
    assert says in str(refused.value)
    assert refused.value.status == 400


def test_fields_without_effect_are_taken() -> None:
    ignored = {"metadata": {"user_id": "x"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}, "betas": ["a"]}
    off: dict[str, Any] = {"container": None, "mcp_servers": [], "stop": None, "n": 1, "context_management": {"edits": []}}
    found = parse(MessagesRequest, {**ASKED, **ignored, **off, "of_another_age": 1, "temperature": 1})
    assert found.options() == {"temperature": 1}
    assert parse(CountRequest, {key: ASKED[key] for key in ("model", "messages")}).most_calls is None


# The input of tools.

INPUTS = [
    ('{"a": [1, {"b": "c\\n\\u00e9"}], "d": null}', {"a": [1, {"b": "c\né"}], "d": None}),
    ("", {}),
    ("  ", {}),
    (' {"a": 1', {"a": 1}),
    ('{"a": "unfini', {}),
    ('{"a": 1, "b": two, "c": 3}', {"a": 1}),
    ('{"a": 1, "b": "raw\nnewline"}', {"a": 1}),
    ("[1, 2]", {}),
    ('"text"', {}),
    ("12", {}),
    ('{"a": 1e999}', {}),
    ('{"a": NaN}', {}),
    ('{"a":' * 300 + "1" + "}" * 300, None),
    ('{"a": "\\ud800"}', {}),
]


@pytest.mark.parametrize(("given", "expected"), INPUTS)
def test_the_input_of_a_tool_is_the_same_in_any_pieces(given: str, expected: Any) -> None:
    whole = ToolInput()
    told = whole.push(given)
    assert given.startswith(told)
    if expected is not None:
        assert whole.value == expected
    json.dumps(whole.value, allow_nan=False, ensure_ascii=False).encode()
    for seed in range(10):
        dice, pieces, at = random.Random(seed), ToolInput(), 0
        shown = ""
        while at < len(given):
            size = dice.choice((1, 1, 2, 5))
            shown += pieces.push(given[at : at + size])
            at += size
        assert (shown, pieces.value) == (told, whole.value)
