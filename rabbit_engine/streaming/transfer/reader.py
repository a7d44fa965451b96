"""The threads that read, shared by all streamed models of a process: what a model waits for goes ahead of any prefetch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

from rabbit_engine.streaming.transfer.ring import READERS

Job = Callable[[int], Callable[[], None]]
"""`job(lane)` reads, without the lock; what it returns is called with the lock held."""


class Source(Protocol):
    """A model's queue of reads."""

    def next_job(self, *, wanted: bool) -> Job | None:
        """The read to do next, or None; `wanted` asks only for what a model waits for. The lock is held."""


class Reader:
    """READERS threads over all sources that joined. One lock guards the bookkeeping of all of them, and is held for
    microseconds. The threads start with the first source and end with the last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # entered as C code: an interrupt cannot leave it half taken
        self.changed = threading.Condition(self.lock)
        self._sources: list[Source] = []
        self._threads: dict[int, threading.Thread] = {}

    def join(self, source: Source) -> None:
        """Read for `source` from now on."""
        try:
            with self.lock:
                self._sources.append(source)
                self._start_threads()
                self.changed.notify_all()
        except BaseException:
            self.leave(source)  # without the lock: it waits for threads that need it to end
            raise

    def _start_threads(self) -> None:
        """One thread a lane; one that could not be started before, or was interrupted in its start, is started anew."""
        for lane in range(READERS):
            if lane not in self._threads or not self._threads[lane].is_alive():
                thread = threading.Thread(target=self._read_on, args=(lane,), name="rabbit-reader", daemon=True)
                self._threads[lane] = thread  # first: it ends itself where it is not among them
                thread.start()

    def leave(self, source: Source) -> None:
        """Read for `source` no more; after the last one the threads end. Returns when they have."""
        with self.lock:
            self._sources = [other for other in self._sources if other is not source]
            ending = [] if self._sources else list(self._threads.values())
            if not self._sources:
                self._threads = {}
            self.changed.notify_all()
        for thread in ending:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join()

    def is_busy_here(self) -> bool:
        """Whether this thread is a reader, or is in the midst of bookkeeping."""
        return threading.current_thread() in self._threads.values() or self.changed._is_owned()  # type: ignore[attr-defined]

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

    def _next_job(self) -> Job | None:
        for wanted in (True, False):
            for source in self._sources:
                job = source.next_job(wanted=wanted)
                if job is not None:
                    self._sources.remove(source)  # the others' turn next time
                    self._sources.append(source)
                    return job
        return None


_reader: tuple[int, Reader] | None = None


def shared_reader() -> Reader:
    """This process's reader. A forked process gets one of its own: threads do not follow."""
    global _reader
    if _reader is None or _reader[0] != os.getpid():
        _reader = (os.getpid(), Reader())
    return _reader[1]
