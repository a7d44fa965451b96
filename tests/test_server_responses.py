"""OpenAI's Responses API over real HTTP, to the openai package's client: whole and streamed answers, calls and reasoning."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import torch
from openai.types.responses import Response
from serving import NAME, extras, get, post, serving
from smol import QUESTIONS, alone, saying

from rabbit_engine import Session
from rabbit_engine.server.responses.items import read_items

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def without_ids(found: Any) -> Any:
    """A response without what differs from one answer to the next."""
    if isinstance(found, list):
        return [without_ids(each) for each in found]
    if not isinstance(found, dict):
        return found
    left_out = ("id", "call_id", "created_at", "completed_at", "parsed", "parsed_arguments")
    return {key: without_ids(value) for key, value in found.items() if key not in left_out}


def test_the_openai_client_gets_a_whole_response(client: openai.OpenAI, smollm_model: Any) -> None:
    found = client.responses.create(model=NAME, input=QUESTIONS[0], metadata={"a": "b"})
    assert found.output_text == alone(smollm_model, QUESTIONS[0]) == "The capital of France is Paris."
    assert (found.status, found.incomplete_details, found.metadata) == ("completed", None, {"a": "b"})
    assert found.usage is not None
    assert (found.usage.output_tokens, found.usage.total_tokens) == (8, found.usage.input_tokens + 8)
    assert client.responses.input_tokens.count(model=NAME, input=QUESTIONS[0]).input_tokens == found.usage.input_tokens
    cut = client.responses.create(model=NAME, input=QUESTIONS[1], max_output_tokens=3)
    assert cut.incomplete_details is not None
    assert (cut.status, cut.incomplete_details.reason, cut.output[0].status) == ("incomplete", "max_output_tokens", "incomplete")


def test_instructions_and_items_are_the_conversation_of_a_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Name a colour."},
    ]
    chat = client.chat.completions.create(model=NAME, messages=messages, seed=4)
    items: list[Any] = [
        messages[1],
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello!", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]},
    ]
    found = client.responses.create(model=NAME, instructions="Be brief.", input=items, extra_body={"seed": 4})
    assert found.output_text == chat.choices[0].message.content
    again = client.responses.create(model=NAME, input=[messages[0], *items], extra_body={"seed": 4})
    assert again.output_text == found.output_text
    client.responses.create(model=NAME, input=[*items, *found.output, {"role": "user", "content": "Why?"}], max_output_tokens=1)


def test_a_stream_has_its_events_in_order(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=NAME, input=QUESTIONS[0])
    events = list(client.responses.create(model=NAME, input=QUESTIONS[0], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(deltas),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert len(deltas) > 3
    assert "".join(deltas) == whole.output_text
    last: Any = events[-1]
    assert without_ids(last.response.to_dict()) == without_ids(whole.to_dict())
    assert {*extras(events)} == {"Response.store"}  # the package's type lacks it
    with client.responses.stream(model=NAME, input=QUESTIONS[0]) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_log_probabilities_are_those_of_a_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2)
    found: Any = client.responses.create(**asked)
    assert chat.choices[0].logprobs is not None
    expected = [token.model_dump() for token in chat.choices[0].logprobs.content or []]
    assert [token.model_dump() for token in found.output[0].content[0].logprobs] == expected
    streamed = [e for e in client.responses.create(**asked, stream=True) if e.type == "response.output_text.delta"]
    assert [each.token for event in streamed for each in event.logprobs] == [each["token"] for each in expected]
    Response.model_validate(post_response(client, asked), strict=True)


def post_response(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    return post(f"{client.base_url}responses", json=asked).json()


def test_calls_are_items_and_their_outputs_go_back(client: openai.OpenAI, monkeypatch: Any, smollm_model: Any) -> None:
    """A model this small calls nothing by itself: what it writes is replaced, token by token."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    sent = saying(smollm_model, f"I look. {call}\n{call}", monkeypatch)
    asked: dict[str, Any] = {"model": NAME, "input": "Weather?", "tools": [WEATHER], "max_output_tokens": 96}
    whole = client.responses.create(**asked)
    assert whole.output_text == "I look."
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    made: Any = whole.output[1]
    assert (made.name, json.loads(made.arguments), made.status) == ("weather", {"city": "Paris"}, "completed")
    sent.clear()
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert without_ids(final.to_dict())["output"] == without_ids(whole.to_dict())["output"]
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == 2 * made.arguments
    assert len(arguments) > 6  # as they are generated
    ended = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.output_index, event.arguments) for event in ended] == [(1, made.arguments), (2, made.arguments)]
    sent.clear()
    assert len(client.responses.create(**asked, parallel_tool_calls=False).output) == 2
    sent.clear()
    assert [item.type for item in client.responses.create(**asked, tool_choice="none").output] == ["message"]
    monkeypatch.undo()
    output = {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}
    history = [{"role": "user", "content": "Weather?"}, *whole.output, output]
    assert client.responses.create(model=NAME, input=history, tools=[WEATHER], max_output_tokens=1).output


