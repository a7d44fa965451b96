"""A task over texts that are encoded already: for callers that wait for it, and for those that must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from rabbit_engine.sessions.forwards import Compute, Forwards, Started
from rabbit_engine.tasks.batches import Inputs

T = TypeVar("T")
R = TypeVar("R")


class Work(Generic[T, R]):
    """Texts to compute, and `finish`, which makes the result of what each gave. `run` waits for it, `awaited` awaits it,
    `start` does neither."""

    def __init__(self, forwards: Forwards, inputs: Sequence[Inputs], compute: Compute[T], finish: Callable[[list[T]], R]) -> None:
        self._forwards, self._inputs, self._compute, self._finish = forwards, inputs, compute, finish

    @property
    def tokens(self) -> int:
        """The tokens of all texts."""
        return sum(map(len, self._inputs))

    def run(self, *, exact: bool | None = None) -> R:
        """The result. Raises what computing raises."""
        return self._finish(self._forwards.run(self._inputs, self._compute, exact=exact))

    def start(self, tell: Callable[[], object]) -> Started[T]:
        """Queue the texts, for a caller that passes the results to `finish`; `tell` is called when all have ended, from any
        thread."""
        started = self._forwards.start(self._inputs, self._compute)
        started.when_ended(tell)
        return started

    def finish(self, results: list[T]) -> R:
        """The result of what each text gave."""
        return self._finish(results)

    async def awaited(self) -> R:
        """The result, for an event loop. Cancelling drops what has not begun. Raises QueueFullError if the queue is full."""
        return self._finish(await self._forwards.start(self._inputs, self._compute, bounded=True).awaited())
