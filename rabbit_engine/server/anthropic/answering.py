"""Answers of Anthropic's API, streamed and whole."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from rabbit_engine.server import streams
from rabbit_engine.server.anthropic.asking import MessagePlan
from rabbit_engine.server.anthropic.content import ContentBlocks, content_of
from rabbit_engine.server.anthropic.schema import MessagesRequest
from rabbit_engine.server.anthropic.wire import PING, MessageWire, error_body, event
from rabbit_engine.server.errors import told_error
from rabbit_engine.server.flow import AnswerFlow
from rabbit_engine.server.service import Taken
from rabbit_engine.server.streams import Silence
from rabbit_engine.sessions import Events, Piece, Reply

Message = Taken[MessagesRequest, MessagePlan]


async def message_stream(taken: Message, events: Events, request_id: str) -> AsyncIterator[str]:
    """An answer as it is generated; an error is the last event."""
    wire, flow = _wire(taken), AnswerFlow(taken.prepared.form)
    blocks = ContentBlocks(hides_thinking=taken.asked.hides_thinking)
    yield wire.start() + PING
    shown_s = time.monotonic()
    try:
        async for heard in taken.follow(events):
            if isinstance(heard, Silence):
                text = heard.comment() + PING
            else:
                text = _news(heard[1], flow, blocks, wire)
                if not text and time.monotonic() - shown_s > streams.SILENCE_S:  # tokens come, but what they say is held back
                    text = PING
            if text:
                shown_s = time.monotonic()
                yield text
    except Exception as error:  # noqa: BLE001 - the status has been sent
        yield event(error_body(told_error(error), request_id))


def _news(told: Piece | Reply, flow: AnswerFlow, blocks: ContentBlocks, wire: MessageWire) -> str:
    """The events that a piece, or the end, completes."""
    deltas = flow.end() if isinstance(told, Reply) else flow.push(told)
    found = [one for delta in deltas for one in blocks.push(delta)]
    if isinstance(told, Piece):
        return "".join(map(event, found))
    return "".join(map(event, found + blocks.end())) + wire.end(told, calls=flow.calls)


async def message(taken: Message, events: Events) -> dict[str, Any]:
    """A whole answer."""
    reply = (await taken.replies(events, 1))[0]
    flow = AnswerFlow(taken.prepared.form)
    deltas = [*flow.push(Piece(reply.text)), *flow.end()]
    return _wire(taken).body(content_of(deltas, hides_thinking=taken.asked.hides_thinking), reply)


def _wire(taken: Message) -> MessageWire:
    return MessageWire(taken.served.name, len(taken.prepared.request.prompt.ids), cut=taken.prepared.cut)
