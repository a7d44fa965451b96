"""Anthropic's Messages API over real HTTP, to its own client: what `Session.chat` gives, in the anthropic package's own types."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import talking
import torch
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from serving import NAME, extras, get, post, serving
from smol import QUESTIONS, alone, saying, user
from waiting import wait_until

from rabbit_engine import AutoModel, Session
from rabbit_engine.server import streams
from rabbit_engine.server.body import MOST_BODY_BYTES
from rabbit_engine.server.keys import Key

TOOLS: list[Any] = [{"name": "weather", "description": "Of a city", "input_schema": {"type": "object", "properties": {}}}]
DRAWN = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5}  # fields that older versions of the package have themselves
HI: dict[str, Any] = {"model": NAME, "max_tokens": 8, "messages": user("Hi")}


@pytest.fixture(scope="module")
def asking(url: str) -> anthropic.Anthropic:
    """Anthropic's own client of the server."""
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def say(monkeypatch: Any, smollm_model: Any) -> Callable[[str], Any]:
    """Makes the model say a text: one this small calls no tool and reasons about nothing by itself."""
    return lambda text: saying(smollm_model, text, monkeypatch)


def said(found: Any) -> Any:
    """All but the id, which is another each time."""
    return found.model_dump(exclude_none=True, exclude={"id"})


def text_of(found: Any) -> str:
    return "".join(block.text for block in found.content)


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"extra_body": {"temperature": 0}}, {"temperature": 0}),
        ({"extra_body": DRAWN}, DRAWN),
        ({"stop_sequences": ["zebra", " of"]}, {"stop": ["zebra", " of"]}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"cache_control": {"type": "ephemeral"}, "metadata": {"user_id": "me"}, "service_tier": "auto"}, {}),
    ],
)
def test_answers_are_those_of_the_session(asking: anthropic.Anthropic, session: Session, asked: Any, options: Any) -> None:
    expected = session.chat(user(QUESTIONS[0]), **{"max_new_tokens": 8, **options})
    keywords = {"model": NAME, "max_tokens": 8, "messages": user(QUESTIONS[0]), **asked}
    found = asking.messages.create(**keywords)
    assert text_of(found) == expected.text
    assert (found.usage.input_tokens, found.usage.output_tokens) == (expected.prompt_tokens, len(expected.tokens))
    reason = "stop_sequence" if expected.stop else {"stop": "end_turn", "length": "max_tokens"}[expected.finish_reason]
    assert (found.stop_reason, found.stop_sequence) == (reason, expected.stop)
    with asking.messages.stream(**keywords) as stream:
        pieces = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert "".join(pieces) == expected.text
    assert said(streamed) == said(found)
    assert len([piece for piece in pieces if piece]) > 1


