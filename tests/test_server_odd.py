"""Odd requests by fixed seeds: each endpoint answers or refuses them, and never fails. RABBIT_ODD=2000 sends more."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import talking
from fastapi.testclient import TestClient

from rabbit_engine import AutoModel, Session
from rabbit_engine.server.app import create_app
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from rabbit_engine.server.responses.schema import ResponseRequest
from rabbit_engine.server.tasks.schema import ClassifyRequest, RerankRequest, ScoreRequest
from rabbit_engine.server.tasks.tokens import DetokenizeRequest, TokenizeRequest

COUNT = int(os.environ.get("RABBIT_ODD", "60"))
TALK = [{"role": "user", "content": "abc"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ENDPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": TALK, "max_tokens": 2, "tools": [TOOL]}),
    "/v1/completions": (CompletionRequest, {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 1}),
    "/v1/embeddings": (EmbeddingRequest, {"input": ["abc"]}),
    "/v1/responses": (ResponseRequest, {"input": TALK, "max_output_tokens": 2, "text": {"format": {"type": "text"}}}),
    "/v1/rerank": (RerankRequest, {"query": "a", "documents": ["b", {"text": "c"}]}),
    "/v1/score": (ScoreRequest, {"text_1": "a", "text_2": ["b"], "input": ["abc", ["a", "b"]]}),
    "/tokenize": (TokenizeRequest, {"prompt": "abc"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5, 6]}),
    "/v1/classify": (ClassifyRequest, {"input": ["abc"]}),
}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 1e308, 0.5, "", "a", "\x00", "é" * 50, "required", "json_object"),
    *([], [[]], [None], [0], ["a"], ["a", 1], [2**40], {}, {"type": "text"}, {"type": "json_schema"}, {"a": {"b": [1]}}),
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
    {"type": "function", "function": {"name": "f"}},
    {"type": "function", "name": []},
    [{"role": "user", "content": [{"type": "input_text", "text": 5}]}],
    [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "[1]"}],
    [{"type": "function_call_output", "call_id": "1", "output": {}}],
    [{"type": "reasoning", "content": [5, {"text": 5}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = talking.save(tmp_path_factory.mktemp("talking"))
    with (
        AutoModel.from_pretrained(folder, device="cpu") as model,
        Session(model, max_new_tokens=2) as session,
        TestClient(create_app(session, "mine"), base_url="http://localhost", raise_server_exceptions=False) as client,
    ):
        yield client


def changed(value: Any, chance: random.Random) -> Any:
    """The value, with some part of it replaced."""
    if isinstance(value, dict) and value and chance.random() < 0.6:
        name = chance.choice(list(value))
        return {**value, name: changed(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.6:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + 1 :]]
    return chance.choice(ODD)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_odd_requests_are_answered_or_refused(client: TestClient, path: str) -> None:
    kind, good = ENDPOINTS[path]
    chance = random.Random(7)
    for _ in range(COUNT):
        body = {"model": "mine", **good}
        for name in chance.sample([*kind.model_fields], chance.choice((1, 1, 2))):
            body[name] = changed(body.get(name), chance)
        body["model"] = "mine"
        answer = client.post(path, json=body)
        assert answer.status_code in (200, 400), (body, answer.text)
        assert '"server_error"' not in answer.text, (body, answer.text)
