"""Answers over real HTTP, to OpenAI's own client: what `generate` gives, in the openai package's own types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from serving import NAME, extras, get, post, serving
from smol import QUESTIONS, alone, saying, user

from rabbit_engine import Lookup, Session
from rabbit_engine.server.app import create_app


def test_the_openai_client_gets_a_whole_answer(client: openai.OpenAI, smollm_model: Any) -> None:
    found = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[0]))
    assert found.choices[0].message.content == alone(smollm_model, QUESTIONS[0]) == "The capital of France is Paris."
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8
    assert [card.id for card in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def events_of(answer: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, without the last."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    "body", [{"messages": user("Hi"), "logprobs": True, "top_logprobs": 2}, {"messages": user("Hi"), "n": 2, "seed": 1}]
)
def test_chat_answers_are_of_the_openai_packages_own_types(url: str, body: Any) -> None:
    asked = {"model": NAME, "max_tokens": 4, **body}
    answer = ChatCompletion.model_validate(post(f"{url}/v1/chat/completions", json=asked).json(), strict=True)
    streamed = post(f"{url}/v1/chat/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events_of(streamed)]
    assert not [*extras(answer), *extras(chunks)]
    assert chunks[-1].usage == answer.usage


def test_a_server_that_speculates_gives_the_same_answers(url: str, smollm_model: Any) -> None:
    prompts = ["red, blue, green, " * 4, "one two three four " * 3]
    asked = {"model": NAME, "prompt": prompts, "max_tokens": 8, "n": 2, "seed": 3, "temperature": 0.3}
    expected = post(f"{url}/v1/completions", json=asked).json()["choices"]
    with Session(smollm_model, speculate=Lookup(nodes=8)) as session, serving(session) as speculating:
        before = smollm_model.profile.speculation
        events = events_of(post(f"{speculating}/v1/completions", json={**asked, "stream": True}))
        speculated = smollm_model.profile.speculation.since(before)
    assert len(expected) == 4
    for choice in expected:
        pieces = [part["text"] for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(pieces) == choice["text"]
    assert speculated.accepted > 4


def test_completions_are_of_the_openai_packages_own_types(url: str) -> None:
    asked = {"model": NAME, "max_tokens": 3, "prompt": ["One", "Two"], "logprobs": 2}
    answer = Completion.model_validate(post(f"{url}/v1/completions", json=asked).json(), strict=True)
    assert not [*extras(answer)]
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_models_and_errors_are_of_the_openai_packages_own_types(url: str) -> None:
    cards = [Model.model_validate(card, strict=True) for card in get(f"{url}/v1/models").json()["data"]]
    assert [*extras(cards)] == ["Model.max_model_len"]  # as vLLM's server says it
    refused = ErrorObject.model_validate(post(f"{url}/v1/completions", json={"model": NAME}).json()["error"], strict=True)
    assert (refused.type, refused.param, [*extras(refused)]) == ("invalid_request_error", "prompt", [])


def test_the_openai_client_gets_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[1])).choices[0]
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=user(QUESTIONS[1]), stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.message.content
    assert len([text for text in texts if text]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_four_at_once_each_get_their_own_in_the_passes_of_one(url: str, smollm_model: Any) -> None:
    expected = [alone(smollm_model, text) for text in QUESTIONS]

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(model=NAME, messages=user(text)) for text in QUESTIONS]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    before = smollm_model.profile.passes
    assert asyncio.run(all_of_them()) == expected
    assert smollm_model.profile.passes - before < 2 * 8


def test_n_seed_stop_and_logprobs(client: openai.OpenAI, smollm_model: Any) -> None:
    torch.manual_seed(5)
    expected = alone(smollm_model, QUESTIONS[1], do_sample=True, temperature=0.8)
    drawn = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[1]), n=2, seed=5, temperature=0.8)
    assert [choice.index for choice in drawn.choices] == [0, 1]
    assert drawn.choices[0].message.content == expected != drawn.choices[1].message.content
    assert drawn.usage is not None
    assert drawn.usage.completion_tokens == 16
    stopped = client.chat.completions.create(model=NAME, messages=user(QUESTIONS[0]), stop=[" of"]).choices[0]
    assert stopped.message.content == "The capital"
    assert stopped.finish_reason == "stop"
    told = client.chat.completions.create(
        model=NAME, messages=user(QUESTIONS[0]), logprobs=True, top_logprobs=2, max_tokens=3
    ).choices[0]
    assert told.logprobs is not None
    assert told.logprobs.content is not None
    assert "".join(token.token for token in told.logprobs.content) == told.message.content
    assert [len(token.top_logprobs) for token in told.logprobs.content] == [2, 2, 2]
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in told.logprobs.content)


def test_streamed_choices_have_their_index(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=user("Hi"), n=2, seed=3, temperature=1.0)
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=NAME, messages=user("Hi"), n=2, seed=3, temperature=1.0, stream=True, logprobs=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_completions_of_several_prompts(client: openai.OpenAI, smollm_model: Any) -> None:
    prompts = ["Once upon a time", "The sky is"]
    found = client.completions.create(model=NAME, prompt=prompts, max_tokens=5, logprobs=2, temperature=0)
    for prompt, choice in zip(prompts, found.choices, strict=True):
        ids = smollm_model.tokenizer(prompt, return_tensors="pt").input_ids
        tokens = smollm_model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert choice.text == smollm_model.tokenizer.decode(tokens)
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert [len(top) for top in choice.logprobs.top_logprobs or []] == [2] * 5
    ids = smollm_model.tokenizer(prompts[1])["input_ids"]
    assert client.completions.create(model=NAME, prompt=ids, max_tokens=5).choices[0].text == found.choices[1].text
    keywords: dict[str, Any] = {"model": NAME, "prompt": ["A much longer prompt than the other", "B"], "n": 2, "max_tokens": 3}
    ended = list(client.completions.create(**keywords, stream=True, stream_options={"include_usage": True}))[-1]
    assert ended.usage == client.completions.create(**keywords).usage
    pieces = client.completions.create(model=NAME, prompt=prompts[0], max_tokens=5, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == prompts[0] + found.choices[0].text


def test_the_chat_client_of_transformers_is_understood(url: str, smollm_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers chat` looks at /health, asks for the model to be loaded, and sends its generation config as JSON."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which also keeps it from this machine
    with httpx.stream("POST", f"{url}/load_model", json={"model": NAME}) as loaded:
        assert json.loads(next(loaded.iter_lines()).removeprefix("data: "))["status"] == "ready"
    from huggingface_hub import InferenceClient
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=4)
    client = InferenceClient(f"{url}/v1")  # it closes its streams when it goes
    stream = client.chat_completion(
        user(QUESTIONS[0]), stream=True, model=NAME, extra_body={"generation_config": config.to_json_string(), "model": NAME}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == alone(smollm_model, QUESTIONS[0], max_new_tokens=4)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_tool_calls_are_parsed_from_the_text(url: str, client: openai.OpenAI, monkeypatch: Any, smollm_model: Any) -> None:
    """A model this small calls nothing by itself: its template is made to, and what it writes is replaced, token by token."""
    wanted = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    sent = saying(smollm_model, wanted, monkeypatch)
    keywords: dict[str, Any] = {"model": NAME, "messages": user("Weather?"), "tools": TOOLS, "max_tokens": 64}
    whole = client.chat.completions.create(**keywords).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "I look."
    assert whole.message.tool_calls is not None
    call: Any = whole.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    sent.clear()
    chunks = list(client.chat.completions.create(**keywords, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "tool_call" not in "".join(delta.content or "" for delta in deltas)
    parts = [delta.tool_calls[0].function for delta in deltas if delta.tool_calls]
    assert [part.name for part in parts if part.name] == ["weather"]
    arguments = [part.arguments or "" for part in parts]
    assert "".join(arguments) == call.function.arguments
    assert len([part for part in arguments if part]) > 2  # as they are generated
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    monkeypatch.undo()
    history = [
        *user("Weather?"),
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert client.chat.completions.create(model=NAME, messages=history, max_tokens=1).choices


def test_the_tokenizer_is_loaded_before_the_first_request(own_checkpoint: Any, streamed: Any, smollm_model: Any) -> None:
    folder = own_checkpoint("qwen3")
    smollm_model.tokenizer.save_pretrained(folder)
    with Session(streamed(folder)) as session:
        app = create_app(session, NAME)
        for path in folder.glob("*token*"):
            path.unlink()
        assert session.model.tokenizer("Hello")["input_ids"] == smollm_model.tokenizer("Hello")["input_ids"]
    assert app.title == "rabbit_engine"
