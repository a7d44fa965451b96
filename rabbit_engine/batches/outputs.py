"""The output file: whole lines only, each tied to the line it answers, so that it alone says what is left to do.

The `id` of an answer is `batch_req_<number>_<checksum>_<settings>`: the number of the input's line, the checksum of its bytes,
and the model and options. So there is no second file that could be lost, or disagree after a crash.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rabbit_engine.batches.inputs import InputFile, Numbered
from rabbit_engine.batches.settings import BatchSettings
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.storage.tensorfiles import written_whole

if sys.platform != "win32":
    import fcntl

_BEGIN = b'{"id": "batch_req_'
_LINE = re.compile(rb'\{"id": "batch_req_(\d{1,18})_([0-9a-f]{16})_([!-~]*?)", "custom_id": ')
_HEAD_BYTES = 4096
_WELL = b'"error": null}\n'
_SYNC_S = 1.0
"""Answers reach the disk this often: a power failure may lose the last ones, which are then computed again."""


class OutputFile:
    """The answers that a file holds, and those appended to it.

    With `retry_failed`, lines that failed are taken out: they are then lines without an answer. Raises ConfigurationError for
    a file that cannot be written, is being written by another process, or holds anything but answers to lines of `source`
    with these settings.
    """

    def __init__(self, path: Path, source: InputFile, settings: BatchSettings, *, retry_failed: bool = False) -> None:
        self.path, self._source, self._settings, self._retries = path, source, settings, retry_failed
        self._encoded = settings.encode()
        self._done = bytearray(1)
        self.count = self.failed = self.retried = 0
        self._synced_s, self._is_synced = time.monotonic(), True
        self._file = self._open()
        try:
            self._require_own_file()
            self._lock()
            os.ftruncate(self._file, self._read_answers())
            if self.retried:
                self._take_out_failed()
            os.lseek(self._file, 0, os.SEEK_END)
        except BaseException:
            os.close(self._file)
            raise

    def has(self, line: Numbered) -> bool:
        """Whether the line is answered."""
        return line.number < len(self._done) and bool(self._done[line.number])

    def append(self, line: Numbered, custom_id: str, response: Mapping[str, object], error: object) -> None:
        """Write an answer: a process killed here leaves a part of a line, which the next start cuts off."""
        answer = {
            "id": f"batch_req_{line.number}_{line.checksum:016x}_{self._encoded}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        left = memoryview(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as failure:
            raise ConfigurationError(f"cannot write {self.path}: {failure.strerror}; start again when it can be") from failure
        self._is_synced = False
        self._mark(line.number, well=error is None)
        if time.monotonic() - self._synced_s > _SYNC_S:
            self._sync()

    def close(self) -> None:
        """Write everything to the disk."""
        self._sync()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        if not self._is_synced:
            os.fsync(self._file)
        self._synced_s, self._is_synced = time.monotonic(), True

    def _mark(self, number: int, *, well: bool) -> None:
        self._done.extend(bytes(max(0, number + 1 - len(self._done))))
        if not self._done[number]:
            self._done[number] = 1
            self.count += 1
            self.failed += not well

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ConfigurationError(f"cannot write {self.path}: {error.strerror}") from error

    def _require_own_file(self) -> None:
        if not self.path.is_file():
            raise ConfigurationError(f"{self.path} is not a file: a batch goes on by what its output file holds")
        if self.path.samefile(self._source.path):
            raise ConfigurationError(f"{self.path} is the input: name another file for the answers")

    def _lock(self) -> None:
        """Keep other processes out; the lock ends with this process, however it ends. Windows has none."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"another process is writing {self.path}") from error
        except OSError:  # a file system without locks
            return
        if not os.path.samestat(os.fstat(self._file), self.path.stat()):  # replaced after it was opened
            raise ConfigurationError(f"another process is writing {self.path}")

    def _take_out_failed(self) -> None:
        """Put a file without the lines that failed in place of this one, whole: killed before, all of them are still there;
        killed after, they are lines that no start has answered yet. This file stays locked until the new one is."""
        own = self._file
        try:
            with written_whole(self.path.resolve()) as kept, open(os.dup(own), "rb") as file:  # noqa: PTH123
                Path(kept.name).chmod(stat.S_IMODE(os.fstat(own).st_mode))
                file.seek(0)
                kept.writelines(raw for raw in file if raw.endswith(_WELL))
        except OSError as error:
            raise ConfigurationError(f"cannot write {self.path}: {error.strerror}") from error
        self._file = self._open()
        try:
            self._lock()
        finally:
            os.close(own)

    def _read_answers(self) -> int:
        """The length of the whole lines: what follows is a line that a killed process did not finish."""
        end = 0
        with open(os.dup(self._file), "rb") as file:  # noqa: PTH123 - of a descriptor
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    if not (raw.startswith(_BEGIN) or _BEGIN.startswith(raw)):
                        raise self._foreign(number)
                    break
                self._read_answer(number, raw)
                end += len(raw)
        return end

    def _read_answer(self, number: int, raw: bytes) -> None:
        found = _LINE.match(raw[:_HEAD_BYTES])
        if found is None:
            raise self._foreign(number)
        line, checksum, settings = int(found[1]), int(found[2], 16), found[3].decode()
        if settings != self._encoded:
            former, own = self._settings.difference(BatchSettings.decode(settings))
            raise ConfigurationError(
                f"{self.path} was begun with {former}, and this batch has {own}: repeat the former, or name another output file"
            )
        if checksum != self._source.checksum(line):
            raise ConfigurationError(
                f"{self.path} belongs to other input: its line {number} answers a line {line} that {self._source.path} does not "
                "have: name another file"
            )
        well = raw.endswith(_WELL)
        if well or not self._retries:
            self._mark(line, well=well)
        else:
            self.retried += 1

    def _foreign(self, number: int) -> ConfigurationError:
        return ConfigurationError(f"{self.path} was not written by a batch (line {number}): name another file")
