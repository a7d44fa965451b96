"""The input file: its lines, counted and checked before the model is loaded, then read one at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from rabbit_engine.batches.lines import MOST_LINE_BYTES, custom_id_of, read_line
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.errors import RequestError


class Numbered(Protocol):
    """What ties an answer to a line of the input."""

    @property
    def number(self) -> int:
        """Counts from 1."""

    @property
    def checksum(self) -> int:
        """The xxh3_64 of the line's bytes."""


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line of the input that is not blank: `number` counts from 1, `checksum` is the xxh3_64 of its bytes."""

    number: int
    raw: bytes

    @property
    def checksum(self) -> int:
        """What ties an answer to this line."""
        return xxhash.xxh3_64_intdigest(self.raw)


class InputFile:
    """An input file, whose lines are known by their checksums: 16 bytes of memory each.

    Raises ConfigurationError for a file that cannot be read, and for a `custom_id` that two lines share.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checksums = array("Q", [0])
        self.count = 0
        names = array("Q")
        for line in self._read():
            self._checksums.extend([0] * (line.number - len(self._checksums)))  # blank lines
            self._checksums.append(line.checksum)
            names.append(_hash(name_of(line)))
            self.count += 1
        self._refuse_repeated(names)

    def checksum(self, number: int) -> int | None:
        """The checksum of a line; None if there is no such line."""
        return self._checksums[number] if number < len(self._checksums) else None

    def lines(self) -> Iterator[InputLine]:
        """The lines that were counted. Raises ConfigurationError if they have changed since."""
        left = self.count
        for line in self._read():
            if not left:
                return
            if line.checksum != self.checksum(line.number):
                break
            left -= 1
            yield line
        if left:
            raise ConfigurationError(f"{self.path} was changed while its batch ran: start again")

    def _read(self) -> Iterator[InputLine]:
        try:
            with self.path.open("rb") as file:
                number = 0
                while raw := file.readline(MOST_LINE_BYTES + 1):
                    number += 1
                    rest = raw
                    while rest and not rest.endswith(b"\n"):  # too long: the line fails, its rest is skipped
                        rest = file.readline(MOST_LINE_BYTES)
                    if raw.strip():
                        yield InputLine(number, raw.rstrip(b"\r\n"))
        except OSError as error:
            raise ConfigurationError(f"cannot read {self.path}: {error.strerror}") from error

    def _refuse_repeated(self, names: array[int]) -> None:
        """Compare the ids themselves only where their hashes are equal."""
        values, counts = np.unique(np.frombuffer(names, dtype=np.uint64), return_counts=True)
        suspects = {int(value) for value in values[counts > 1]}
        if not suspects:
            return
        seen: dict[str, int] = {}
        for line in self._read():
            name = name_of(line)
            if _hash(name) in suspects and (first := seen.setdefault(name, line.number)) != line.number:
                raise ConfigurationError(
                    f"{self.path}: lines {first} and {line.number} have the same custom_id, {name[:60]!r}: "
                    "answers are told apart by it"
                )


def name_of(line: InputLine) -> str:
    """The custom_id of a line: `line-7` if line 7 has none, or cannot be read."""
    with suppress(RequestError):
        return custom_id_of(read_line(line.raw), line.number)
    return f"line-{line.number}"


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())