def test_reasoning_is_an_item_of_its_own(smollm_model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(smollm_model.tokenizer, "chat_template", smollm_model.tokenizer.chat_template + "{# </think> #}")
    thought = "<think>\nIt is Paris.\n</think>"
    sent = saying(smollm_model, f"{thought}\n\nParis.", monkeypatch)
    with Session(smollm_model) as session, serving(session) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found: Any = client.responses.create(model=NAME, input="Capital?", max_output_tokens=64)
        sent.clear()
        events = list(client.responses.create(model=NAME, input="Capital?", max_output_tokens=64, stream=True))
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert (found.output[0].content[0].text, found.output_text) == ("It is Paris.", "Paris.")
    spoken = len(smollm_model.tokenizer("\n\nParis.")["input_ids"]) + 1
    assert found.usage.output_tokens_details.reasoning_tokens == found.usage.output_tokens - spoken
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "It is Paris."
    last: Any = events[-1]
    assert without_ids(last.response.to_dict()) == without_ids(found.to_dict())


def test_items_of_one_turn_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [
        {"role": "developer", "content": "Brief."},
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "x", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "I call."},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    found = read_items(items, "Polite.")
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    assert found[0]["content"] == "Polite.\n\nBrief."
    assert (found[2]["reasoning_content"], found[2]["content"], len(found[2]["tool_calls"])) == ("hm", "I call.", 2)
    assert (found[3]["name"], found[3]["content"]) == ("f", "b")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "c"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "nothing is stored"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "needs a name"),
        ({"truncation": "auto"}, "truncation", "--overflow truncate"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "template does not read it"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "in words"),
        ({"max_tokens": 5}, "max_tokens", "it is a field of"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"input": []}, "input", "no message"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "nothing is stored"),
        ({"input": [{"type": "computer_call"}]}, "input.0", "'computer_call' are not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content", "only text"),
        ({"input": [{"role": "usr", "content": "x"}]}, "input.0.role", "'usr' is not a role"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input.0.arguments", "JSON"),
        ({"input": [5]}, "input.0", "an item is an object"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_place(url: str, body: Any, param: str | None, says: str) -> None:
    answer = post(f"{url}/v1/responses", json={"model": NAME, "input": "Hi", **body})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_nothing_is_stored(url: str) -> None:
    assert "not stored" in get(f"{url}/v1/responses/resp_1").json()["error"]["message"]
    assert post(f"{url}/v1/responses", json={"model": NAME, "input": "Hi", "max_output_tokens": 1}).json()["store"] is False


def test_a_stream_that_fails_ends_with_that(url: str, smollm_model: Any, monkeypatch: Any) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")

    monkeypatch.setattr(smollm_model.lm_head, "forward", fail)
    body = {"model": NAME, "input": "Hi", "stream": True}
    lines = post(f"{url}/v1/responses", json=body).text.strip().splitlines()
    last = json.loads(lines[-1].removeprefix("data: "))
    assert (last["type"], last["response"]["status"], last["response"]["error"]["code"]) == (
        "response.failed",
        "failed",
        "server_error",
    )
