"""Answers that must have a form: OpenAI's, vLLM's and llama.cpp's fields for it, whole and streamed, in every API of OpenAI."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from serving import NAME, post
from smol import user


class City(BaseModel):
    name: str = Field(max_length=20)
    size: Literal["small", "large"]


QUESTION = user("Describe Paris as JSON.")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}
CHAT_TOOL = {"type": "function", "function": WEATHER}
STRICT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}


def test_the_openai_clients_parse_gets_its_class(client: openai.OpenAI) -> None:
    keywords: dict[str, Any] = {"model": NAME, "messages": QUESTION, "response_format": City, "max_tokens": 60}
    parsed = client.chat.completions.parse(**keywords, temperature=1.0, seed=1).choices[0].message.parsed
    assert isinstance(parsed, City)
    with client.chat.completions.stream(**keywords) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, City)
    assert ("".join(pieces), len(pieces) > 3) == (final.content, True)


def test_responses_parse_and_stream_into_a_class(client: openai.OpenAI) -> None:
    keywords: dict[str, Any] = {"model": NAME, "input": "Describe Paris as JSON.", "max_output_tokens": 60, "text_format": City}
    found = client.responses.parse(**keywords)
    assert isinstance(found.output_parsed, City)
    with client.responses.stream(**keywords) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced(client: openai.OpenAI, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": WEATHER["parameters"]}}
    keywords: dict[str, Any] = {
        "model": NAME,
        "messages": user("Hi"),
        "tools": [other, CHAT_TOOL],
        "tool_choice": choice,
        "max_tokens": 60,
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "seed": 3,
    }
    whole = client.chat.completions.create(**keywords).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or ()
    function: Any = call.function  # type: ignore[union-attr]
    assert function.name == "weather" if choice != "required" else function.name in ("weather", "other")
    assert json.loads(function.arguments)["unit"] in ("celsius", "kelvin")
    parts = [chunk.choices[0].delta.tool_calls for chunk in client.chat.completions.create(**keywords, stream=True)]
    streamed = [part[0].function for part in parts if part]
    assert "".join(part.arguments or "" for part in streamed if part) == function.arguments


def test_a_call_can_be_forced_in_responses(client: openai.OpenAI) -> None:
    tool = {"type": "function", **WEATHER}
    for choice in ("required", {"type": "function", "name": "weather"}):
        keywords: dict[str, Any] = {"model": NAME, "input": "Hi", "tools": [tool], "max_output_tokens": 60}
        found: Any = client.responses.create(**keywords, tool_choice=choice, parallel_tool_calls=False)
        assert [(item.type, item.name) for item in found.output] == [("function_call", "weather")]
        assert json.loads(found.output[0].arguments)["unit"] in ("celsius", "kelvin")


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": STRICT},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": SCHEMA},
    ],
)
def test_schemas_are_followed_in_all_fields(url: str, form: Any) -> None:
    for path, body in (("chat/completions", {"messages": QUESTION}), ("completions", {"prompt": "Paris as JSON: "})):
        asked = {"model": NAME, "max_tokens": 60, "temperature": 1.0, "seed": 2, **body, **form}
        choice = post(f"{url}/v1/{path}", json=asked).json()["choices"][0]
        City.model_validate_json(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        ({"guided_choice": ["alpha", "beta"]}, ("alpha", "beta")),
        ({"structured_outputs": {"choice": ["alpha", "beta"]}}, ("alpha", "beta")),
        ({"guided_regex": "(yes|no)!"}, ("yes!", "no!")),
        ({"regex": "(yes|no)!"}, ("yes!", "no!")),
        ({"guided_grammar": 'root ::= "one" | "two"'}, ("one", "two")),
        ({"grammar": 'start: "one" | "two"'}, ("one", "two")),
    ],
)
def test_choices_regular_expressions_and_grammars(url: str, form: Any, allowed: Any) -> None:
    asked = {"model": NAME, "messages": user("Hi"), "max_tokens": 16, "temperature": 1.0, **form}
    assert post(f"{url}/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"] in allowed


def test_any_object_begins_with_a_brace(url: str) -> None:
    for form in ({"response_format": {"type": "json_object"}}, {"guided_json_object": True}):
        asked = {"model": NAME, "messages": user("Hi"), "max_tokens": 4, **form}
        assert post(f"{url}/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"].startswith("{")


UNSERVABLE = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "expected an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "JSON schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'yaml' is not one of"),
        ({"response_format": "json"}, "response_format", "expected an object"),
        ({"response_format": {"type": "json_object", "schema": UNSERVABLE}}, "response_format", "#/properties/a"),
        ({"guided_json": UNSERVABLE}, "guided_json", "#/properties/a"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "only one"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "only one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "possible are"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "expected"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [CHAT_TOOL]}, "tool_choice", "not among"),
        ({"tools": [CHAT_TOOL], "response_format": STRICT}, "response_format", "calls no tools"),
        ({"tools": [CHAT_TOOL], "tool_choice": "required", "response_format": STRICT}, "tool_choice", "cannot follow"),
        ({"guided_json": SCHEMA, "ignore_eos": True}, None, "ignore_eos"),
    ],
)
def test_a_form_that_cannot_be_served_is_refused_with_the_part(url: str, body: Any, param: str | None, says: str) -> None:
    answer = post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": user("Hi"), **body})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param or param is None
