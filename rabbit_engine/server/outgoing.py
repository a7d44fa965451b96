"""The response of one request as it is sent: it begins before its answer is known if that takes long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Response
from starlette.types import Message, Scope, Send

from rabbit_engine.server.streams import EVENTS, UNBUFFERED, Silence
from rabbit_engine.server.visits import Visit

JSON = "application/json"
_SCOPE = "rabbit_engine.outgoing"


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """How a response of a media type shows that it lives."""

    media_type: str
    spell: Callable[[Silence], str]


IN_EVENTS = KeepAlive(EVENTS, Silence.comment)
IN_JSON = KeepAlive(JSON, lambda _: "\n")
"""JSON allows newlines before a value."""


class Outgoing:
    """Passes on the messages of the application. Once `keep_alive` has begun a response, its status is 200."""

    def __init__(self, scope: Scope, visit: Visit, send: Send) -> None:
        self._visit, self._send = visit, send
        self._early: str | None = None
        self.has_content = False
        """Whether more than signs of life was sent."""
        scope[_SCOPE] = self

    @staticmethod
    def of(scope: Scope) -> Outgoing:
        """That of a request under way."""
        found: Outgoing = scope[_SCOPE]
        return found

    @property
    def early(self) -> str | None:
        """The media type of a response that began before its answer was known."""
        return self._early

    async def send(self, message: Message) -> None:
        """A message of the application."""
        if message["type"] == "http.response.start":
            if self._early is not None:
                return
            self._visit.status = message["status"]
        self.has_content = self.has_content or bool(message.get("body"))
        await self._send(message)

    async def keep_alive(self, how: KeepAlive, silence: Silence) -> None:
        """Show that the answer is on its way."""
        if self._early is None:
            self._early, self._visit.status = how.media_type, 200
            start = Response(media_type=how.media_type, headers=UNBUFFERED).raw_headers
            headers = [(name, value) for name, value in start if name != b"content-length"]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._part(how.spell(silence), more=True)

    async def fail(self, text: str) -> None:
        """End a response that began early with the text of an error. One that should be a whole answer stays unfinished, and
        the connection is closed: no client takes the error for an answer."""
        await self._part(text, more=self._early == JSON)

    async def _part(self, text: str, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})
