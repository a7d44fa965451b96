"""The reader threads, shared by all streamed models of a process: what a model waits for is read before any prefetch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

from rabbit_engine.streaming.transfer.ring import READERS
from rabbit_engine.utils.condition import InterruptibleCondition

Job = Callable[[int], Callable[[], None]]
"""`job(lane)` reads without the lock; its result is called with the lock held."""


class ReadQueue(Protocol):
    """A model's queue of reads."""

    def next_job(self, *, wanted: bool) -> Job | None:
        """The next read, or None; `wanted` restricts it to what a model waits for. Called with the lock held."""


class Reader:
    """READERS threads for all joined queues. One lock guards their bookkeeping, and is held for microseconds. The threads
    start with the first queue and end with the last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # entered in C code: an interrupt cannot leave it half acquired
        self.changed = InterruptibleCondition(self.lock)
        self._queues: list[ReadQueue] = []
        self._threads: dict[int, threading.Thread] = {}

    def join(self, queue: ReadQueue) -> None:
        """Start reading for `queue`."""
        try:
            with self.lock:
                self._queues.append(queue)
                self._start_threads()
                self.changed.notify_all()
        except BaseException:
            self.leave(queue)  # without the lock: it waits for threads that need it to end
            raise

    def _start_threads(self) -> None:
        """One thread per lane, including lanes whose earlier start failed or was interrupted."""
        for lane in range(READERS):
            if lane not in self._threads or not self._threads[lane].is_alive():
                thread = threading.Thread(target=self._read_on, args=(lane,), name="rabbit-reader", daemon=True)
                self._threads[lane] = thread  # first: a thread that is not among them ends
                thread.start()

    def leave(self, queue: ReadQueue) -> None:
        """Stop reading for `queue`; after the last one, return when the threads have ended."""
        with self.lock:
            self._queues = [other for other in self._queues if other is not queue]
            ending = [] if self._queues else list(self._threads.values())
            if not self._queues:
                self._threads = {}
            self.changed.notify_all()
        for thread in ending:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join()

    def is_busy_here(self) -> bool:
        """Whether this thread is a reader, or is in the middle of bookkeeping."""
        return threading.current_thread() in self._threads.values() or self.changed.is_owned()

    def _read_on(self, lane: int) -> None:
        while True:
            with self.lock:
                job = self._next_job()
                while job is None:
                    if threading.current_thread() not in self._threads.values():
                        return
                    self.changed.wait()
                    job = self._next_job()
            finish = job(lane)
            with self.lock:
                finish()
                self.changed.notify_all()
            del job, finish  # they hold what was read, which would stay while this thread waits for its next job

    def _next_job(self) -> Job | None:
        for wanted in (True, False):
            for queue in self._queues:
                job = queue.next_job(wanted=wanted)
                if job is not None:
                    self._queues.remove(queue)  # the others go first next time
                    self._queues.append(queue)
                    return job
        return None


_reader: tuple[int, Reader] | None = None


def shared_reader() -> Reader:
    """This process's reader. A forked process gets a new one: it has no threads."""
    global _reader
    if _reader is None or _reader[0] != os.getpid():
        _reader = (os.getpid(), Reader())
    return _reader[1]