def test_the_conversation_is_the_one_of_the_session(asking: anthropic.Anthropic, session: Session) -> None:
    told = [
        {"role": "system", "content": "You are terse.\nAnswer in French."},
        *user("What is 2+2?"),
        {"role": "assistant", "content": "Quatre."},
        *user("And 3+3?\nAgain."),
    ]
    parts = [{"type": "text", "text": "And 3+3?", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Again."}]
    answer: Any = [{"type": "thinking", "thinking": "Easy.", "signature": "x"}, {"type": "text", "text": "Quatre."}]
    found = asking.messages.create(
        model=NAME,
        max_tokens=8,
        system=[{"type": "text", "text": "You are terse."}, {"type": "text", "text": "Answer in French."}],
        messages=[*user("What is 2+2?"), {"role": "assistant", "content": answer}, {"role": "user", "content": parts}],
    )
    assert text_of(found) == session.chat(told).text
    assert found.usage.input_tokens == session.count_tokens(told)


def test_an_answer_that_is_begun_goes_on(asking: anthropic.Anthropic, session: Session) -> None:
    begun = [*user(QUESTIONS[0]), {"role": "assistant", "content": "The capital of"}]
    found = asking.messages.create(model=NAME, max_tokens=4, messages=begun)
    assert text_of(found) == session.chat(begun, continue_final_message=True, max_new_tokens=4).text
    empty = asking.messages.create(model=NAME, max_tokens=4, messages=[*user("Hi"), {"role": "assistant", "content": ""}])
    assert text_of(empty) == session.chat("Hi", max_new_tokens=4).text


def events_of(answer: httpx.Response) -> list[Any]:
    """The bodies of a stream's events, which have the names that they say."""
    parts = [part.split("\n") for part in answer.text.split("\n\n") if part and not part.startswith(":")]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name.removeprefix("event: ") for name, _ in parts] == [body["type"] for body in bodies]
    return bodies


def test_answers_and_events_are_of_the_packages_own_types(url: str, say: Callable[[str], None]) -> None:
    wanted = 'Look. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    asked = {**HI, "max_tokens": 64, "tools": TOOLS}
    say(wanted)
    whole = Message.model_validate(post(f"{url}/v1/messages", json=asked).json(), strict=True)
    say(wanted)
    bodies = events_of(post(f"{url}/v1/messages", json={**asked, "stream": True}))
    events = [TypeAdapter(RawMessageStreamEvent).validate_python(body, strict=True) for body in bodies if body["type"] != "ping"]
    assert not [*extras(whole), *extras(events)]
    kinds = [(event.type, getattr(event, "index", None)) for event in events]
    shown = [kind for index, kind in enumerate(kinds) if kind != kinds[index - 1]]
    blocks = [(f"content_block_{part}", index) for index in (0, 1) for part in ("start", "delta", "stop")]
    assert shown == [("message_start", None), *blocks, ("message_delta", None), ("message_stop", None)]
    assert bodies[1] == {"type": "ping"}


def test_four_at_once_each_get_their_own_in_the_passes_of_one(url: str, smollm_model: Any) -> None:
    expected = [alone(smollm_model, text) for text in QUESTIONS]

    async def all_of_them() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:

            async def one(index: int) -> str:
                asked: dict[str, Any] = {"model": NAME, "max_tokens": 8, "messages": user(QUESTIONS[index])}
                if index % 2:
                    return text_of(await client.messages.create(**asked))
                async with client.messages.stream(**asked) as stream:
                    return "".join([piece async for piece in stream.text_stream])

            return await asyncio.gather(*map(one, range(4)))

    before = smollm_model.profile.passes
    assert asyncio.run(all_of_them()) == expected
    assert smollm_model.profile.passes - before < 2 * 8


# Tools and thinking.


def test_tools_are_called_and_their_results_read(
    asking: anthropic.Anthropic, say: Callable[[str], None], session: Session, monkeypatch: Any
) -> None:
    wanted = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Weather?"), "tools": TOOLS, "max_tokens": 64}
    say(wanted)
    whole = asking.messages.create(**keywords)
    assert whole.stop_reason == "tool_use"
    text, call = whole.content
    assert isinstance(text, anthropic.types.TextBlock)
    assert text.text == "I look."
    assert isinstance(call, anthropic.types.ToolUseBlock)
    assert call.id.startswith("toolu_")
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    say(wanted)
    with asking.messages.stream(**keywords) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert json.loads("".join(parts)) == call.input
    assert len([part for part in parts if part]) > 2  # as they are generated
    assert [said(block) for block in streamed.content] == [said(block) for block in whole.content]
    say(wanted)
    assert text_of(asking.messages.create(**{**keywords, "tool_choice": {"type": "none"}})) == wanted
    monkeypatch.undo()
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    history = [*user("Weather?"), {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    again = asking.messages.create(**{**keywords, "messages": history})
    function = {"name": "weather", "description": "Of a city", "parameters": TOOLS[0]["input_schema"]}
    told = [
        *user("Weather?"),
        {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "weather", "arguments": call.input}}]},
        {"role": "tool", "content": "sunny"},
    ]
    assert text_of(again) == session.chat(told, tools=[{"type": "function", "function": function}], max_new_tokens=64).text


