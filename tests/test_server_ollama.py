"""Ollama's own client against the server: answers are those of `session.chat`, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import ollama
import pytest
import torch
from serving import NAME, post
from smol import QUESTIONS, alone, saying, user
from waiting import wait_until

from rabbit_engine import Session
from rabbit_engine.server import streams
from rabbit_engine.server.ollama.wire import line

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
THINKING = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def own(url: str) -> ollama.Client:
    """Ollama's client."""
    return ollama.Client(host=url)


@pytest.fixture
def say(smollm_model: Any, monkeypatch: Any) -> Callable[[str], Any]:
    """`say(text)`: what the model writes from now on, token by token."""
    return lambda text: saying(smollm_model, text, monkeypatch)


def text_of(parts: list[Any]) -> str:
    return "".join(part.message.content for part in parts)


def test_a_chat_is_what_generate_gives_whole_and_streamed(own: ollama.Client, smollm_model: Any) -> None:
    expected = alone(smollm_model, QUESTIONS[0])
    whole = own.chat(NAME, user(QUESTIONS[0]))
    parts = list(own.chat(f"{NAME}:latest", user(QUESTIONS[0]), stream=True))
    assert (whole.message.role, whole.message.content, whole.done, whole.done_reason) == ("assistant", expected, True, "stop")
    assert text_of(parts) == expected
    assert len([part for part in parts if part.message.content]) > 3
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole, parts[-1]):
        assert (last.eval_count, last.prompt_eval_count) == (8, 37)
        assert min(last.prompt_eval_duration, last.eval_duration, last.load_duration) > 0
        assert last.total_duration > last.prompt_eval_duration + last.eval_duration
    assert datetime.now(UTC) - datetime.fromisoformat(whole.created_at) < timedelta(minutes=5)
    assert (whole.model, parts[0].model) == (NAME, f"{NAME}:latest")


