"""The outermost layer: admits and counts requests, and answers every error in the form of the interface that was asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rabbit_engine.errors import SessionClosedError
from rabbit_engine.server.body import Incoming
from rabbit_engine.server.errors import RequestError, as_request_error
from rabbit_engine.server.service import Service
from rabbit_engine.server.visits import Visit
from rabbit_engine.utils.heap import give_free_memory_back

logger = logging.getLogger(__name__)

Respond = Callable[[str, RequestError], Response]
"""The response to an error at a path."""


class Gate:
    """Nothing that a client sends ends the server."""

    def __init__(self, app: ASGIApp, service: Service, respond: Respond) -> None:
        self._app, self._service, self._respond = app, service, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit, incoming = Visit.begin(scope), Incoming(scope, receive)

        async def sending(message: Message) -> None:
            visit.status = visit.status or message.get("status", 0)
            await send(message)

        try:
            with self._service.access.admitting(scope) as visit.key:
                await self._until_ending(self._app(scope, incoming.receive, sending), lambda: bool(visit.status))
        except Exception as error:
            if visit.status:
                logger.exception("an answer was interrupted")
            else:
                answer = self._answer(scope["path"], error)
                if answer.status_code < 500 and answer.status_code != 408:
                    await incoming.drain(self._service.timeouts.drain_s)
                await answer(scope, receive, sending)
        finally:
            self._service.end(visit, getattr(scope.get("route"), "path", "other"))
            if visit.is_large:
                asyncio.get_running_loop().run_in_executor(None, give_free_memory_back)

    def _answer(self, path: str, error: Exception) -> Response:
        found = RequestError(499, "the client disconnected") if isinstance(error, ClientDisconnect) else as_request_error(error)
        if found.status >= 500 and found.status != 503:  # a server or model that was closed is not a failure
            logger.error("a request failed: %s", error, exc_info=error)
        return self._respond(path, found)

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
            with suppress(asyncio.CancelledError, Exception):
                await task
