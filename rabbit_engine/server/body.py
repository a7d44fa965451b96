"""Request bodies: read with limits on size and time, and refused before they cost much."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from rabbit_engine.server.errors import RequestError

MOST_BODY_BYTES = 20 * 2**20
"""Enough for some photographs."""

LARGE_BODY_BYTES = 64 * 2**10
"""Larger bodies are parsed one at a time."""

MOST_DRAINED_BYTES = 64 * 2**20
"""Up to this much of a refused body is read and discarded."""


async def read_body(request: Request, timeout_s: float) -> bytes:
    """The body, of limited size, which must arrive within `timeout_s`.

    Other content types are refused: any web page could send them without a CORS preflight.
    """
    kind = request.headers.get("content-type", "of unknown type").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"the body is {kind}: send Content-Type: application/json")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MOST_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise _too_large()
    except TimeoutError as error:
        raise RequestError(408, f"the body did not arrive within {timeout_s:g} s", code="request_timeout") from error
    return bytes(body)


class Incoming:
    """The body of one request as it arrives; `drain` discards what has not been read."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._headers, self._receive = Headers(scope=scope), receive
        self._comes = True

    async def receive(self) -> Message:
        """The next ASGI message."""
        message = await self._receive()
        self._comes = bool(message.get("more_body", False))
        return message

    async def drain(self, timeout_s: float) -> None:
        """Discard the rest, up to a limit of bytes and for `timeout_s`. A client waiting for "100 Continue" is not sent one."""
        announced = self._headers.get("content-length", "")
        left = MOST_DRAINED_BYTES
        if "expect" in self._headers or (announced.isdecimal() and int(announced[:20]) > left):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._comes and left > 0:
                    left -= len((await self.receive()).get("body", b""))


def _too_large() -> RequestError:
    return RequestError(413, f"the body is larger than {MOST_BODY_BYTES} bytes", code="request_too_large")
