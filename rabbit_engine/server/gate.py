"""The outermost layer: admits and counts requests, and answers every error in the form of the interface that was asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from rabbit_engine.errors import SessionClosedError
from rabbit_engine.server.body import Incoming
from rabbit_engine.server.errors import RequestError, told_error
from rabbit_engine.server.outgoing import JSON, Outgoing
from rabbit_engine.server.service import Service
from rabbit_engine.server.visits import Visit
from rabbit_engine.utils.heap import give_free_memory_back

logger = logging.getLogger(__name__)


class ErrorForms(Protocol):
    """How errors are told at each path."""

    def at(self, path: str, error: RequestError) -> Response:
        """The response to an error."""

    def within_stream(self, path: str, error: RequestError) -> str:
        """An error in a stream that has begun, before its answer."""


class Gate:
    """Nothing that a client sends ends the server."""

    def __init__(self, app: ASGIApp, service: Service, errors: ErrorForms) -> None:
        self._app, self._service, self._errors = app, service, errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit, incoming = Visit.begin(scope), Incoming(scope, receive)
        outgoing = Outgoing(scope, visit, send)
        try:
            with self._service.access.admitting(scope) as visit.key:
                await self._until_ending(self._app(scope, incoming.receive, outgoing.send), lambda: bool(visit.status))
        except Exception as error:  # whatever a request makes fail is answered, and the server goes on
            if outgoing.has_content or (visit.status and not outgoing.early):
                logger.exception("an answer was interrupted")
            elif outgoing.early:
                await outgoing.fail(self._late_words(scope["path"], outgoing.early, error))
            else:
                answer = self._errors.at(scope["path"], _told(error))
                if answer.status_code < 500 and answer.status_code != 408:
                    await incoming.drain(self._service.timeouts.drain_s)
                await answer(scope, receive, outgoing.send)
        finally:
            self._service.end(visit, getattr(scope.get("route"), "path", "other"))
            if visit.is_large:
                asyncio.get_running_loop().run_in_executor(None, give_free_memory_back)

    def _late_words(self, path: str, media_type: str, error: Exception) -> str:
        """An error for a response that has begun without an answer."""
        found = _told(error)
        if media_type == JSON:
            return bytes(self._errors.at(path, found).body).decode()
        return self._errors.within_stream(path, found)

    async def _until_ending(self, work: Awaitable[None], answers: Callable[[], bool]) -> None:
        """Do the work. When the server ends, requests without an answer get SessionClosedError; streams end themselves."""
        task, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._service.ending.wait())
        try:
            await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
            if task.done() or answers():
                await task
            else:
                raise SessionClosedError("the server is shutting down")
        finally:
            for pending in (task, ended):
                pending.cancel()
            with suppress(asyncio.CancelledError, Exception):  # its error is on its way already, unless the server ends
                await task


def _told(error: Exception) -> RequestError:
    return RequestError(499, "the client disconnected") if isinstance(error, ClientDisconnect) else told_error(error)
