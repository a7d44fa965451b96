"""What was asked of a stage for a text, in a file without a name, so that a new worker can be brought to the same state."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rabbit_engine.errors import CacheStorageError
from rabbit_engine.storage.scratchfile import ScratchFile

logger = logging.getLogger(__name__)

EXTENT_BYTES = 65_536
"""Of one size, so that what a text gives back serves any other."""


@dataclass(slots=True, eq=False)
class _Extent:
    """A part of the file, which a text and its copies use."""

    offset: int
    users: int = 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """A request, or what of it lies in one extent."""

    extent: _Extent
    start: int
    nbytes: int


@dataclass(slots=True)
class _TextLog:
    """A text's requests, one behind another in its extents, of which `used` bytes of the last are taken."""

    requests: list[tuple[_Piece, ...]] = field(default_factory=list)
    extents: list[_Extent] = field(default_factory=list)
    used: int = EXTENT_BYTES


class RequestLog:
    """The requests of all texts of a stage, in order. Thread-safe. A disk that is full ends the log of a text."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` is that of temporary files by default."""
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file: ScratchFile | None = None
        self._lock = threading.RLock()  # `forget` is called by finalizers, which may run in a thread that holds it
        self._texts: dict[str, _TextLog | None] = {}
        self._closed = False

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        with self._lock:
            return 0 if self._file is None else self._file.nbytes

    def add(self, text: str, request: bytes) -> None:
        """Add a request that was answered."""
        with self._lock:
            log = self._texts.setdefault(text, _TextLog())
            if log is None or self._closed:
                return
            try:
                log.requests.append(self._written(log, request))
            except CacheStorageError as error:
                logger.warning("%s. Else the text ends if its machine does", error)
                self._give(log)
                self._texts[text] = None

    def copy(self, text: str, copied: str) -> None:
        """Begin the log of `copied` with that of `text`: they share its extents, and `copied` goes on in one of its own."""
        with self._lock:
            log = self._texts.get(text, _TextLog())
            if log is not None:
                for extent in log.extents:
                    extent.users += 1
                log = _TextLog(list(log.requests), list(log.extents))
            self._texts[copied] = log

    def requests(self, text: str) -> Iterator[bytes] | None:
        """The requests of a text; None if they were not all kept. The iterator raises KeyError if the text is forgotten."""
        with self._lock:
            log = self._texts.get(text, _TextLog())
            return None if log is None else (self._read(text, log, request) for request in list(log.requests))

    def forget(self, text: str) -> None:
        """Drop a text; without any, the file's space is freed."""
        with self._lock:
            log = self._texts.pop(text, None)
            if log is not None:
                self._give(log)
            if not self._texts:
                self._free()

    def close(self) -> None:
        """Free the file, and keep nothing from now on. Idempotent."""
        with self._lock:
            self._closed = True
            self._texts.clear()
            self._free()

    def _free(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _written(self, log: _TextLog, request: bytes) -> tuple[_Piece, ...]:
        """Write a request behind the last one of its text. Raises CacheStorageError."""
        if self._file is None:
            self._file = ScratchFile(self._folder, "the requests of a text")
        pieces, done = [], 0
        while done < len(request):
            if log.used == EXTENT_BYTES:
                log.extents.append(_Extent(self._file.claim(EXTENT_BYTES)))
                log.used = 0
            piece = _Piece(log.extents[-1], log.used, min(len(request) - done, EXTENT_BYTES - log.used))
            content = bytearray(request[done : done + piece.nbytes])
            self._file.write(piece.extent.offset + piece.start, [memoryview(content)])
            log.used += piece.nbytes
            done += piece.nbytes
            pieces.append(piece)
        return tuple(pieces)

    def _read(self, text: str, log: _TextLog, request: tuple[_Piece, ...]) -> bytes:
        found = bytearray(sum(piece.nbytes for piece in request))
        rest = memoryview(found)
        with self._lock:
            if self._file is None or self._texts.get(text) is not log:
                raise KeyError(f"text {text} was forgotten")
            for piece in request:
                self._file.read(piece.extent.offset + piece.start, [rest[: piece.nbytes]])
                rest = rest[piece.nbytes :]
        return bytes(found)

    def _give(self, log: _TextLog) -> None:
        for extent in log.extents:
            extent.users -= 1
            if not extent.users and self._file is not None:
                self._file.give(extent.offset, EXTENT_BYTES)
