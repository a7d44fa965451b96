"""What a line of the input asks: OpenAI's batch format, or a plain body whose task is given.

`{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`, or `{"prompt": "..."}`,
`{"messages": [...]}`, `{"input": "..."}`, `{"query": ..., "documents": [...]}` or `{"context": ..., "continuation": ...}` with
any other fields of such a body, and optionally a `custom_id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.parsing import parse_object

Task = Literal["chat", "complete", "embed", "classify", "rerank", "score"]
TASKS: tuple[Task, ...] = get_args(Task)

MOST_LINE_BYTES = 64 * 2**20
"""A longer line fails: it is more likely not a text file."""

_URLS: dict[str, Task] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "complete",
    "/v1/embeddings": "embed",
    "/v1/classify": "classify",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
}
_NAMED_BY: dict[str, tuple[Task, ...]] = {
    "messages": ("chat",),
    "prompt": ("complete",),
    "query": ("rerank",),
    "continuation": ("score",),
    "input": ("embed", "classify", "score"),
}
"""The field that tells the task of a plain body; the first, unless the batch is for another of them."""

_ENVELOPE = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A request of the input: `body` is that of OpenAI's API."""

    task: Task
    body: dict[str, Any]


def read_line(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises RequestError."""
    if len(raw) > MOST_LINE_BYTES:
        raise RequestError(400, f"the line is longer than {MOST_LINE_BYTES} bytes", code="request_too_large")
    return parse_object(raw)


def custom_id_of(found: Mapping[str, Any], number: int) -> str:
    """The `custom_id` of a line's object: `line-7` if line 7 has none. Raises RequestError for one that is not a text."""
    custom_id = found.get("custom_id")
    if custom_id is not None and not isinstance(custom_id, str):
        raise RequestError(400, "custom_id is not a text", param="custom_id")
    return f"line-{number}" if custom_id is None else custom_id


def read_request(found: Mapping[str, Any], task: Task | None) -> LineRequest:
    """The request in the object of a line; `task` is what plain lines ask, and what all must ask. Raises RequestError."""
    own, body = _envelope(found, task) if "url" in found or "body" in found else _plain(found, task)
    chosen = own or task
    if chosen is None:
        raise RequestError(400, "nothing tells the line's task: give it a url, or the batch a task", param="url")
    if task not in (None, chosen):
        raise RequestError(400, f"the line asks for {chosen}, the batch for {task}", param="url")
    if body.get("stream"):
        raise RequestError(400, "stream is not supported: a batch writes whole answers", param="stream")
    return LineRequest(chosen, body)


def _envelope(found: Mapping[str, Any], task: Task | None) -> tuple[Task | None, dict[str, Any]]:
    if unknown := [name for name in found if name not in _ENVELOPE]:
        raise RequestError(400, f"{unknown[0][:60]!r} is not a field of a batch line: put it in body", param=unknown[0][:60])
    if found.get("method") not in (None, "POST"):
        raise RequestError(400, f"method is {str(found['method'])[:60]!r}: only POST is possible", param="method")
    body = found.get("body")
    if not isinstance(body, dict):
        raise RequestError(400, "body is not a JSON object", param="body")
    url = found.get("url")
    if url is None:
        return _named_task(body, task), body
    if not isinstance(url, str) or url not in _URLS:
        raise RequestError(400, f"url is {str(url)[:60]!r}: possible are {', '.join(_URLS)}", param="url")
    return _URLS[url], body


def _plain(found: Mapping[str, Any], task: Task | None) -> tuple[Task | None, dict[str, Any]]:
    """A line that is a body itself; a prompt for a chat is the user's message."""
    body = {name: value for name, value in found.items() if name != "custom_id"}
    if task == "chat" and "messages" not in body and isinstance(body.get("prompt"), str):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if task in _NAMED_BY["input"] and "input" not in body and "text" in body:
        body["input"] = body.pop("text")
    return _named_task(body, task), body


def _named_task(body: Mapping[str, Any], task: Task | None) -> Task | None:
    tasks = next((tasks for name, tasks in _NAMED_BY.items() if name in body), ())
    return task if task in tasks else next(iter(tasks), None)
