"""What Claude Code sends, recorded and shortened, gets an answer whatever the chat template takes."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pictures
import pytest
import talking
from serving import NAME, post, serving

from rabbit_engine import AutoModel, AutoModelForImageTextToText, Session

HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,thinking-token-count-2026-05-13,"
    "context-management-2025-06-27,prompt-caching-scope-2026-01-05,mid-conversation-system-2026-04-07,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access": "true",
    "Authorization": "Bearer none",
    "User-Agent": "claude-cli/2.1.197 (external, sdk-cli)",
    "X-Stainless-Timeout": "600",
}
MARK: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
TOOL = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"file_path": {"type": "string"}, "offset": {"type": "integer", "exclusiveMinimum": 0}},
        "required": ["file_path"],
        "additionalProperties": False,
    },
}
FIRST: dict[str, Any] = {
    "model": NAME,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>Today</system-reminder>"},
                {"type": "text", "text": "Read it.", **MARK},
            ],
        },
        {"role": "system", "content": "Agents: Explore."},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.73f; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", **MARK},
    ],
    "tools": [TOOL],
    "metadata": {"user_id": '{"device_id":"c3","account_uuid":"","session_id":"7c"}'},
    "max_tokens": 4,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}
LATER = [
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
            {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "/a"}},
        ],
    },
    {
        "role": "user",
        "content": [{"tool_use_id": "toolu_1", "type": "tool_result", "content": "1\tHi", "is_error": False, **MARK}],
    },
]
LATE = "{% if m['role'] == 'system' and not loop.first %}"
STRICT = LATE + "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
SILENT = LATE + "{% continue %}{% endif %}"


def template(late: str) -> str:
    """One that has `late` for each message."""
    return talking.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages %}" + late)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are answered, without what the tokenizer does not know."""
    found: list[str] = []
    within = Session.within_room

    def noting(session: Session, request: Any, most: int) -> Any:
        found.append(session.model.tokenizer.decode(request.prompt.ids).replace("<pad>", ""))
        return within(session, request, most)

    monkeypatch.setattr(Session, "within_room", noting)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The address of a server whose chat template has `late` for each message."""
    folder = talking.save(tmp_path_factory.mktemp("model"), max_position_embeddings=600)
    with AutoModel.from_pretrained(str(folder), device="cpu") as model, Session(model) as session, serving(session) as url:

        def with_template(late: str) -> str:
            model.tokenizer.chat_template = template(late)
            return url

        yield with_template


@pytest.mark.parametrize("late", [STRICT, SILENT, ""])
def test_instructions_after_a_users_message_reach_the_model(server: Callable[[str], str], prompts: list[str], late: str) -> None:
    url = server(late)
    bodies = [FIRST, {**FIRST, "messages": [*FIRST["messages"], *LATER, {"role": "system", "content": "Go on."}]}]
    for body in bodies:
        found = post(f"{url}/v1/messages?beta=true", json=copy.deepcopy(body), headers=HEADERS)
        assert found.status_code == 200, found.text
        assert '"type": "message_stop"' in found.text
    count = {name: bodies[1][name] for name in ("model", "messages", "tools")}
    assert post(f"{url}/v1/messages/count_tokens?beta=true", json=count, headers=HEADERS).json()["input_tokens"] > 50
    for prompt in prompts:
        assert "Agents:Explore." in prompt
        assert ("<system-reminder>" in prompt.replace("<system-reminder>Today", "")) == bool(late)
    assert "Goon." in prompts[1]


def test_a_prompt_that_is_too_long_says_by_how_much(server: Callable[[str], str]) -> None:
    body = {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "x" * 700}]}
    found = post(f"{server('')}/v1/messages", json=body, headers=HEADERS)
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith("prompt is too long: 708 tokens > 600 maximum (")


def test_an_image_that_a_tool_returned_is_shown_to_the_model(tmp_path: Path) -> None:
    image = base64.b64encode(pictures.as_bytes(pictures.picture(5))).decode()
    block = {"type": "image", "source": {"type": "base64", "data": image, "media_type": "image/png"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [block], **MARK}
    body = {**FIRST, "stream": False, "messages": [FIRST["messages"][0], LATER[0], {"role": "user", "content": [result]}]}
    model = AutoModelForImageTextToText.from_pretrained(pictures.save(tmp_path), device="cpu")
    with model, Session(model) as session, serving(session) as url:
        shown = post(f"{url}/v1/messages", json=body, headers=HEADERS)
        prompt = {name: body[name] for name in ("model", "messages", "system", "tools")}
        counted = post(f"{url}/v1/messages/count_tokens", json=prompt, headers=HEADERS)
        body["messages"][-1] = {"role": "user", "content": [{**result, "content": "(The image is in the next message.)"}]}
        told = post(f"{url}/v1/messages", json=body, headers=HEADERS)
    assert (shown.status_code, told.status_code) == (200, 200), shown.text + told.text
    assert counted.json() == {"input_tokens": shown.json()["usage"]["input_tokens"]}
    assert shown.json()["usage"]["input_tokens"] > told.json()["usage"]["input_tokens"]
    assert shown.json()["content"] != told.json()["content"]
