"""One background thread that writes blocks, from a queue with a limit in bytes. Nobody ever waits for room in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rabbit_engine.prefixes.keys import BlockKey
from rabbit_engine.prefixes.memory import HeldBlock
from rabbit_engine.utils.condition import InterruptibleCondition

_ALONE = 4
"""How many times as large as the queue a block may be that waits alone: states of a whole text may be large."""


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """A block to write: `about` describes its space, `clearing` is what the folder's was when the block was offered."""

    block: HeldBlock
    about: str
    clearing: str
    nbytes: int


class BlockWriter:
    """`write` runs in the thread, which starts with the first block and ends with `close`."""

    def __init__(self, write: Callable[[WriteRequest], None], most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._write = write
        self._changed = InterruptibleCondition()
        self._queue: dict[str, WriteRequest] = {}
        self._current: WriteRequest | None = None
        self._reserved_bytes = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def largest_bytes(self) -> int:
        """The size of the largest block that it takes, if nothing else waits."""
        return _ALONE * self.most_bytes

    def pending(self, key: BlockKey) -> HeldBlock | None:
        """A block that is not written yet, if it has the same tokens."""
        with self._changed:
            found = self._queue.get(key.file) or self._current
        return found.block if found is not None and found.block.key == key else None

    def offer(self, nbytes: int, make: Callable[[], WriteRequest]) -> WriteRequest | None:
        """Queue what `make` returns, which is called only if there is room for `nbytes`; None if there is none."""
        with self._changed:
            most = self.most_bytes if self._reserved_bytes else self.largest_bytes
            if self._is_closed or self._reserved_bytes + nbytes > most:
                return None
            self._reserved_bytes += nbytes
        try:
            request = make()
        except BaseException:
            with self._changed:
                self._reserved_bytes -= nbytes
            raise
        self._add(request)
        return request

    def _add(self, request: WriteRequest) -> None:
        file = request.block.key.file
        with self._changed:
            if self._is_closed or file in self._queue:
                self._reserved_bytes -= request.nbytes
                return
            self._queue[file] = request
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="rabbit-prefixes", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is empty; False if it is not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._current is None, timeout_s)

    def drop(self, space: str | None = None) -> None:
        """Empty the queue, or drop what it holds of a space; a write under way goes on."""
        with self._changed:
            for file in [file for file, request in self._queue.items() if space in (None, request.block.key.space)]:
                self._reserved_bytes -= self._queue.pop(file).nbytes
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Write what is queued, for `timeout_s` at most, drop the rest and end the thread."""
        end = time.monotonic() + timeout_s
        self.flush(timeout_s)
        with self._changed:
            self._is_closed = True
            thread = self._thread
        self.drop()
        if thread is not None:
            thread.join(max(end - time.monotonic(), 1.0))

    def _run(self) -> None:
        try:
            while self._step():
                pass
        finally:  # also after a fault of our own: nobody waits for a thread that has ended
            if self._current is not None:
                self._end(self._current)
            self.drop()

    def _step(self) -> bool:
        """Write the next block; False once the writer is closed."""
        request = self._take()
        if request is None:
            return False
        self._write(request)
        self._end(request)
        return True

    def _take(self) -> WriteRequest | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if not self._queue:
                return None
            self._current = self._queue.pop(next(iter(self._queue)))
            return self._current

    def _end(self, request: WriteRequest) -> None:
        with self._changed:
            self._current = None
            self._reserved_bytes -= request.nbytes
            self._changed.notify_all()
