"""Streams of chats and completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from rabbit_engine.server import streams
from rabbit_engine.server.errors import told_error
from rabbit_engine.server.flow import AnswerFlow
from rabbit_engine.server.openai import wire as words
from rabbit_engine.server.openai.bodies import Bodies, PromptWork, without_answer
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest
from rabbit_engine.server.openai.wire import Wire
from rabbit_engine.server.service import Taken
from rabbit_engine.server.streams import Heard, Silence
from rabbit_engine.sessions import Events, Piece, Reply, Request, Session
from rabbit_engine.tasks.scoring import Score

Chat = Taken[ChatRequest, tuple[Bodies, list[Request]]]
Completion = Taken[CompletionRequest, tuple[Bodies, list[Request], PromptWork | None]]


async def chat_stream(taken: Chat, events: Events) -> AsyncIterator[str]:
    """A chat answer as it is generated; an error is the last event."""
    asked, (bodies, requests) = taken.asked, taken.prepared
    wire = Wire("chat.completion", taken.served.name, taken.served.session.model.tokenizer)
    flows = [AnswerFlow(bodies.form(asked, request)) for request in requests]

    async def begun() -> AsyncGenerator[str, None]:
        for index in range(len(requests)):
            yield words.chat_delta(wire, index, {"role": "assistant", "content": ""})

    def told(index: int, event: Piece | Reply) -> Iterable[str]:
        flow = flows[index]
        for delta in flow.end() if isinstance(event, Reply) else flow.push(event):
            yield words.chat_event(wire, index, delta)
        if isinstance(event, Reply):
            yield words.chat_delta(wire, index, {}, ended="tool_calls" if flow.calls else words.reason(event))

    def counted(replies: Sequence[Reply]) -> str:
        return wire.chunk(counts=words.usage(replies)) if asked.wants_usage else ""

    async with aclosing(_stream(begun(), taken.follow(events), told, counted)) as chunks:
        async for chunk in chunks:
            yield chunk


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


async def text_stream(taken: Completion, events: Events | None) -> AsyncIterator[str]:
    """A completion as it is generated, without `events` only its echo; an error is the last event."""
    asked, (_, requests, _) = taken.asked, taken.prepared
    wire = Wire("text_completion", taken.served.name, taken.served.session.model.tokenizer)
    lengths = dict.fromkeys(range(len(requests)), 0)

    def told(index: int, event: Piece | Reply) -> Iterable[str]:
        if isinstance(event, Reply):
            yield wire.chunk({"index": index, "text": "", "logprobs": None, "finish_reason": words.reason(event)})
        elif event.text or event.logprob is not None:
            logprobs = None if event.logprob is None else wire.legacy_logprobs([event.logprob], lengths[index])
            lengths[index] += len(event.text)
            yield wire.chunk({"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": None})

    def counted(replies: Sequence[Reply]) -> str:
        return wire.chunk(counts=words.usage_of_prompts(replies, asked.choices)) if asked.wants_usage else ""

    heard = _without_answers(requests) if events is None else taken.follow(events)
    async with aclosing(_stream(_echoes(taken, wire, lengths), heard, told, counted)) as chunks:
        async for chunk in chunks:
            yield chunk


async def _stream(
    begun: AsyncGenerator[str, None],
    heard: AsyncGenerator[Heard, None],
    told: Callable[[int, Piece | Reply], Iterable[str]],
    counted: Callable[[Sequence[Reply]], str],
) -> AsyncGenerator[str, None]:
    """The chunks of `begun`, what is `told` of each event, comments in silences, and the counts; an error is the last event."""
    replies: dict[int, Reply] = {}
    try:
        async with aclosing(begun), aclosing(heard):
            async for chunk in begun:
                yield chunk
            async for one in heard:
                if isinstance(one, Silence):
                    yield one.comment()
                    continue
                index, event = one
                for chunk in told(index, event):
                    yield chunk
                if isinstance(event, Reply):
                    replies[index] = event
    except Exception as error:  # noqa: BLE001 - the status has been sent
        yield words.event(told_error(error).body())
    else:
        if counts := counted([reply for _, reply in sorted(replies.items())]):
            yield counts
    yield words.LAST_CHUNK


async def _echoes(taken: Completion, wire: Wire, lengths: dict[int, int]) -> AsyncGenerator[str, None]:
    """The chunks of the prompts that begin the answers, when they are scored; their lengths go to `lengths`."""
    asked, (bodies, requests, work) = taken.asked, taken.prepared
    scores: Sequence[Score] = ()
    if work is not None:
        scoring = asyncio.ensure_future(work.awaited())
        async with aclosing(_comments(scoring, taken.served.session)) as comments:
            async for comment in comments:
                yield comment
        scores = scoring.result()
    for index, (text, logprobs) in enumerate(bodies.echoes(wire, asked, requests, scores)):
        lengths[index] = 0 if logprobs is None else sum(map(len, logprobs["tokens"]))
        if text:
            yield wire.chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": None})


async def _comments(task: asyncio.Future[Any], session: Session) -> AsyncGenerator[str, None]:
    """Comments in the silence until a task is done; it is cancelled with them."""
    try:
        while not (await asyncio.wait([task], timeout=streams.SILENCE_S))[0]:
            yield Silence.of_pass(session.progress, None).comment()
    finally:
        task.cancel()


async def _without_answers(requests: Sequence[Request]) -> AsyncGenerator[Heard, None]:
    for index, request in enumerate(requests):
        yield index, without_answer(request)
