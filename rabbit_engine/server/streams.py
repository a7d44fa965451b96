"""Events of a session for a client: kept alive while nothing comes, and cancelled when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from rabbit_engine.errors import SessionClosedError
from rabbit_engine.sessions import Events, Piece, Reply, Session
from rabbit_engine.streaming import PassProgress

SILENCE_S = 10.0
"""A stream shows that it lives after this many seconds without a token."""

EVENTS = "text/event-stream"

T = TypeVar("T")


UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that ask proxies to pass on each part at once."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing came for a while; `state` is what the request waits for, `facts` are numbers of it."""

    state: str
    facts: Mapping[str, object] | None = None

    @classmethod
    def of_pass(cls, progress: PassProgress | None, place: int | None) -> Silence:
        """Of a request at a `place` in the queue, 1 for the next one, or else in the pass under way, if it is not between two."""
        if place is not None:
            return cls("queued", {"place": place})
        if progress is None:
            return cls("waiting for a pass")
        body = {"layer": progress.layer, "layers": progress.layers, "bytes_read": progress.bytes_read}
        return cls("progress", {**body, **seconds_of(progress.elapsed_s, progress.remaining_s)})

    def comment(self) -> str:
        """A comment of an event stream, which clients skip: a pass may take longer than a proxy's idle timeout."""
        return f": {self.state}{'' if self.facts is None else f' {json.dumps(self.facts)}'}\n\n"


def seconds_of(elapsed_s: float, remaining_s: float | None) -> dict[str, float | None]:
    """Times as clients are told them."""
    return {"elapsed_s": round(elapsed_s, 1), "remaining_s": None if remaining_s is None else round(remaining_s, 1)}


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
                yield Silence.of_pass(session.progress, events.place)
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
        super().__init__(chunks, media_type=media_type, headers=UNBUFFERED)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


async def awaited(
    request: Request, work: Coroutine[Any, Any, T], ending: asyncio.Event, keep_alive: Callable[[], Awaitable[None]]
) -> T:
    """The result of the work; `keep_alive` is called after every `SILENCE_S` without it. Raises what the work raises, and cancels
    it with ClientDisconnect if the client goes, or SessionClosedError if the server ends."""
    task = asyncio.ensure_future(work)
    gone, ended = asyncio.ensure_future(_until_gone(request)), asyncio.ensure_future(ending.wait())
    try:
        while not task.done():
            await asyncio.wait([task, gone, ended], timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                break
            if gone.done():
                raise ClientDisconnect
            if ended.done():
                raise SessionClosedError("the server is shutting down")
            await keep_alive()
        return task.result()
    finally:
        for each in (task, gone, ended):
            await cancel(each)


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end. What it raises then is dropped: nobody waits for its result."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
