"""Ids of tool calls: those that the server gives, and those of other servers, pass templates that insist on nine characters."""

from __future__ import annotations

import re
from typing import Any

import anthropic
import openai
import pytest
from serving import NAME, post
from smol import user

from rabbit_engine import errors
from rabbit_engine.sessions.call_ids import new_call_id, with_fitting_ids

_CHECK = '{% if ID is not defined or ID | length != 9 %}{{ raise_exception("call ids have 9 characters") }}{% endif %}'
NINE = (
    "{% for m in messages %}{% if m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    + _CHECK.replace("ID", "c.id")
    + '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
    + '{% elif m.role == "tool" %}'
    + _CHECK.replace("ID", "m.tool_call_id")
    + "[TOOL_RESULTS] {{ m.tool_call_id }}: {{ m.content }}[/TOOL_RESULTS]"
    + "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
PARAMETERS = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
FUNCTION = {"name": "weather", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}


@pytest.fixture(autouse=True)
def template(smollm_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm_model.tokenizer, "chat_template", NINE)


def spoken(*ids: str) -> list[dict[str, Any]]:
    calls = [{"id": one, "type": "function", "function": {"name": "weather", "arguments": '{"unit": "C"}'}} for one in ids]
    results = [{"role": "tool", "tool_call_id": one, "content": "9"} for one in ids]
    return [*user("Warm?"), {"role": "assistant", "content": None, "tool_calls": calls}, *results]


def test_new_ids_are_nine_letters_and_digits() -> None:
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[A-Za-z0-9]{9}", one) for one in ids)


def test_a_chats_second_turn_is_rendered(client: openai.OpenAI) -> None:
    keywords: dict[str, Any] = {"model": NAME, "tools": [TOOL], "max_tokens": 40, "parallel_tool_calls": False}
    message = client.chat.completions.create(messages=user("Warm?"), tool_choice="required", **keywords).choices[0].message
    assert message.tool_calls
    history = [message, *({"role": "tool", "tool_call_id": call.id, "content": "9"} for call in message.tool_calls)]
    second: Any = [*user("Warm?"), *history]
    assert client.chat.completions.create(messages=second, **{**keywords, "max_tokens": 1}).choices


def test_a_responses_second_turn_is_rendered(client: openai.OpenAI) -> None:
    keywords: dict[str, Any] = {
        "model": NAME,
        "tools": [{"type": "function", **FUNCTION}],
        "max_output_tokens": 40,
        "parallel_tool_calls": False,
    }
    found = client.responses.create(input="Warm?", tool_choice="required", **keywords)
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "9"}
        for item in found.output
        if item.type == "function_call"
    ]
    assert outputs
    assert client.responses.create(input=[*user("Warm?"), *found.output, *outputs], **{**keywords, "max_output_tokens": 1}).output


def test_anthropics_second_turn_is_rendered(url: str) -> None:
    tool = {"name": "weather", "input_schema": PARAMETERS}
    keywords: dict[str, Any] = {"model": NAME, "max_tokens": 40, "tools": [tool]}
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    first = client.messages.create(
        messages=user("Warm?"), tool_choice={"type": "any", "disable_parallel_tool_use": True}, **keywords
    )  # type: ignore[arg-type]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "9"} for block in first.content if "id" in block.to_dict()
    ]
    assert results
    second: Any = [*user("Warm?"), {"role": "assistant", "content": first.content}, *user(results)]
    assert client.messages.create(messages=second, **{**keywords, "max_tokens": 1}).content


def prompt(url: str, messages: Any) -> str:
    found = post(f"{url}/tokenize", json={"messages": messages, "tools": [TOOL]})
    assert found.status_code == 200, found.text
    return str(post(f"{url}/detokenize", json={"tokens": found.json()["tokens"]}).json()["prompt"])


def test_ids_of_other_servers_fit_and_still_tell_calls_apart(url: str) -> None:
    own, others = prompt(url, spoken("abcdefgh1")), ("call_" + "x" * 23 + "1", "call_" + "x" * 23 + "2", "a b", "é")
    assert own.count("abcdefgh1") == 2
    told = re.findall(r'"id": "([^"]*)"', prompt(url, spoken(*others)))
    assert len(set(told)) == len(others)
    assert re.findall(r"\[TOOL_RESULTS\] (\w*):", prompt(url, spoken(*others))) == told


def test_ids_stay_where_the_template_takes_them(url: str, smollm_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm_model.tokenizer, "chat_template", NINE.replace("length != 9", "length != 5"))
    assert prompt(url, spoken("abcde")).count("abcde") == 2


def test_what_else_a_template_rejects_is_told_as_before() -> None:
    def render(messages: Any) -> str:
        raise errors.ConfigurationError(messages[0]["tool_call_id"])

    for given in ("call_1", "abcdefgh1"):
        with pytest.raises(errors.ConfigurationError, match=given):
            with_fitting_ids(render, [{"role": "tool", "tool_call_id": given}])
