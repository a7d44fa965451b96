"""What every interface of the server uses: reading a request, holding its model, and answering it, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from rabbit_engine.server.access import Access
from rabbit_engine.server.body import LARGE_BODY_BYTES, read_body
from rabbit_engine.server.hosting import Host, Served
from rabbit_engine.server.metrics import Metrics
from rabbit_engine.server.outgoing import IN_EVENTS, IN_JSON, KeepAlive, Outgoing
from rabbit_engine.server.parsing import parse_object
from rabbit_engine.server.streams import EVENTS, Heard, Silence, Streamed, awaited, follow
from rabbit_engine.server.timeouts import Timeouts
from rabbit_engine.server.visits import AccessLog, Visit
from rabbit_engine.sessions import Events, Piece, Reply
from rabbit_engine.sessions import Request as Asking

T = TypeVar("T")


class Naming(Protocol):
    """A parsed request."""

    @property
    def model(self) -> str:
        """The model's name as the client wrote it; an empty one is the default model."""

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""


Parsed = TypeVar("Parsed", bound=Naming)


class Service:
    """One for the whole server."""

    def __init__(self, host: Host, access: Access, timeouts: Timeouts, access_log: AccessLog | None = None) -> None:
        self.host, self.access, self.timeouts, self._access_log = host, access, timeouts, access_log
        self.metrics = Metrics(host)
        self.ending = asyncio.Event()
        self._large = asyncio.Semaphore(1)

    def end(self, visit: Visit, route: str) -> None:
        """Count and log a request that has ended; `route` is its path as the server declares it."""
        self.metrics.count_request(route, visit)
        if self._access_log is not None:
            self._access_log.write(visit)

    @asynccontextmanager
    async def take(
        self,
        request: Request,
        parse: Callable[[dict[str, Any]], Parsed],
        prepare: Callable[[Served, Parsed], T],
    ) -> AsyncIterator[Taken[Parsed, T]]:
        """A request: parsed, its model loaded and held, and the result of `prepare`, which checks and tokenises it.

        Both functions run off the event loop, and those of large bodies one at a time. Raises RequestError and what they raise.
        """
        asked = await self.read(request, parse)
        async with self.hold(request, asked, prepare) as taken:
            yield taken

    async def read(self, request: Request, parse: Callable[[dict[str, Any]], T]) -> T:
        """The parsed body. Raises RequestError and what `parse` raises."""
        body = await read_body(request, self.timeouts.body_s)
        is_large = len(body) > LARGE_BODY_BYTES
        Visit.of(request.scope).is_large = is_large
        return await self._off_loop(is_large, lambda: parse(parse_object(body)))

    @asynccontextmanager
    async def hold(
        self,
        request: Request,
        asked: Parsed,
        prepare: Callable[[Served, Parsed], T],
        keep_alive_s: float | None = None,
        *,
        keeping: KeepAlive | None = None,
    ) -> AsyncIterator[Taken[Parsed, T]]:
        """The second half of `take`, for a request that was read. A response that waits long for its model begins with the signs
        of life of `keeping`; without it, with those of an event stream or of a JSON object."""
        visit = Visit.of(request.scope)
        visit.model = name = self.host.name_of(asked.model)
        async with AsyncExitStack() as held:

            async def ready() -> tuple[Served, T]:
                served = await held.enter_async_context(self.host.use(name, keep_alive_s))
                return served, await self._off_loop(visit.is_large, lambda: prepare(served, asked))

            how = keeping or (IN_EVENTS if asked.streams else IN_JSON)
            served, prepared = await self.awaited(request, ready(), how, self._silence)
            yield Taken(self, request, served, asked, prepared, held)

    async def awaited(self, request: Request, work: Coroutine[Any, Any, T], how: KeepAlive, silence: Callable[[], Silence]) -> T:
        """The result of what a client waits for, who is sent signs of life. Raises as `streams.awaited`."""
        outgoing = Outgoing.of(request.scope)
        return await awaited(request, work, self.ending, lambda: outgoing.keep_alive(how, silence()))

    def _silence(self) -> Silence:
        """Before the model is there."""
        load = self.host.loading
        return Silence("waiting for a model") if load is None else Silence("loading", load.facts())

    async def _off_loop(self, is_large: bool, work: Callable[[], T]) -> T:
        if not is_large:
            return await asyncio.to_thread(work)
        async with self._large:
            return await asyncio.to_thread(work)


class Taken(Generic[Parsed, T]):
    """A request whose model is held until it is answered."""

    def __init__(
        self, service: Service, request: Request, served: Served, asked: Parsed, prepared: T, held: AsyncExitStack
    ) -> None:
        self.served, self.asked, self.prepared = served, asked, prepared
        self._service, self._request, self._held, self._visit = service, request, held, Visit.of(request.scope)

    def submit(self, requests: Sequence[Asking]) -> Events:
        """Queue requests of the session; they are cancelled if the client goes. Raises QueueFullError."""
        events = self.served.session.events(requests)
        self._held.push_async_callback(events.aclose)
        self.count_tokens(sum(len(request.prompt.ids) for request in requests))
        return events

    async def follow(self, events: Events) -> AsyncGenerator[Heard, None]:
        """The events of a stream, and silences. Raises what the session raises."""
        async for heard in follow(events, self.served.session, self._service.ending):
            if isinstance(heard, tuple):
                self._count(heard[1])
            yield heard

    async def replies(self, events: Events, count: int) -> list[Reply]:
        """All replies, in the order of their requests."""
        found: dict[int, Reply] = {}
        async with aclosing(events) as heard:
            async for index, event in heard:
                self._count(event)
                if isinstance(event, Reply):
                    found[index] = event
        return [found[index] for index in range(count)]

    def count_tokens(self, prompt: int, answer: int = 0) -> None:
        """Count tokens of the request, in the metrics and for the access log: of its prompts as they are queued, and of its
        answers as they come, so that those of clients that leave count too."""
        self._visit.prompt_tokens += prompt
        self._visit.answer_tokens += answer
        self._service.metrics.count_tokens(self._visit, prompt, answer)

    def _count(self, event: Piece | Reply) -> None:
        if isinstance(event, Reply):
            self._service.metrics.count_reply(self.served.name, event)
        elif event.token is not None:
            self.count_tokens(0, 1)

    def stream(self, chunks: AsyncIterator[str], media_type: str = EVENTS) -> Response:
        """The response of a stream, which holds the model until its end."""
        return Streamed(chunks, media_type, self._held.pop_all())

    async def whole(self, work: Coroutine[Any, Any, object]) -> Response:
        """The response of a whole answer. Raises ClientDisconnect if the client does not wait for it."""
        return JSONResponse(await self._service.awaited(self._request, work, IN_JSON, lambda: Silence("waiting")))
