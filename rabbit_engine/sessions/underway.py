"""Requests of a session under way: their tickets, and their events in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from rabbit_engine.sessions.answer import Piece, Reply
from rabbit_engine.sessions.constraints import CompiledConstraint
from rabbit_engine.sessions.engine import Engine, Job
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.prompts import Prompt
from rabbit_engine.sessions.thinking import Thinking

if TYPE_CHECKING:
    from rabbit_engine.sessions.held import HeldPrefix

Event = Piece | Reply | BaseException
Tell = Callable[[int, Event], None]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that fits, with its options, whose constraint is compiled; pass it to `Session.ask`."""

    prompt: Prompt
    options: Options
    constraint: CompiledConstraint | None = None
    thinking: Thinking | None = None
    """The reasoning that may come before the answer."""
    held: HeldPrefix | None = None
    """What was computed of the prompt's beginning."""

    def copies(self, count: int) -> list[Request]:
        """`count` of the same; those of a seeded one get different seeds."""
        seed = self.options.seed
        if seed is None:
            return [self] * count
        return [replace(self, options=replace(self.options, seed=seed + index)) for index in range(count)]


class Ticket:
    """A request under way. `cancel()` ends it; its callback still gets the partial answer."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job

    def cancel(self) -> None:
        """Cancel it. Safe from any thread, more than once, and after its end."""
        self._engine.cancel(self._job)

    @property
    def place(self) -> int | None:
        """Its place among the requests that wait, 1 for the next one; None once it has started."""
        return self._engine.place(self._job)


class Asker(Protocol):
    """A session, or a fork of it."""

    def ask(self, requests: Sequence[Request], tell: Tell, *, bounded: bool = True) -> list[Ticket]:
        """Queue all requests, or none."""
        ...

    def require_process(self) -> None:
        """Raise ModelClosedError in a forked child."""

    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the session's own thread."""


class Events:
    """Events of requests, for one event loop: `(index, Piece)` and finally `(index, Reply)` of each. Failures are raised.

    `aclose()` cancels the requests.
    """

    def __init__(self, session: Asker, requests: Sequence[Request], *, bounded: bool = True) -> None:
        session.require_other_thread()
        self._loop, self._inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self._session, self._left = session, len(requests)
        self._tickets = session.ask(requests, self._tell, bounded=bounded)

    def _tell(self, index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (index, event))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Piece | Reply]:
        self._session.require_process()
        if not self._left:
            raise StopAsyncIteration
        index, event = await self._inbox.get()
        if isinstance(event, BaseException):
            await self.aclose()
            raise event
        self._left -= isinstance(event, Reply)
        return index, event

    @property
    def place(self) -> int | None:
        """The place of the first request among all that wait, 1 for the next one; None once one of these has started."""
        places = [ticket.place for ticket in self._tickets]
        return None if None in places else min(filter(None, places), default=None)

    async def aclose(self) -> None:
        """Cancel the requests that are not finished."""
        self._left = 0
        cancel_all(self._tickets)


def cancel_all(tickets: Sequence[Ticket]) -> None:
    """Cancel those that have not ended."""
    for ticket in tickets:
        ticket.cancel()
