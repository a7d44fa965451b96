"""A file of this process alone, without a name: the system frees its space when the process ends, however it ends.

Reads and writes go past the page cache where the system has O_DIRECT and the buffers allow it, as in `directio`.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

from rabbit_engine.errors import CacheStorageError
from rabbit_engine.storage.directio import CHUNK_BYTES, PAGE, aligned_up

Vector = Callable[[int, Sequence[memoryview], int], int]
"""`os.preadv` or `os.pwritev`: a file's descriptor, buffers, an offset; how many bytes it moved."""

Single = Callable[[memoryview], int | None]
"""`readinto` or `write` of a file, at its position."""

_MOST_BUFFERS = 1024
"""Buffers of one call: POSIX systems take at least as many (IOV_MAX)."""


class ScratchFile:
    """Bytes in extents that `claim` hands out and `give` takes back, in a file in `folder` with mode 0600. Thread-safe.

    Raises CacheStorageError if the folder cannot be written, or the disk is full or fails.
    """

    def __init__(self, folder: Path, content: str = "the keys and values of a text") -> None:
        """`content` says in errors what it holds."""
        self._folder, self._content = folder, content
        with self._disk_errors("written"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="rabbit-", buffering=0)  # noqa: SIM115 - until close
        self._is_direct = _make_direct(self._file.fileno())
        self._lock = threading.RLock()  # `give` is called by finalizers, which may run in a thread that holds it
        self._free: dict[int, list[int]] = {}
        self._room: dict[int, tuple[int, int]] = {}
        self._end = 0

    @property
    def nbytes(self) -> int:
        """Its size: that of all extents, those given back too."""
        return self._end - sum(end - begin for begin, end in self._room.values())

    def claim(self, nbytes: int, group: int = 0) -> int:
        """The offset of an extent of whole pages for `nbytes`. Extents of a `group` lie one behind another, in rooms of about
        CHUNK_BYTES: what is read together is then read as one."""
        size = aligned_up(nbytes)
        with self._lock:
            if free := self._free.get(size):
                return heapq.heappop(free)
            begin, end = self._room.get(group, (0, 0))
            if begin + size > end:
                begin, end = self._end, self._end + max(1, CHUNK_BYTES // size) * size
                self._end = end
            self._room[group] = begin + size, end
            return begin

    def give(self, offset: int, nbytes: int) -> None:
        """Take back the extent that `claim(nbytes)` returned."""
        with self._lock:
            heapq.heappush(self._free.setdefault(aligned_up(nbytes), []), offset)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write them one behind another from `offset` on."""
        with self._disk_errors("written"):
            self._suit(buffers)
            self._move(getattr(os, "pwritev", None), self._file.write, offset, buffers)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill them one after another with the bytes from `offset` on."""
        with self._disk_errors("read"):
            self._suit(buffers)
            self._move(getattr(os, "preadv", None), self._file.readinto, offset, buffers)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Free its space. Idempotent."""
        self._file.close()

    def _move(self, vector: Vector | None, single: Single, offset: int, buffers: Sequence[memoryview]) -> None:
        """Move all bytes, with `vector` if the system has it, else one buffer after another with `single`."""
        todo = iter(buffers)
        while some := list(islice(todo, _MOST_BUFFERS)):
            while some:
                done = vector(self._file.fileno(), some, offset) if vector else self._move_one(single, some[0], offset)
                if not done:
                    raise OSError(f"{len(some)} buffers left at {offset}, the end of the file")
                offset += done
                some = _rest(some, done)
                self._suit(some)  # what a short transfer leaves may begin within a page

    def _move_one(self, single: Single, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self._file.seek(offset)
            return single(buffer) or 0

    def _suit(self, buffers: Sequence[memoryview]) -> None:
        """Go through the page cache from now on, if a buffer is not of whole pages."""
        if self._is_direct and any(buffer.nbytes % PAGE or _address(buffer) % PAGE for buffer in buffers):
            with self._lock:
                self._is_direct = _make_direct(self._file.fileno(), wanted=False)

    @contextlib.contextmanager
    def _disk_errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise CacheStorageError(
                f"{self._content} cannot be {done} in {self._folder} ({cause.strerror or cause}): free some of its "
                "disk, name another folder with RABBIT_ENGINE_CACHE, or request fewer tokens"
            ) from cause


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of them after the first `done` bytes."""
    for index, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[index + 1 :]]
        done -= buffer.nbytes
    return []


def _make_direct(descriptor: int, *, wanted: bool = True) -> bool:
    """Open file `descriptor` for transfers past the page cache, or no longer; whether it is."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        import fcntl

        if hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, int(wanted))
            return False  # any buffer will do
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except (ImportError, OSError):  # Windows; a file system without it
        return False
    return bool(wanted and flag)
