"""What an interface of the server is: its routes, and the form of its errors."""

from __future__ import annotations

from typing import Protocol

from fastapi import FastAPI, Response

from rabbit_engine.server.errors import RequestError


class Interface(Protocol):
    """Endpoints that clients of one kind speak."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The beginnings of the paths at which errors have this interface's form."""

    def add_to(self, app: FastAPI) -> None:
        """Add the routes; those that read a body say so with `openapi.body_of`, for /openapi.json."""

    def error(self, error: RequestError) -> Response:
        """The response to an error."""

    def stream_error(self, error: RequestError) -> str:
        """An error before the answer, in a stream that has begun."""
