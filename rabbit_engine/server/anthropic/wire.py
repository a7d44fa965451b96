"""Formats answers, the events of streams and errors as Anthropic does."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from rabbit_engine.server.errors import RequestError
from rabbit_engine.sessions import Reply

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_TOO_LONG = "prompt is too long: "
"""Clients know by these words that they should shorten the conversation, and read by how much."""

_NO_CACHE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


def event(body: Mapping[str, Any]) -> str:
    """A server-sent event, named by its type."""
    return f"event: {body['type']}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


PING = event({"type": "ping"})


class MessageWire:
    """The bodies and events of one answer to a prompt of so many tokens; `cut` says that it may have fewer tokens than asked."""

    def __init__(self, model: str, prompt_tokens: int, *, cut: bool) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": model}
        self._prompt_tokens, self._cut = prompt_tokens, cut

    def start(self) -> str:
        """The first event."""
        body = {**self._head, "content": [], **_stop(None, None), "usage": self._usage(0)}
        return event({"type": "message_start", "message": body})

    def end(self, reply: Reply, *, calls: int) -> str:
        """The last two events."""
        delta = {"type": "message_delta", "delta": self._stop_of(reply, calls), "usage": self._usage_of(reply)}
        return event(delta) + event({"type": "message_stop"})

    def body(self, content: Sequence[Mapping[str, Any]], reply: Reply) -> dict[str, Any]:
        """A whole answer."""
        calls = sum(block["type"] == "tool_use" for block in content)
        return {**self._head, "content": content, **self._stop_of(reply, calls), "usage": self._usage_of(reply)}

    def _usage(self, answer: int, cached: int = 0) -> dict[str, Any]:
        read = {"cache_read_input_tokens": cached}
        return {"input_tokens": self._prompt_tokens - cached, **_NO_CACHE, **read, "output_tokens": answer}

    def _usage_of(self, reply: Reply) -> dict[str, Any]:
        """Tokens that were read from the prefix store are not among the input's."""
        return self._usage(len(reply.tokens), reply.cached_tokens)

    def _stop_of(self, reply: Reply, calls: int) -> dict[str, Any]:
        if reply.finish_reason == "length":
            return _stop("model_context_window_exceeded" if self._cut else "max_tokens", None)
        if reply.stop is not None:
            return _stop("stop_sequence", reply.stop)
        return _stop("tool_use" if calls else "end_turn", None)


def _stop(reason: str | None, sequence: str | None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence}


def new_request_id() -> str:
    """An id as Anthropic's server gives to each request."""
    return f"req_{uuid.uuid4().hex[:24]}"


def error_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """An error."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told = _too_long(error) if error.code == "context_length_exceeded" else str(error)
    return {"type": "error", "error": {"type": kind, "message": told}, "request_id": request_id}


def _too_long(error: RequestError) -> str:
    if error.excess is None:
        return _TOO_LONG + str(error)
    tokens, most = error.excess
    return f"{_TOO_LONG}{tokens} tokens > {most} maximum ({error})"