def test_options_are_those_of_the_session(own: ollama.Client, session: Session) -> None:
    options = {"num_predict": 6, "temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "typical_p": 0.95, "seed": 7}
    shared = {name: value for name, value in options.items() if name != "num_predict"}
    penalties = {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "stop": ["~"], "num_ctx": 10**9}
    expected = session.chat(
        QUESTIONS[1], max_new_tokens=6, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, **shared
    )
    found = own.chat(NAME, user(QUESTIONS[1]), options={**options, **penalties})
    assert (found.message.content, found.done_reason) == (expected.text, "length")
    without = own.chat(NAME, user(QUESTIONS[1]), options={**options, **penalties, "repeat_last_n": 0})
    assert without.message.content == session.chat(QUESTIONS[1], max_new_tokens=6, **shared).text != expected.text
    stopped = own.generate(NAME, QUESTIONS[0], options={"stop": [" of"], "seed": -1})
    assert (stopped.response, stopped.done_reason) == ("The capital", "stop")


def test_a_prompt_goes_through_the_template_unless_it_is_raw(own: ollama.Client, session: Session, smollm_model: Any) -> None:
    first = own.generate(NAME, QUESTIONS[0])
    assert first.response == alone(smollm_model, QUESTIONS[0])
    streamed = list(own.generate(NAME, QUESTIONS[0], stream=True))
    assert "".join(part.response for part in streamed) == first.response
    assert streamed[-1].context == first.context
    told = own.generate(NAME, "Hi", system="You are terse.", options={"num_predict": 4})
    assert told.response == session.chat([{"role": "system", "content": "You are terse."}, *user("Hi")], max_new_tokens=4).text
    raw = own.generate(NAME, "Once upon a time", raw=True, options={"num_predict": 4})
    assert raw.response == session.generate("Once upon a time", max_new_tokens=4)[0].text
    assert raw.context is None
    assert first.context is not None
    follow = own.generate(NAME, "And of Spain?", context=first.context, options={"num_predict": 4})
    ids = [*first.context, *session.request("And of Spain?").prompt.ids]
    assert follow.response == session.generate([ids], max_new_tokens=4)[0].text
    assert follow.prompt_eval_count == len(ids)


def test_log_probabilities_are_those_of_the_session(own: ollama.Client, session: Session) -> None:
    expected = session.chat("Hi", max_new_tokens=3, logprobs=2).logprobs or ()
    for parts in (
        [own.chat(NAME, user("Hi"), logprobs=True, top_logprobs=2, options={"num_predict": 3})],
        list(own.chat(NAME, user("Hi"), logprobs=True, top_logprobs=2, options={"num_predict": 3}, stream=True)),
    ):
        found = [one for part in parts for one in part.logprobs or ()]
        assert [one.logprob for one in found] == [one.logprob for one in expected]
        assert [[top.logprob for top in one.top_logprobs or ()] for one in found] == [[p for _, p in one.top] for one in expected]
        assert "".join(one.token for one in found) == text_of(parts)


def test_four_at_once_share_passes(url: str, smollm_model: Any) -> None:
    expected = [alone(smollm_model, text) for text in QUESTIONS]

    async def ask(client: ollama.AsyncClient, text: str) -> str:
        return text_of([part async for part in await client.chat(NAME, user(text), stream=True)])

    async def all_of_them() -> list[str]:
        client = ollama.AsyncClient(host=url)
        return list(await asyncio.gather(*(ask(client, text) for text in QUESTIONS)))

    before = smollm_model.profile.passes
    assert asyncio.run(all_of_them()) == expected
    assert smollm_model.profile.passes - before < 2 * 8


def test_calls_of_tools_have_objects_as_arguments(own: ollama.Client, say: Any, smollm_model: Any) -> None:
    calls = [f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Paris", "Rome")]
    keywords: dict[str, Any] = {"tools": TOOLS, "options": {"num_predict": 80}}
    say("I look. " + "\n".join(calls))
    whole = own.chat(NAME, user("Weather?"), **keywords).message
    assert whole.content == "I look."
    found = [(call.function.name, dict(call.function.arguments)) for call in whole.tool_calls or ()]
    assert found == [("weather", {"city": "Paris"}), ("weather", {"city": "Rome"})]
    say("I look. " + "\n".join(calls))
    parts = list(own.chat(NAME, user("Weather?"), **keywords, stream=True))
    assert text_of(parts).rstrip() == "I look."
    assert [call.function for part in parts for call in part.message.tool_calls or ()] == [
        call.function for call in whole.tool_calls or ()
    ]
    assert [len(part.message.tool_calls or ()) for part in parts][-3:] == [1, 1, 0]  # each when it is whole
    say(calls[0])
    cut: dict[str, Any] = {**keywords, "options": {"num_predict": 18}}
    broken = own.chat(NAME, user("Weather?"), **cut)
    assert (broken.message.tool_calls, broken.done_reason) == (None, "length")
    say(calls[0])
    assert text_of(list(own.chat(NAME, user("Weather?"), **cut, stream=True))) == broken.message.content
    assert (broken.message.content or "").startswith('{"name": "weather", "arguments": {"city"')
    history = [*user("Weather?"), whole, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    assert own.chat(NAME, history, options={"num_predict": 1}).eval_count == 1


def test_reasoning_is_told_apart(own: ollama.Client, say: Any, smollm_model: Any, monkeypatch: Any) -> None:
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        own.chat(NAME, user("Hi"), think=True)
    own.chat(NAME, user("Hi"), think=False, options={"num_predict": 1})
    monkeypatch.setattr(smollm_model.tokenizer, "chat_template", THINKING)
    options = {"num_predict": 30}
    say("So it is.\n</think>\n\nYes.")
    whole = own.chat(NAME, user("Hi"), think="high", options=options).message
    assert (whole.thinking, whole.content) == ("So it is.", "Yes.")
    say("So it is.\n</think>\n\nYes.")
    parts = list(own.generate(NAME, "Hi", think=True, options=options, stream=True))
    assert "".join(part.thinking or "" for part in parts) == "So it is."
    assert "".join(part.response or "" for part in parts) == "Yes."
    say("Yes.")
    assert own.chat(NAME, user("Hi"), think=False, options=options).message.content == "Yes."


def test_a_format_is_followed(own: ollama.Client, session: Session) -> None:
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    }
    options = {"num_predict": 20}
    found = own.chat(NAME, user("Is it sunny?"), format=schema, options=options)
    assert set(json.loads(found.message.content or "")) == {"sunny"}
    assert found.message.content == session.chat("Is it sunny?", schema=schema, max_new_tokens=20).text
    parts = list(own.generate(NAME, "Is it sunny?", format=schema, options=options, stream=True))
    assert "".join(part.response for part in parts) == found.message.content
    begun = own.generate(NAME, "Is it sunny? Answer in JSON.", format="json", options={"num_predict": 3})
    assert begun.response.startswith("{")


def test_what_is_served_and_loaded(own: ollama.Client, url: str, session: Session, smollm_model: Any) -> None:
    (card,) = own.list().models
    (running,) = own.ps().models
    shown = own.show(NAME)
    assert (card.model, running.name) == (f"{NAME}:latest",) * 2
    assert card.details is not None
    assert (card.details.family, card.details.parameter_size, card.details.format) == ("llama", "134.5M", "gguf")
    assert card.details.quantization_level == "F32"
    assert 0 <= smollm_model.plan.weights_bytes - card.size < 10**6  # units end at pages
    assert (running.context_length, running.size_vram) == (session.most_tokens, 0)
    assert running.expires_at is not None
    assert running.expires_at.year > 2300
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == session.most_tokens
    assert shown.modelinfo["general.parameter_count"] == smollm_model.num_parameters()
    assert shown.template == smollm_model.tokenizer.chat_template
    assert f"num_ctx                        {session.most_tokens}" in (shown.parameters or "")
    assert own.show(f"{NAME}:latest") == shown
    assert [httpx.head(f"{url}{path}").status_code for path in ("/", "/api/version", "/api/tags")] == [200] * 3
    assert tuple(map(int, httpx.get(f"{url}/api/version").json()["version"].split("."))) > (0, 6, 4)


def test_errors_are_the_clients_own(own: ollama.Client) -> None:
    for status, call in (
        (404, lambda: own.chat("other", user("Hi"))),
        (404, lambda: own.show("other")),
        (404, lambda: list(own.generate("other", "Hi", stream=True))),
        (400, lambda: own.chat(NAME, user("Hi"), options={"temperature": -1})),
        (400, lambda: own.embed(NAME, "Hi")),
        (400, lambda: own.generate(NAME, "Hi", images=[b"a"])),
        (400, lambda: own.chat(NAME, user("Hi"), format={"type": "no type"})),
        (400, lambda: own.generate(NAME, "Hi", suffix="b")),
        (501, lambda: own.pull(NAME)),
        (501, lambda: own.delete(NAME)),
        (501, lambda: own.copy(NAME, "b")),
    ):
        with pytest.raises(ollama.ResponseError) as caught:
            call()
        assert caught.value.status_code == status
        assert not caught.value.error.startswith("{")


def test_a_silent_stream_shows_that_it_lives(own: ollama.Client, url: str, smollm_model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "SILENCE_S", 0.005)
    parts = list(own.chat(NAME, user(QUESTIONS[0]), stream=True))
    assert text_of(parts) == alone(smollm_model, QUESTIONS[0])
    empty = [part for part in parts if not part.message.content and not part.done]
    assert len(empty) > 3
    answer = post(f"{url}/api/generate", json={"model": NAME, "prompt": "Hi"})
    lines = [json.loads(one) for one in answer.text.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [one for one in lines if one.get("x_progress", {}).get("layers") == 30]


def test_a_client_that_leaves_a_stream_frees_its_place(own: ollama.Client, session: Session) -> None:
    stream = own.chat(NAME, user("Count to a thousand."), stream=True, options={"num_predict": 1000})
    assert next(iter(stream)).message.content
    assert session.running == 1
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: session.running == 0)


def test_a_failure_within_a_stream_is_its_last_line(own: ollama.Client, smollm_model: Any, monkeypatch: Any) -> None:
    forward, count = smollm_model.lm_head.forward, iter(range(100))

    def fail(states: torch.Tensor) -> torch.Tensor:
        if next(count) == 2:
            raise RuntimeError("broken")
        return forward(states)

    monkeypatch.setattr(smollm_model.lm_head, "forward", fail)
    stream = iter(own.chat(NAME, user(QUESTIONS[0]), stream=True))
    assert next(stream).message.content == "The"
    with pytest.raises(ollama.ResponseError, match="RuntimeError: broken"):
        list(stream)


def test_a_line_is_one_line_for_every_client() -> None:
    """httpx, which Ollama's client reads with, splits at all separators of Unicode."""
    body = {"response": "a\u2028b\u0085c\nd"}
    assert [json.loads(one) for one in line(body).splitlines()] == [body]
