"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}` with an HTTP status that clients know."""

from __future__ import annotations

import logging
import math
import re

from rabbit_engine.errors import (
    CannotGenerateError,
    ConfigurationError,
    MissingExtraError,
    ModelClosedError,
    PromptTooLongError,
    QueueFullError,
    RabbitError,
    SessionClosedError,
    WrongHeadError,
)
from rabbit_engine.sessions.options import NAMES

logger = logging.getLogger(__name__)

_NAMED = {*NAMES, "dimensions"}
"""Options of a session that a request sets by the same name."""


_PLACE = re.compile(r"messages(?:\.[\w.]+)?")


class RequestError(Exception):
    """A request that gets an error as its answer. `excess` are the tokens of a prompt that is too long, and how many fit."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        excess: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.excess = excess
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's name for errors with this status."""
        known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, object]:
        """The JSON body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers that go with the body."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(math.ceil(self.retry_after_s))}
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def as_request_error(error: BaseException) -> RequestError:
    """The error for a client: the message of our own errors, only the type of others."""
    match error:
        case RequestError():
            return error
        case QueueFullError():
            return RequestError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
        case PromptTooLongError():
            excess = None if error.tokens is None or error.most is None else (error.tokens, error.most)
            return RequestError(400, str(error), code="context_length_exceeded", excess=excess)
        case ConfigurationError():
            return RequestError(400, str(error), param=_named(str(error)))
        case MissingExtraError():
            return RequestError(501, str(error))
        case CannotGenerateError() | WrongHeadError():
            return RequestError(400, str(error))
        case ModelClosedError():
            return RequestError(503, str(error), code="model_closed", retry_after_s=10)
        case SessionClosedError():
            return RequestError(503, "the server is shutting down", code="shutting_down", retry_after_s=10)
        case RabbitError():
            return RequestError(500, str(error))
        case _:
            return RequestError(500, f"the server failed ({type(error).__name__}); see its log")


def told_error(error: BaseException) -> RequestError:
    """As `as_request_error`; the log gets what the server is to blame for."""
    found = as_request_error(error)
    if found.status >= 500 and found.status != 503:  # a server or model that was closed is not a failure
        logger.error("a request failed: %s", error, exc_info=error)
    return found


def _named(message: str) -> str | None:
    """The field that an error is about, as in "top_p=2 is out of range" and "messages.0.content: ..."."""
    place, is_place, _ = message.partition(":")
    if is_place and _PLACE.fullmatch(place):
        return place
    named = message.replace("=", " ").split(" ", 1)[0]
    return named if named in _NAMED else None
