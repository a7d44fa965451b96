"""Streams of chats and completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from rabbit_engine.server.errors import told_error
from rabbit_engine.server.flow import AnswerFlow
from rabbit_engine.server.openai import wire as words
from rabbit_engine.server.openai.bodies import Bodies, PromptWork, without_answer
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest
from rabbit_engine.server.openai.wire import Wire
from rabbit_engine.server.service import Taken
from rabbit_engine.server.streams import Silence
from rabbit_engine.sessions import Events, Reply, Request

Chat = Taken[ChatRequest, tuple[Bodies, list[Request]]]
Completion = Taken[CompletionRequest, tuple[Bodies, list[Request], PromptWork | None]]


async def chat_stream(taken: Chat, events: Events) -> AsyncIterator[str]:
    """A chat answer as it is generated; an error is the last event."""
    asked, (bodies, requests) = taken.asked, taken.prepared
    wire = Wire("chat.completion", taken.served.name, taken.served.session.model.tokenizer)
    flows = [AnswerFlow(bodies.form(asked, request)) for request in requests]
    for index in range(len(requests)):
        yield words.chat_delta(wire, index, {"role": "assistant", "content": ""})
    replies: list[Reply] = []
    try:
        async for heard in taken.follow(events):
            if isinstance(heard, Silence):
                yield heard.comment()
                continue
            index, event = heard
            flow = flows[index]
            for delta in flow.end() if isinstance(event, Reply) else flow.push(event):
                yield words.chat_event(wire, index, delta)
            if isinstance(event, Reply):
                replies.append(event)
                yield words.chat_delta(wire, index, {}, ended="tool_calls" if flow.calls else words.reason(event))
    except Exception as error:  # noqa: BLE001 - the status has been sent
        yield words.event(told_error(error).body())
    else:
        if asked.wants_usage:
            yield wire.chunk(counts=words.usage(replies))
    yield words.LAST_CHUNK


async def text_whole(taken: Completion, events: Events | None) -> dict[str, object]:
    """A whole completion, without `events` of the prompts alone; these are scored while their answers are generated."""
    asked, (bodies, requests, work) = taken.asked, taken.prepared
    scoring = None if work is None else asyncio.ensure_future(work.awaited())
    try:
        if events is None:
            replies = [without_answer(request) for request in requests]
        else:
            replies = await taken.replies(events, len(requests))
        return bodies.text(asked, requests, replies, () if scoring is None else await scoring)
    finally:
        if scoring is not None:
            scoring.cancel()


async def text_stream(taken: Completion, events: Events) -> AsyncIterator[str]:
    """A completion as it is generated; an error is the last event."""
    asked, (bodies, requests, _) = taken.asked, taken.prepared
    wire = Wire("text_completion", taken.served.name, taken.served.session.model.tokenizer)
    replies: dict[int, Reply] = {}
    lengths = dict.fromkeys(range(len(requests)), 0)
    for index, request in enumerate(requests):
        if echo := bodies.echo(asked, request):
            yield wire.chunk({"index": index, "text": echo, "logprobs": None, "finish_reason": None})
    try:
        async for heard in taken.follow(events):
            if isinstance(heard, Silence):
                yield heard.comment()
                continue
            index, event = heard
            if isinstance(event, Reply):
                replies[index] = event
                yield wire.chunk({"index": index, "text": "", "logprobs": None, "finish_reason": words.reason(event)})
            elif event.text or event.logprob is not None:
                logprobs = None if event.logprob is None else wire.legacy_logprobs([event.logprob], lengths[index])
                lengths[index] += len(event.text)
                yield wire.chunk({"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": None})
    except Exception as error:  # noqa: BLE001 - the status has been sent
        yield words.event(told_error(error).body())
    else:
        if asked.wants_usage:
            yield wire.chunk(counts=words.usage_of_prompts([reply for _, reply in sorted(replies.items())], asked.choices))
    yield words.LAST_CHUNK
