"""Turns API requests into session requests, and session events into answers, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial

import torch

from rabbit_engine.errors import SessionClosedError
from rabbit_engine.server import wire as words
from rabbit_engine.server.errors import RequestError, as_request_error
from rabbit_engine.server.fields import unsupported
from rabbit_engine.server.metrics import Metrics
from rabbit_engine.server.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from rabbit_engine.server.tools import ToolCall, may_be_call
from rabbit_engine.server.wire import Wire
from rabbit_engine.sessions import Events, Piece, Reply, Request, Session
from rabbit_engine.tasks.embedding import Embedder

SILENCE_S = 10.0
"""A stream sends a keep-alive comment after this many seconds without a token."""


class Answering:
    """Answers requests for one model."""

    def __init__(self, session: Session, name: str, embedder: Embedder | None, metrics: Metrics, ending: asyncio.Event) -> None:
        self._session, self._name, self._embedder, self._metrics = session, name, embedder, metrics
        self._ending = ending

    # The next three may be slow, and run in a separate thread.

    def chat_requests(self, asked: ChatRequest) -> list[Request]:
        """One request for each answer. Raises for what is not supported."""
        asked.refuse_unsupported()
        template = asked.template()
        for name in ("reasoning_effort", "documents"):
            if getattr(asked, name) and not self._session.template_reads(name):
                raise unsupported(name, "the checkpoint's chat template does not read it")
        request = self._session.request(asked.conversation(), **template, **asked.options())
        return _copies([request], asked.choices)

    def text_requests(self, asked: CompletionRequest) -> list[Request]:
        """One request for each completion. Raises for what is not supported."""
        asked.refuse_unsupported()
        if len(asked.prompts) * asked.choices > self._session.most_requests:
            most = self._session.most_requests
            raise RequestError(400, f"the server takes at most {most} answers at once", param="prompt")
        special = asked.add_special_tokens is not False
        options = asked.options()
        found = [self._session.request_text(prompt, special_tokens=special, **options) for prompt in asked.prompts]
        return _copies(found, asked.choices)

    def embedding_prompts(self, asked: EmbeddingRequest) -> list[list[int]]:
        """The token ids of texts. Raises if the model does not embed."""
        if self._embedder is None:
            raise RequestError(400, f"{self._name} cannot embed texts: it has no sentence-transformers files", param="model")
        found = [self._session.encode(text) for text in asked.inputs]
        for ids in found:
            self._session.refuse_longer(ids)
        return found

    def events(self, requests: Sequence[Request]) -> Events:
        """Submit them. Raises QueueFullError."""
        return self._session.events(requests)

    async def chat(self, asked: ChatRequest, events: Events, count: int) -> dict[str, object]:
        """A whole chat answer."""
        wire, replies = Wire("chat.completion", self._name, self._session.model.tokenizer), await self._replies(events, count)
        choices = []
        for index, reply in enumerate(replies):
            text, calls = asked.read_calls(reply.text)
            choices.append(words.chat_choice(wire, index, reply, text, calls))
        return wire.body(choices, replies)

    async def text(self, asked: CompletionRequest, requests: Sequence[Request], events: Events) -> dict[str, object]:
        """A whole completion."""
        wire = Wire("text_completion", self._name, self._session.model.tokenizer)
        replies = await self._replies(events, len(requests))
        choices = [self._text_choice(wire, asked, requests[index], index, reply) for index, reply in enumerate(replies)]
        return {**wire.body(choices, replies), "usage": words.usage_of_prompts(replies, asked.choices)}

    def _text_choice(self, wire: Wire, asked: CompletionRequest, request: Request, index: int, reply: Reply) -> dict[str, object]:
        logprobs = None if reply.logprobs is None else wire.legacy_logprobs(reply.logprobs)
        text = self._echo(asked, request) + reply.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": words.reason(reply)}

    def _echo(self, asked: CompletionRequest, request: Request) -> str:
        return str(self._session.model.tokenizer.decode(request.prompt.ids, skip_special_tokens=True)) if asked.echo else ""

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
            if echo := self._echo(asked, request):
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

    async def embed(self, asked: EmbeddingRequest, prompts: Sequence[list[int]]) -> dict[str, object]:
        """Vectors of texts."""
        embedder, model = self._embedder, self._session.model
        assert embedder is not None  # noqa: S101 - `embedding_prompts` rejects it
        futures = self._session.call([(partial(embedder.embed, model, ids), len(ids)) for ids in prompts])
        try:
            vectors = [await asyncio.wrap_future(future) for future in futures]
        finally:
            for future in futures:
                future.cancel()
        encoding = asked.encoding_format or "float"
        data = [
            {"object": "embedding", "index": index, "embedding": words.vector(_cut(found, asked.dimensions), encoding)}
            for index, found in enumerate(vectors)
        ]
        tokens = sum(map(len, prompts))
        return {"object": "list", "data": data, "model": self._name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _copies(requests: Sequence[Request], count: int) -> list[Request]:
    """`count` copies of each; the copies of a seeded one get different seeds."""
    return [_reseeded(request, index) for request in requests for index in range(count)]


def _reseeded(request: Request, index: int) -> Request:
    seed = request.options.seed
    return request if seed is None else replace(request, options=replace(request.options, seed=seed + index))


def _last_deltas(text: str, calls: Sequence[ToolCall]) -> Iterator[dict[str, object]]:
    if text:
        yield {"content": text}
    for index, call in enumerate(calls):
        yield {"tool_calls": [{"index": index, **words.tool_call(call)}]}


def _cut(vector: torch.Tensor, dimensions: int | None) -> list[float]:
    """The first dimensions, normalized again; for models trained for it (Matryoshka)."""
    if dimensions is None:
        return [float(value) for value in vector]
    if dimensions > len(vector):
        raise RequestError(400, f"dimensions is {dimensions}, the model's vectors have {len(vector)}", param="dimensions")
    return [float(value) for value in torch.nn.functional.normalize(vector[:dimensions], dim=0)]
