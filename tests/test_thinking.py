"""Reasoning before an answer of a form: free, and the form begins after its end, in sessions and in every API."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import talking
from guessing import Guided
from serving import NAME, post, serving
from smol import user
from vocabularies import glm4

from rabbit_engine import LLM, AutoModel, SamplingParams, Session
from rabbit_engine.sessions.thinking import Thinking, thinking_before_form, thinking_of

TALK = "{% for m in messages %}{{ m.content }}|{% endfor %}"
KNOWS = TALK + "{# </think> #}"
OPENS = TALK + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "age": {"type": "integer", "minimum": 3, "maximum": 120}},
    "required": ["size", "age"],
    "additionalProperties": False,
}
VOCABULARY = 1600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model, which says anything, with tokens for both marks."""
    end = glm4().eos_token_id
    folder = talking.save(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY, eos_token_id=end, max_position_embeddings=400)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        model.tokenizer = copy.deepcopy(glm4())
        model.tokenizer.add_tokens(["<think>", "</think>"])
        yield model


@pytest.fixture(autouse=True)
def opens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", OPENS)


@pytest.fixture(scope="module")
def session(model: Any) -> Iterator[Session]:
    with Session(model, max_new_tokens=80) as session:
        yield session


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with serving(session) as url:
        yield url


def bias(model: Any, *marks: str) -> dict[int, float]:
    """What makes a model that says anything say marks soon."""
    return {model.tokenizer.convert_tokens_to_ids(mark): 5.0 for mark in marks}


def is_valid(text: str) -> bool:
    found = json.loads(text)
    return found["size"] in ("small", "large") and 3 <= found["age"] <= 120 and len(found) == 2


DRAWN: dict[str, Any] = {"schema": SCHEMA, "temperature": 1.0, "top_k": 0, "max_new_tokens": 150}


def test_a_form_begins_after_the_reasoning(model: Any, session: Session) -> None:
    drawn = {**DRAWN, "logit_bias": bias(model, "</think>")}
    replies = session.answers([session.request("Paris?", seed=seed, **drawn) for seed in range(5)])
    done = [reply for reply in replies if reply.finish_reason == "stop"]
    assert len(done) > 2
    assert len({reply.text.partition("</think>")[0] for reply in done}) == len(done)
    for reply in done:
        rest = reply.text.partition("</think>")[2]
        assert (rest.lstrip("\n"), is_valid(reply.answer)) == (reply.answer, True)
    cut = session.chat("Paris?", **{**drawn, "logit_bias": {}, "max_new_tokens": 3, "seed": 1})
    assert (cut.finish_reason, cut.answer, bool(cut.text)) == ("length", "", True)


def test_a_prompt_that_ends_the_reasoning_lets_none_begin(model: Any, session: Session) -> None:
    drawn = {**DRAWN, "logit_bias": bias(model, "<think>", "</think>")}
    replies = [session.chat("Paris?", seed=seed, enable_thinking=False, **drawn) for seed in range(3)]
    assert all(is_valid(reply.text) and reply.text == reply.answer for reply in replies)


def test_a_template_that_only_knows_reasoning_leaves_it_to_the_model(model: Any, session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", KNOWS)
    drawn = {**DRAWN, "max_new_tokens": 250}
    thinks = session.request("Paris?", **drawn, logit_bias=bias(model, "<think>", "</think>"), seed=1)
    plain = session.request("Paris?", **drawn, logit_bias=dict.fromkeys(bias(model, "<think>"), -100), seed=1)
    continued = session.request(
        [*user("Paris?"), {"role": "assistant", "content": "So:"}],
        **drawn,
        logit_bias=bias(model, "<think>"),
        seed=1,
        continue_final_message=True,
    )
    first, second, third = session.answers([thinks, plain, continued])
    assert first.text.startswith("<think>")
    assert all(is_valid(reply.answer) for reply in (first, second, third))
    assert (second.text, third.text) == (second.answer, third.answer)


def test_all_text_may_be_thought_and_guesses_change_nothing(model: Any, session: Session) -> None:
    drawn = {**DRAWN, "logit_bias": bias(model, "</think>"), "seed": 3}
    request = session.request("Paris?", **drawn)
    assert request.constraint is not None
    reply = session.answers([request])[0]
    assert is_valid(reply.answer)
    expected = [*request.prompt.ids, *reply.tokens]
    with Session(model, speculate=Guided(expected, branches=1, vocabulary=VOCABULARY)) as guessing:
        before = model.profile.passes
        assert guessing.answers([guessing.request("Paris?", **drawn)])[0].tokens == reply.tokens
        assert model.profile.passes - before < len(reply.tokens)


def test_scripts_for_vllm_parse_the_answer(model: Any) -> None:
    with LLM(model) as llm:
        params = SamplingParams(
            structured_outputs={"json": SCHEMA}, temperature=1.0, seed=3, max_tokens=150, logit_bias=bias(model, "</think>")
        )
        assert is_valid(llm.chat(user("Paris?"), params)[0].outputs[0].text)


def test_every_api_tells_reasoning_and_answer_apart(model: Any, url: str) -> None:
    close = {str(token): value for token, value in bias(model, "</think>").items()}
    drawn: dict[str, Any] = {"model": NAME, "temperature": 1.0, "top_k": 0, "seed": 3, "logit_bias": close}
    chat = {**drawn, "messages": user("Paris?"), "max_tokens": 150}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    message = post(f"{url}/v1/chat/completions", json={**chat, "response_format": form}).json()["choices"][0]["message"]
    assert (bool(message["reasoning_content"]), is_valid(message["content"])) == (True, True)
    streamed = post(f"{url}/v1/chat/completions", json={**chat, "response_format": form, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == message["content"]
    text = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    items = post(f"{url}/v1/responses", json={**drawn, "input": "Paris?", "max_output_tokens": 150, "text": text}).json()[
        "output"
    ]
    assert [item["type"] for item in items] == ["reasoning", "message"]
    assert is_valid(items[1]["content"][0]["text"])
    told = {**chat, "chat_template_kwargs": {"enable_thinking": False}, "response_format": form}
    message = post(f"{url}/v1/chat/completions", json=told).json()["choices"][0]["message"]
    assert ("reasoning_content" in message, is_valid(message["content"])) == (False, True)


def test_marks_that_are_special_tokens_are_not_told_from_text(model: Any) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    ids = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
    assert thinking_before_form(tokenizer, ids, continues=True) == Thinking("<think>", "</think>", begun=True)
    special = SimpleNamespace(
        chat_template=OPENS, decode=tokenizer.decode, added_tokens_decoder={0: SimpleNamespace(content="</think>", special=True)}
    )
    assert thinking_of(special, ids) is not None
    assert thinking_before_form(special, ids, continues=False) is None
