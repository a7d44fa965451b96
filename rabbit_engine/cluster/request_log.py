"""What was asked of a stage for a text, in a file without a name, so that a new worker can be brought to the same state."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


class RequestLog:
    """The requests of all texts of a stage, in order. Thread-safe. A disk that is full ends the log of a text."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="rabbit-", buffering=0)  # noqa: SIM115 - until close
        self._lock = threading.Lock()
        self._end = 0
        self._texts: dict[str, list[tuple[int, int]] | None] = {}

    def add(self, text: str, request: bytes) -> None:
        """Add a request that was answered."""
        with self._lock:
            if self._texts.setdefault(text, []) is None:
                return
            try:
                self._file.seek(self._end)
                written = self._file.write(request)
                if written != len(request):
                    raise OSError(f"{written} of {len(request)} bytes were written")
            except OSError as error:
                logger.warning("the log of a text cannot be written (%s): it ends if its machine does", error)
                self._texts[text] = None
                return
            self._texts[text].append((self._end, len(request)))  # type: ignore[union-attr] # checked above
            self._end += len(request)

    def copy(self, text: str, copied: str) -> None:
        """Begin the log of `copied` with that of `text`."""
        with self._lock:
            entries = self._texts.get(text, [])
            self._texts[copied] = None if entries is None else list(entries)

    def requests(self, text: str) -> Iterator[bytes] | None:
        """The requests of a text; None if they were not all kept."""
        with self._lock:
            entries = self._texts.get(text, [])
        return None if entries is None else map(self._read, list(entries))

    def _read(self, entry: tuple[int, int]) -> bytes:
        with self._lock:
            self._file.seek(entry[0])
            return self._file.read(entry[1])

    def forget(self, text: str) -> None:
        """Drop a text; without any, the file is emptied."""
        with self._lock:
            self._texts.pop(text, None)
            if not self._texts and self._end and not self._file.closed:
                self._file.truncate(0)
                self._end = 0

    def close(self) -> None:
        """Free the file."""
        self._file.close()
