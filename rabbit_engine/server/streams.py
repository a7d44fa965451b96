"""Events of a session for a client: kept alive while nothing comes, and cancelled when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rabbit_engine.errors import SessionClosedError
from rabbit_engine.sessions import Events, Piece, Reply, Session
from rabbit_engine.streaming import PassProgress

SILENCE_S = 10.0
"""A stream shows that it lives after this many seconds without a token."""

EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing came for a while; `progress` is that of the pass under way, None between two passes."""

    progress: PassProgress | None

    def facts(self) -> dict[str, object] | None:
        """The place of the pass; None between two."""
        if self.progress is None:
            return None
        found = self.progress
        body = {"layer": found.layer, "layers": found.layers, "bytes_read": found.bytes_read}
        times = {"elapsed_s": round(found.elapsed_s, 1), "remaining_s": found.remaining_s and round(found.remaining_s, 1)}
        return {**body, **times}

    def comment(self) -> str:
        """A comment of an event stream, which clients skip: a pass may take longer than a proxy's idle timeout."""
        found = self.facts()
        return ": waiting for a pass\n\n" if found is None else f": progress {json.dumps(found)}\n\n"


Heard = Silence | tuple[int, Piece | Reply]


async def follow(events: Events, session: Session, ending: asyncio.Event) -> AsyncIterator[Heard]:
    """The events of requests, and a Silence after every `SILENCE_S` without one. Raises what the session raises, and
    SessionClosedError when the server ends."""
    pending: asyncio.Task[tuple[int, Piece | Reply]] | None = None
    ended = asyncio.ensure_future(ending.wait())
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            await asyncio.wait([pending, ended], timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not pending.done():
                raise SessionClosedError("the server is shutting down")
            if not pending.done():
                yield Silence(session.progress)
                continue
            found, pending = pending.result(), None
            yield found
    except StopAsyncIteration:
        return
    finally:
        ended.cancel()
        if pending is not None and not pending.done():
            pending.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await pending
        await events.aclose()


class Streamed(StreamingResponse):
    """Chunks as they are generated. `held` is let go at the end, also if the client disconnects before the first chunk."""

    def __init__(self, chunks: AsyncIterator[str], media_type: str, held: AsyncExitStack) -> None:
        super().__init__(chunks, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


async def whole(request: Request, work: Awaitable[object], then: Callable[[object], Response] = JSONResponse) -> Response:
    """The answer, unless the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=499)
        return then(task.result())
    finally:
        for pending in (task, gone):
            pending.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
