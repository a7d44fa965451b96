"""Threads that help with kernels where torch's own cannot be used, shared by all models of a process. They end when nothing has
been asked of them for a while, so that none is left after the last model."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait

_IDLE_S = 1.0


class Pool:
    """Starts a thread for each task that no idle thread can take."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._idle = 0

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Call `task` in another thread. The future can be cancelled until that thread takes the task."""
        future: Future[None] = Future()
        with self._changed:
            self._tasks.append((future, task))
            starts = len(self._tasks) > self._idle
            self._changed.notify()
        if starts:
            threading.Thread(target=self._serve, name="rabbit-kernels", daemon=True).start()
        return future

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            future, task = taken
            if not future.set_running_or_notify_cancel():
                continue
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that submitted it
                future.set_exception(error)
            else:
                future.set_result(None)

    def _take(self) -> tuple[Future[None], Callable[[], None]] | None:
        with self._changed:
            self._idle += 1
            found = self._changed.wait_for(lambda: self._tasks, timeout=_IDLE_S)
            self._idle -= 1
            return self._tasks.popleft() if found else None


_pool: tuple[int, Pool] | None = None


def _shared_pool() -> Pool:
    """This process's pool. A forked process gets a new one: it has no threads."""
    global _pool
    if _pool is None or _pool[0] != os.getpid():
        _pool = (os.getpid(), Pool())
    return _pool[1]


def compute_in_pool(work: Callable[[], None], threads: int) -> None:
    """Call `work` in this thread and in up to `threads - 1` others, and return when all have returned.

    Raises what it raises in this thread. In the others it must not raise.
    """
    pool, helpers = _shared_pool(), list[Future[None]]()
    try:
        helpers += (pool.submit(work) for _ in range(threads - 1))
        work()
    finally:  # also when interrupted: nobody may write to the caller's memory after this
        wait([helper for helper in helpers if not helper.cancel()])
