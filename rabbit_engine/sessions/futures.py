"""Runs callers' functions in a session's thread: the futures of their results, and how their errors are reported."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

import torch

from rabbit_engine.errors import RabbitError, StreamingError, first_line
from rabbit_engine.planning.demand import Demand
from rabbit_engine.sessions.engine import Job

T = TypeVar("T")


class Worker(Protocol):
    """The session whose thread runs the functions."""

    def require_process(self) -> None:
        """Raise ModelClosedError in a forked child."""

    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the session's own thread."""


class Promise(Future[T]):
    """A future that refuses to wait where nothing could set it: in a forked child, or in the thread that would set it."""

    def __init__(self, session: Worker) -> None:
        super().__init__()
        self._session = session

    def result(self, timeout: float | None = None) -> T:
        """As for any future, but raises where it would wait forever: in a forked child, and in the session's own thread."""
        self._require_another()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As for any future, but raises where it would wait forever: in a forked child, and in the session's own thread."""
        self._require_another()
        return super().exception(timeout)

    def _require_another(self) -> None:
        if not self.done():
            self._session.require_process()
            self._session.require_other_thread()


def computing_job(work: Callable[[], T], demand: Demand, future: Future[T], *, exact: bool = False) -> Job:
    """A job that sets the future to what `work` returns."""

    def run() -> None:
        if future.set_running_or_notify_cancel():
            future.set_result(work())

    def end(failure: BaseException | None) -> None:
        if failure is not None and not future.cancelled():
            future.set_exception(own_error(failure))

    return Job(run, end, demand, exact=exact)


def own_error(failure: BaseException) -> BaseException:
    """Our errors unchanged; any other wrapped with its name, as it comes from inside the model."""
    if isinstance(failure, RabbitError | MemoryError | torch.OutOfMemoryError):
        return failure
    error = StreamingError(f"the answer failed: {type(failure).__name__}: {first_line(failure)}")
    error.__cause__ = failure
    return error
