"""Submits API requests to a session, and turns its events into answers, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress

from rabbit_engine.errors import SessionClosedError
from rabbit_engine.server import wire as words
from rabbit_engine.server.bodies import Bodies
from rabbit_engine.server.errors import RequestError, as_request_error
from rabbit_engine.server.metrics import Metrics
from rabbit_engine.server.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from rabbit_engine.server.tools import ToolCall, may_be_call
from rabbit_engine.server.wire import Wire
from rabbit_engine.sessions import Events, Piece, Reply, Request, Session
from rabbit_engine.sessions.embeddings import EmbeddingWork

SILENCE_S = 10.0
"""A stream sends a keep-alive comment after this many seconds without a token."""


class Answering:
    """Answers requests for one model."""

    def __init__(self, session: Session, name: str, metrics: Metrics, ending: asyncio.Event) -> None:
        self._session, self._name, self._metrics, self._ending = session, name, metrics, ending
        self._bodies = Bodies(session, name)
        self._embeds = session.embedder is not None  # damaged files are an error at the start

    # The next three may be slow, and run in a separate thread.

    def chat_requests(self, asked: ChatRequest) -> list[Request]:
        """One request for each answer. Raises for what is not supported."""
        return self._bodies.chat_requests(asked)

    def text_requests(self, asked: CompletionRequest) -> list[Request]:
        """One request for each completion. Raises for what is not supported, and for more than the queue holds."""
        if len(asked.prompts) * asked.choices > self._session.most_requests:
            most = self._session.most_requests
            raise RequestError(400, f"the server takes at most {most} answers at once", param="prompt")
        return self._bodies.text_requests(asked)

    def embedding(self, asked: EmbeddingRequest) -> EmbeddingWork:
        """The encoded texts. Raises if the model does not embed."""
        if not self._embeds:
            raise RequestError(400, f"{self._name} cannot embed texts: it has no sentence-transformers files", param="model")
        return self._session.embedding(asked.inputs)

    def events(self, requests: Sequence[Request]) -> Events:
        """Submit them. Raises QueueFullError."""
        return self._session.events(requests)

    async def chat(self, asked: ChatRequest, events: Events, count: int) -> dict[str, object]:
        """A whole chat answer."""
        return self._bodies.chat(asked, await self._replies(events, count))

    async def text(self, asked: CompletionRequest, requests: Sequence[Request], events: Events) -> dict[str, object]:
        """A whole completion."""
        return self._bodies.text(asked, requests, await self._replies(events, len(requests)))

    async def _replies(self, events: Events, count: int) -> list[Reply]:
        found: dict[int, Reply] = {}
        async with aclosing(events) as heard:
            async for index, event in heard:
                if isinstance(event, Reply):
                    found[index] = event
                    self._metrics.count_reply(event)
        return [found[index] for index in range(count)]

    async def chat_stream(self, asked: ChatRequest, events: Events, count: int) -> AsyncIterator[str]:
        """A chat answer as it is generated."""
        wire = Wire("chat.completion", self._name, self._session.model.tokenizer)
        for index in range(count):
            yield words.chat_delta(wire, index, {"role": "assistant", "content": ""})
        held = dict.fromkeys(range(count), "")
        replies: list[Reply] = []
        async for chunk in self._alive(events):
            if isinstance(chunk, str):
                yield chunk
                continue
            index, event = chunk
            if isinstance(event, Reply):
                replies.append(event)
                text, calls = asked.read_calls(held[index]) if held[index] else ("", [])
                for delta in _last_deltas(text, calls):
                    yield words.chat_delta(wire, index, delta)
                yield words.chat_delta(wire, index, {}, ended="tool_calls" if calls else words.reason(event))
            elif asked.tool_names and may_be_call(held[index] + event.text):
                held[index] += event.text
            elif held[index] or event.text or event.logprob is not None:
                text, held[index] = held[index] + event.text, ""
                yield words.chat_delta(wire, index, {"content": text}, event)
        if asked.wants_usage:
            yield wire.chunk(counts=words.usage(replies))
        yield words.LAST_CHUNK

    async def text_stream(self, asked: CompletionRequest, requests: Sequence[Request], events: Events) -> AsyncIterator[str]:
        """A completion as it is generated."""
        wire = Wire("text_completion", self._name, self._session.model.tokenizer)
        replies: dict[int, Reply] = {}
        lengths = dict.fromkeys(range(len(requests)), 0)
        for index, request in enumerate(requests):
            if echo := self._bodies.echo(asked, request):
                yield wire.chunk({"index": index, "text": echo, "logprobs": None, "finish_reason": None})
        async for chunk in self._alive(events):
            if isinstance(chunk, str):
                yield chunk
                continue
            index, event = chunk
            if isinstance(event, Reply):
                replies[index] = event
                yield wire.chunk({"index": index, "text": "", "logprobs": None, "finish_reason": words.reason(event)})
            elif event.text or event.logprob is not None:
                logprobs = None if event.logprob is None else wire.legacy_logprobs([event.logprob], lengths[index])
                lengths[index] += len(event.text)
                yield wire.chunk({"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": None})
        if asked.wants_usage:
            yield wire.chunk(counts=words.usage_of_prompts([reply for _, reply in sorted(replies.items())], asked.choices))
        yield words.LAST_CHUNK

    async def _alive(self, events: Events) -> AsyncIterator[str | tuple[int, Piece | Reply]]:
        """The events, a comment after every silence, and an error as the last event."""
        pending: asyncio.Task[tuple[int, Piece | Reply]] | None = None
        ended = asyncio.ensure_future(self._ending.wait())
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events))
                await asyncio.wait([pending, ended], timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
                if ended.done() and not pending.done():
                    raise SessionClosedError("the server is shutting down")
                if not pending.done():
                    yield words.KEEP_ALIVE
                    continue
                index, event = pending.result()
                pending = None
                if isinstance(event, Reply):
                    self._metrics.count_reply(event)
                yield index, event
        except StopAsyncIteration:
            return
        except Exception as error:  # noqa: BLE001 - the status has been sent
            yield words.event(as_request_error(error).body())
        finally:
            ended.cancel()
            if pending is not None and not pending.done():
                pending.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration):
                    await pending
            await events.aclose()

    async def embed(self, asked: EmbeddingRequest, work: EmbeddingWork) -> dict[str, object]:
        """Vectors of texts, as `Session.embed` gives them."""
        vectors = work.vectors(await work.start(bounded=True).awaited(), asked.dimensions)
        return words.embeddings(self._name, vectors.tolist(), asked.encoding_format or "float", work.tokens)


def _last_deltas(text: str, calls: Sequence[ToolCall]) -> Iterator[dict[str, object]]:
    if text:
        yield {"content": text}
    for index, call in enumerate(calls):
        yield {"tool_calls": [{"index": index, **words.tool_call(call)}]}
