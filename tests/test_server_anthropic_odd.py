"""Odd requests to Anthropic's Messages API: an error of its form, or an answer. ODD_REQUESTS is how many, SEED which."""

from __future__ import annotations

import itertools
import os
from typing import Any

import httpx
import pytest
import talking
from oddities import odd_bodies
from serving import NAME, serving

from rabbit_engine import AutoModel, Session

_TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
_CALL = {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "x"}}
_RESULT = {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [{"type": "text", "text": "no"}]}
_DOCUMENT = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}
BASES: list[dict[str, Any]] = [
    {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]},
    {
        "model": NAME,
        "max_tokens": 2,
        "stream": True,
        "system": [{"type": "text", "text": "Be.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, _DOCUMENT]}],
        "stop_sequences": ["a", "b"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low"},
        "metadata": {"user_id": "x"},
    },
    {
        "model": NAME,
        "max_tokens": 2,
        "system": "Be.",
        "tools": [_TOOL],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": "s"}, _CALL]},
            {"role": "user", "content": [_RESULT, {"type": "text", "text": "?"}]},
        ],
    },
    {
        "model": NAME,
        "max_tokens": 1,
        "tools": [_TOOL],
        "tool_choice": {"type": "any"},
        "messages": [{"role": "user", "content": "x"}],
    },
    {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": [_IMAGE]}]},
    {
        "model": NAME,
        "max_tokens": 1,
        "output_config": {"format": {"type": "json_schema", "schema": _TOOL["input_schema"]}},
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "begun"}],
    },
]
COUNT, SEED = int(os.environ.get("ODD_REQUESTS", "150")), int(os.environ.get("SEED", "1"))


def test_no_request_is_a_failure_of_the_server(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    statuses: dict[int, int] = {}
    with (
        AutoModel.from_pretrained(talking.save(tmp_path, max_position_embeddings=4096), device="cpu") as model,
        Session(model) as session,
        serving(session) as url,
        httpx.Client(timeout=60) as client,
    ):
        for number, body in enumerate(itertools.islice(odd_bodies(BASES, SEED), COUNT)):
            path = "/v1/messages/count_tokens" if number % 5 == 4 else "/v1/messages"
            answer = client.post(url + path, content=body, headers={"content-type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, body[:2000]
            if answer.status_code != 200:
                assert answer.json()["type"] == "error"
                assert answer.json()["error"]["message"]
            else:
                assert "api_error" not in answer.text, body[:2000]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert statuses[200] > COUNT // 20
    assert statuses[400] > COUNT // 4
    print(statuses)