def test_only_one_call_without_parallel_use(asking: anthropic.Anthropic, say: Callable[[str], None]) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Weather?"), "tools": TOOLS, "max_tokens": 64}
    say(call + call)
    assert [block.type for block in asking.messages.create(**keywords).content] == ["tool_use", "tool_use"]
    say(call + call)
    one = asking.messages.create(**keywords, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["tool_use"]


def test_a_call_that_is_cut_off_has_what_is_complete_of_its_input(
    asking: anthropic.Anthropic, say: Callable[[str], None], smollm_model: Any
) -> None:
    wanted = '<tool_call>{"name": "weather", "arguments": {"days": [1, 2], "city": "Par'
    most = len(smollm_model.tokenizer(wanted)["input_ids"])
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Weather?"), "tools": TOOLS, "max_tokens": most}
    say(wanted)
    whole = asking.messages.create(**keywords)
    say(wanted)
    with asking.messages.stream(**keywords) as stream:
        streamed = stream.get_final_message()
    for found in (whole, streamed):
        assert found.stop_reason == "max_tokens"
        assert isinstance(found.content[0], anthropic.types.ToolUseBlock)
        assert found.content[0].input == {"days": [1, 2]}


@pytest.fixture
def reasoning(smollm_model: Any, monkeypatch: Any) -> None:
    """A template that knows reasoning, and turns it off when told to."""
    template = smollm_model.tokenizer.chat_template
    off = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    monkeypatch.setattr(smollm_model.tokenizer, "chat_template", template + off)


@pytest.mark.usefixtures("reasoning")
def test_reasoning_is_a_block_of_thinking(asking: anthropic.Anthropic, say: Callable[[str], None]) -> None:
    wanted = "<think>\nI wonder.\n</think>\n\nYes."
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Sure?"), "max_tokens": 64}
    for display, thought in (("summarized", "I wonder."), ("omitted", "")):
        thinking: Any = {"type": "enabled", "budget_tokens": 1024, "display": display}
        say(wanted)
        whole = asking.messages.create(**keywords, thinking=thinking)
        assert [block.type for block in whole.content] == ["thinking", "text"]
        assert isinstance(whole.content[0], anthropic.types.ThinkingBlock)
        assert whole.content[0].thinking == thought
        assert whole.content[0].signature
        say(wanted)
        with asking.messages.stream(**keywords, thinking=thinking) as stream:
            told = [event.thinking for event in stream if event.type == "thinking"]
            streamed = stream.get_final_message()
        assert "".join(told) == thought
        assert [said(block) for block in streamed.content] == [said(block) for block in whole.content]


@pytest.mark.usefixtures("reasoning")
def test_thinking_is_turned_off_where_the_template_can(asking: anthropic.Anthropic) -> None:
    plain = asking.messages.count_tokens(model=NAME, messages=user("Hi")).input_tokens
    on = asking.messages.count_tokens(model=NAME, messages=user("Hi"), thinking={"type": "adaptive"}).input_tokens
    off = asking.messages.count_tokens(model=NAME, messages=user("Hi"), thinking={"type": "disabled"}).input_tokens
    assert plain == on < off


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_is_forced(asking: anthropic.Anthropic, choice: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": False}
    found = asking.messages.create(
        **{**HI, "max_tokens": 64},
        tools=[{**TOOLS[0], "input_schema": schema}],
        tool_choice={**choice, "disable_parallel_tool_use": True},
    )
    assert [said(block) for block in found.content] == [{"type": "tool_use", "name": "weather", "input": {"city": "Paris"}}]
    assert found.stop_reason == "tool_use"


def test_an_answer_has_the_form_that_is_asked_for(asking: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    found = asking.messages.create(**{**HI, "max_tokens": 64}, output_config=config)
    assert isinstance(json.loads(text_of(found))["yes"], bool)


# Prompts.


def test_tokens_are_counted(asking: anthropic.Anthropic, session: Session) -> None:
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Hi"), "system": "Be brief.", "tools": TOOLS}
    counted = asking.messages.count_tokens(**keywords).input_tokens
    assert counted == asking.messages.create(**keywords, max_tokens=1).usage.input_tokens
    long = "word " * session.most_tokens
    assert asking.messages.count_tokens(model=NAME, messages=user(long)).input_tokens > session.most_tokens


def test_a_line_that_changes_with_each_request_is_not_part_of_the_prompt(asking: anthropic.Anthropic, session: Session) -> None:
    told = [{"role": "system", "content": "You are brief.\nx-anthropic-example: stays"}, *user("Hi")]
    for changing in (
        "x-anthropic-billing-header: cc_version=2.1.100; cch=eb6c6;",
        "\nx-anthropic-other: 1",
    ):
        header: Any = [{"type": "text", "text": changing}, {"type": "text", "text": told[0]["content"]}]
        for system in (header, f"{changing}\n{told[0]['content']}"):
            found = asking.messages.count_tokens(model=NAME, messages=user("Hi"), system=system)
            assert found.input_tokens == session.count_tokens(told)


def test_more_tokens_than_fit_are_an_upper_bound(tmp_path: Path) -> None:
    with (
        AutoModel.from_pretrained(talking.save(tmp_path), device="cpu") as model,
        Session(model) as session,
        serving(session) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 10_000, "messages": user("x" * 110)}
        with client.messages.stream(**asked) as stream:
            found = stream.get_final_message()
        most = 128 - found.usage.input_tokens
        assert text_of(found) == session.chat(user("x" * 110), max_new_tokens=most).text
        assert 0 < found.usage.output_tokens <= most < 20
        assert found.stop_reason == ("model_context_window_exceeded" if found.usage.output_tokens == most else "end_turn")
        exactly = client.messages.create(**{**asked, "max_tokens": most})
        assert exactly.stop_reason == ("max_tokens" if found.usage.output_tokens == most else "end_turn")
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
            client.messages.create(**{**asked, "messages": user("x" * 130)})


def test_the_beta_endpoints_are_the_same(asking: anthropic.Anthropic, url: str) -> None:
    found = asking.beta.messages.create(**HI, betas=["interleaved-thinking-2025-05-14"], context_management={"edits": []})
    assert found.to_dict()["content"] == asking.messages.create(**HI).to_dict()["content"]
    assert asking.beta.messages.count_tokens(model=NAME, messages=user("Hi")).input_tokens == found.usage.input_tokens
    answer = post(f"{url}/v1/messages?beta=true", json=HI, headers={"anthropic-beta": "a,b", "anthropic-version": "2023-06-01"})
    assert answer.status_code == 200
    assert answer.headers["request-id"].startswith("req_")


# Errors, and clients that leave or wait.


def test_errors_are_of_the_packages_classes(asking: anthropic.Anthropic, url: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not served") as missing:
        asking.messages.create(**{**HI, "model": "claude-of-theirs"})
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: "):
        asking.messages.create(**{**HI, "max_tokens": 0})
    with pytest.raises(anthropic.RequestTooLargeError):
        asking.messages.create(**{**HI, "messages": user("x" * MOST_BODY_BYTES)})
    for answer in (get(f"{url}/v1/messages"), post(f"{url}/v1/messages/batches", json={}), post(f"{url}/v1/messages", json=[])):
        body = answer.json()
        assert body["type"] == "error"
        assert body["error"]["type"] in ("not_found_error", "invalid_request_error")
        assert body["request_id"] == answer.headers["request-id"]


def test_the_key_is_read_as_the_package_sends_it(session: Session) -> None:
    with serving(session, keys=[Key("mine", "secret")]) as url:
        for given in ({"api_key": "secret"}, {"auth_token": "secret", "api_key": None}):
            with anthropic.Anthropic(base_url=url, max_retries=0, **given) as client:
                assert client.messages.create(**HI).content
        with (
            anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError) as refused,
        ):
            client.messages.create(**HI)
    assert refused.value.type == "authentication_error"


def test_a_full_queue_is_a_rate_limit(smollm_model: Any) -> None:
    with Session(smollm_model, max_requests=1, max_queue=0) as session, serving(session) as url:
        stream = session.stream("Count to a thousand.", max_new_tokens=1000)
        next(stream)
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
            for streams_it in (True, False):
                with pytest.raises(anthropic.RateLimitError) as refused:
                    client.messages.create(**HI, stream=streams_it)
                assert int(refused.value.response.headers["retry-after"]) >= 1
        stream.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_cancels_its_answer(url: str, session: Session, streamed: bool) -> None:
    body = {**HI, "messages": user("Count to a thousand."), "max_tokens": 1000, "stream": streamed}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(30, read=1.0)) as hasty:  # noqa: PT012
        if not streamed:
            hasty.post(f"{url}/v1/messages", json=body)
        with hasty.stream("POST", f"{url}/v1/messages", json=body) as answer:
            for line in answer.iter_lines():
                if "text_delta" in line:
                    raise httpx.ReadTimeout("seen enough")
    wait_until(lambda: session.running == 0)


@pytest.fixture
def slow(smollm_model: Any, monkeypatch: Any) -> None:
    """A pass takes half a second, silence is a tenth."""
    forward = smollm_model.lm_head.forward

    def slowly(states: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return forward(states)

    monkeypatch.setattr(smollm_model.lm_head, "forward", slowly)
    monkeypatch.setattr(streams, "SILENCE_S", 0.1)


@pytest.mark.usefixtures("slow")
def test_a_silent_stream_is_pinged(url: str, asking: anthropic.Anthropic, session: Session) -> None:
    answer = post(f"{url}/v1/messages", json={**HI, "max_tokens": 2, "stream": True})
    kinds = [body["type"] for body in events_of(answer)]
    assert kinds.count("ping") > 4
    assert kinds[-1] == "message_stop"
    with asking.messages.stream(**{**HI, "max_tokens": 2}) as stream:
        assert "".join(stream.text_stream) == session.chat("Hi", max_new_tokens=2).text


def test_a_stream_whose_tokens_say_nothing_yet_is_pinged(url: str, say: Callable[[str], None], monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.0)
    monkeypatch.setattr(streams.asyncio, "wait", _patient(streams.asyncio.wait))
    say("<tool_call>" + " " * 10)
    kinds = [body["type"] for body in events_of(post(f"{url}/v1/messages", json={**HI, "tools": TOOLS, "stream": True}))]
    assert kinds.count("ping") > 4


def _patient(wait: Any) -> Any:
    """`asyncio.wait` without an end, so that no silence is heard."""
    return lambda tasks, timeout=None, **keywords: wait(tasks, **keywords)


def test_an_error_in_a_stream_is_its_last_event(asking: anthropic.Anthropic, smollm_model: Any, monkeypatch: Any) -> None:
    def broken(states: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(smollm_model.lm_head, "forward", broken)
    with asking.messages.stream(**HI) as stream, pytest.raises(anthropic.APIStatusError, match="api_error"):
        list(stream.text_stream)
    with pytest.raises(anthropic.InternalServerError) as failed:
        asking.messages.create(**HI)
    assert failed.value.type == "api_error"
