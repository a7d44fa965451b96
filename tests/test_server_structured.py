"""Answers that must have a form: OpenAI's, vLLM's and llama.cpp's fields for it, whole and streamed, in every API of OpenAI."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from serving import NAME, post
from smol import lighten, user

from rabbit_engine import Session


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


@pytest.fixture(autouse=True)
def _a_grammar_decides(smollm_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proven here is the form of answers, whatever a model would say: the draws of this one are wild."""
    lighten(smollm_model, monkeypatch)


def test_the_openai_clients_parse_gets_its_class(client: openai.OpenAI) -> None:
    keywords: dict[str, Any] = {"model": NAME, "messages": QUESTION, "response_format": City, "max_tokens": 160}
    parsed = client.chat.completions.parse(**keywords, temperature=1.0, seed=1).choices[0].message.parsed
    assert isinstance(parsed, City)
    with client.chat.completions.stream(**keywords) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, City)
    assert ("".join(pieces), len(pieces) > 3) == (final.content, True)


def test_responses_parse_and_stream_into_a_class(client: openai.OpenAI) -> None:
    keywords: dict[str, Any] = {"model": NAME, "input": "Describe Paris as JSON.", "max_output_tokens": 160, "text_format": City}
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
        "max_tokens": 160,
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
        keywords: dict[str, Any] = {"model": NAME, "input": "Hi", "tools": [tool], "max_output_tokens": 160}
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
        asked = {"model": NAME, "max_tokens": 160, "temperature": 1.0, "seed": 2, **body, **form}
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


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def first(session: Session, text: str, value: float) -> dict[str, float]:
    """A bias for or against beginning with a character."""
    return {str(session.model.tokenizer(text, add_special_tokens=False)["input_ids"][0]): value}


def test_with_tools_the_model_calls_one_or_answers_in_the_form(url: str, session: Session) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": QUESTION, "tools": [CHAT_TOOL], "response_format": STRICT}
    asked |= {"max_tokens": 160, "parallel_tool_calls": False}
    calls = post(f"{url}/v1/chat/completions", json={**asked, "logit_bias": first(session, "<", 100)}).json()["choices"][0]
    assert json.loads(calls["message"]["tool_calls"][0]["function"]["arguments"])["unit"] in ("celsius", "kelvin")
    body = {**asked, "logit_bias": first(session, "<", -100), "stream": True}
    lines = post(f"{url}/v1/chat/completions", json=body).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    texts = [chunk["delta"]["content"] for chunk in chunks if chunk["delta"].get("content")]
    City.model_validate_json("".join(texts))
    assert (chunks[-1]["finish_reason"], len(texts) > 3) == ("stop", True)


def test_anthropics_form_leaves_tools_to_be_called(url: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"name": "weather", "input_schema": WEATHER["parameters"]}
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    asked: dict[str, Any] = {"model": NAME, "messages": QUESTION, "tools": [tool], "output_config": form}
    seen: list[Any] = []
    own = session.request
    monkeypatch.setattr(session, "request", lambda *given, **named: seen.append(named) or own(*given, **named))
    whole = post(f"{url}/v1/messages", json={**asked, "max_tokens": 2})
    assert (whole.status_code, seen[0]["grammar"].kind) == (200, "either")


def test_a_template_whose_calls_are_not_known_is_a_reason(url: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = "{% for c in m.tool_calls or [] %}<fn={{ c.function.name }}>{% endfor %}"
    other = f"{{% for m in messages %}}{{{{ m.content }}}}{calls}{{% endfor %}}"
    monkeypatch.setattr(session.model.tokenizer, "chat_template", other)
    asked = {"model": NAME, "messages": QUESTION, "tools": [CHAT_TOOL], "response_format": STRICT}
    answer = post(f"{url}/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
    assert "not known here" in answer.json()["error"]["message"]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_offered_and_called(
    url: str, session: Session, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for t in tools %}{{ t.function.name }} {% endfor %}" + str(session.model.tokenizer.chat_template)
    monkeypatch.setattr(session.model.tokenizer, "chat_template", template)
    other = {"type": "function", "function": {"name": "other", "parameters": WEATHER["parameters"]}}
    seen: list[Any] = []
    own, most = session.request, 80 if mode == "required" else 1
    monkeypatch.setattr(session, "request", lambda *given, **named: seen.append(named) or own(*given, **named))
    chat = {
        "model": NAME,
        "messages": user("Hi"),
        "max_tokens": most,
        "tools": [other, CHAT_TOOL],
        "tool_choice": allowed(mode, "weather"),
    }
    answer = post(f"{url}/v1/chat/completions", json={**chat, "parallel_tool_calls": False}).json()
    flat = [{"type": "function", **tool["function"]} for tool in (other, CHAT_TOOL)]
    chosen = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "weather"}]}
    asked = {"model": NAME, "input": "Hi", "tools": flat, "tool_choice": chosen, "max_output_tokens": most}
    response = post(f"{url}/v1/responses", json={**asked, "parallel_tool_calls": False}).json()
    assert [[tool["function"]["name"] for tool in one["tools"]] for one in seen] == [["weather"], ["weather"]]
    assert len(response["tools"]) == 2
    if mode == "required":
        assert [call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]] == ["weather"]
        assert [item["name"] for item in response["output"]] == ["weather"]


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
        ({"tools": [CHAT_TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "expected"),
        ({"tools": [CHAT_TOOL], "tool_choice": allowed("auto", "x")}, "tool_choice", "'x' is not among"),
        ({"tools": [CHAT_TOOL], "tool_choice": allowed("never", "weather")}, "tool_choice", "expected"),
        ({"tools": [CHAT_TOOL], "tool_choice": "required", "response_format": STRICT}, "tool_choice", "cannot follow"),
        ({"guided_json": SCHEMA, "ignore_eos": True}, None, "ignore_eos"),
    ],
)
def test_a_form_that_cannot_be_served_is_refused_with_the_part(url: str, body: Any, param: str | None, says: str) -> None:
    answer = post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": user("Hi"), **body})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param or param is None
