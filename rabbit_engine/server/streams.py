"""Events of a session for a client: kept alive while nothing comes, and cancelled when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

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
    """Nothing came for a while; `progress` is that of the pass under way, None between two passes. A request that has not
    started has a `place` in the queue, 1 for the next one."""

    progress: PassProgress | None
    place: int | None = None

    def facts(self) -> dict[str, object] | None:
        """The request's place in the queue, or the place of the pass under way; None between two."""
        if self.place is not None:
            return {"place": self.place}
        if self.progress is None:
            return None
        found = self.progress
        body = {"layer": found.layer, "layers": found.layers, "bytes_read": found.bytes_read}
        times = {"elapsed_s": round(found.elapsed_s, 1), "remaining_s": found.remaining_s and round(found.remaining_s, 1)}
        return {**body, **times}

    def comment(self) -> str:
        """A comment of an event stream, which clients skip: a pass may take longer than a proxy's idle timeout."""
        found = self.facts()
        if found is None:
            return ": waiting for a pass\n\n"
        return f": {'progress' if self.place is None else 'queued'} {json.dumps(found)}\n\n"


Then = Callable[[object], Response]
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
                yield Silence(session.progress, events.place)
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

    def __init__(self, chunks: AsyncIterator[str | bytes], media_type: str, held: AsyncExitStack) -> None:
        super().__init__(chunks, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


class Late(Streamed):
    """A whole answer that takes long: after every `SILENCE_S` without it a newline is sent, which JSON allows before a value,
    so that no client times out. An answer that fails closes the connection: its status has been sent."""

    def __init__(self, task: asyncio.Task[object], then: Then, ending: asyncio.Event, held: AsyncExitStack) -> None:
        held.push_async_callback(cancel, task)
        super().__init__(self._chunks(task, then, ending), "application/json", held)

    @staticmethod
    async def _chunks(task: asyncio.Task[object], then: Then, ending: asyncio.Event) -> AsyncIterator[bytes]:
        ended = asyncio.ensure_future(ending.wait())
        try:
            while not task.done():
                if ended.done():
                    raise SessionClosedError("the server is shutting down")
                yield b"\n"
                await asyncio.wait([task, ended], timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        yield bytes(then(task.result()).body)


async def whole(
    request: Request, work: Coroutine[Any, Any, object], ending: asyncio.Event, held: AsyncExitStack, then: Then = JSONResponse
) -> Response:
    """The answer, unless the client disconnects first; one that takes long is a Late response, to which `held` goes over."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait([task, gone], timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return then(task.result())
        if gone.done():
            await cancel(task)
            return Response(status_code=499)
        return Late(task, then, ending, held.pop_all())
    except BaseException:
        await cancel(task)
        raise
    finally:
        await cancel(gone)


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
