"""The application: the interfaces over a service, the server's own pages, and the gate before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from rabbit_engine import __version__
from rabbit_engine.errors import RabbitError
from rabbit_engine.server.access import Access
from rabbit_engine.server.anthropic.endpoints import AnthropicEndpoints
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.gate import Gate
from rabbit_engine.server.hosting import Host
from rabbit_engine.server.interface import Interface
from rabbit_engine.server.keys import Key
from rabbit_engine.server.ollama.endpoints import OllamaEndpoints
from rabbit_engine.server.openai.endpoints import OpenAIEndpoints
from rabbit_engine.server.openapi import Description
from rabbit_engine.server.responses.endpoints import ResponsesEndpoints
from rabbit_engine.server.service import Service
from rabbit_engine.server.status import StatusPages
from rabbit_engine.server.tasks.endpoints import TaskEndpoints
from rabbit_engine.server.timeouts import USUAL, Timeouts
from rabbit_engine.server.visits import AccessLog
from rabbit_engine.sessions import Session

_NO_PAGE = {404: "there is nothing at this path", 405: "this path does not support this method"}


def create_app(
    host: Host | Session,
    name: str = "",
    *,
    keys: Sequence[Key] = (),
    origins: Sequence[str] = (),
    local: bool = True,
    timeouts: Timeouts = USUAL,
    access_log: AccessLog | None = None,
) -> FastAPI:
    """The application for the models of `host`, or for one session under the `name` that clients call its model. With `keys`, a
    request needs one. `local` accepts only Host headers that name this machine, so that no web page reaches it under another
    name; `origins` are the pages that may use it from a browser."""
    host = Host.of(host, name) if isinstance(host, Session) else host
    service = Service(host, Access(keys, local=local and not keys), timeouts, access_log)
    for served in host.loaded:
        with suppress(RabbitError):  # without one, token ids still work, and texts get an error
            _ = served.session.model.tokenizer  # loaded now, so that the first request does not wait for it
    hidden: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="rabbit_engine", version=__version__, lifespan=_lifespan(service), **hidden)
    interfaces: tuple[Interface, ...] = (
        AnthropicEndpoints(service),
        ResponsesEndpoints(service),
        TaskEndpoints(service),
        OllamaEndpoints(service),
        OpenAIEndpoints(service),
    )  # the last one answers errors at all other paths
    respond = _Responder(interfaces)
    app.add_middleware(Gate, service=service, errors=respond)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(HTTPException, respond.to_http_error)
    app.add_exception_handler(RequestValidationError, respond.to_bad_query)
    StatusPages(service).add_to(app)
    for interface in interfaces:
        interface.add_to(app)
    description = Description(app, interfaces, has_keys=service.access.has_keys)
    app.get("/openapi.json", include_in_schema=False)(description.document)
    app.state.end_answers = service.ending.set
    return app


def _lifespan(service: Service) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """While it serves. Cancels running answers at the end; a session that the caller opened stays open."""
        service.host.start()
        yield
        service.ending.set()
        for served in service.host.loaded:
            served.lanes.stop()

    return lifespan


class _Responder:
    """Answers errors as the interface at a path does."""

    def __init__(self, interfaces: Sequence[Interface]) -> None:
        self._interfaces = interfaces

    def at(self, path: str, error: RequestError) -> Response:
        """The response to an error at a path."""
        return self._interface(path).error(error)

    def within_stream(self, path: str, error: RequestError) -> str:
        """An error in a stream that has begun, before its answer."""
        return self._interface(path).stream_error(error)

    def _interface(self, path: str) -> Interface:
        return next((one for one in self._interfaces if path.startswith(one.paths)), self._interfaces[-1])

    async def to_bad_query(self, request: Request, error: Exception) -> Response:
        """To what the framework rejects in a query."""
        return self.at(request.url.path, RequestError(400, f"cannot read the query: {error}"))

    async def to_http_error(self, request: Request, error: Exception) -> Response:
        """To a path or method that does not exist."""
        status = getattr(error, "status_code", 500)
        told = RequestError(status, _NO_PAGE.get(status, str(getattr(error, "detail", error))))
        response = self.at(request.url.path, told)
        response.headers.update(getattr(error, "headers", None) or {})  # the methods that are allowed
        return response
