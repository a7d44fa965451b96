"""Files of which only some extents are here: the rest are holes, and a record next to the file says which they are.

`read_header` gives the entries of absent tensors the stamp ABSENT, and no reader opens a file for them. Those of present ones
have the file's inode alone: extents may be added while others are read.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rabbit_engine.errors import DamagedFileError
from rabbit_engine.storage.directio import ABSENT, GROWS, disk_errors
from rabbit_engine.storage.jsonvalues import Fields, counts, parse, sealed, unsealed

RECORD_SUFFIX = ".extents"
VERSION = 1

Span = tuple[int, int]
"""The first byte, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class PresentExtents:
    """The `spans` of a file that are here, merged and in order, and the `ties` of the model's weights.

    `ties` answers whether two stored copies of a weight are equal, when they are not here to be compared.
    """

    spans: tuple[Span, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)

    def has(self, offset: int, nbytes: int) -> bool:
        """Whether all `nbytes` from `offset` on are here."""
        index = bisect_right(self.spans, offset, key=lambda span: span[0]) - 1
        return nbytes == 0 or (index >= 0 and offset + nbytes <= self.spans[index][1])

    def stamp(self, offset: int, nbytes: int, inode: int) -> tuple[int, int]:
        """The stamp of a tensor in a file with that inode."""
        return (inode, GROWS) if self.has(offset, nbytes) else ABSENT

    def text(self) -> bytes:
        """What its record holds."""
        return json.dumps(sealed({"version": VERSION, "spans": list(map(list, self.spans)), "ties": dict(self.ties)})).encode()


def record_path(path: Path) -> Path:
    """Where the record of a file is."""
    return path.with_name(f"{path.name}{RECORD_SUFFIX}")


def read_present(path: Path) -> PresentExtents | None:
    """What is here of the file; None if it has no record, so that all of it is. Raises DamagedFileError."""
    record = record_path(path)
    try:
        with disk_errors(record):
            raw = record.read_bytes() if record.is_file() else None
        return None if raw is None else _parse(raw)
    except ValueError as error:
        raise DamagedFileError(f"{record} cannot be read ({error}): delete {path}, and it is fetched again") from error


def _parse(raw: bytes) -> PresentExtents:
    value = unsealed(parse(raw))
    if value is None:
        raise ValueError("its checksum differs")
    fields = Fields.of(value)
    if fields.count("version") != VERSION:
        raise ValueError(f"its version is {fields.count('version')}, not {VERSION}")
    spans = [counts(span, "a span") for span in fields.items("spans")]
    return PresentExtents(tuple((first, stop) for first, stop in spans), fields.texts("ties"))


def merged(spans: Iterable[Span], gap: int = 0) -> tuple[Span, ...]:
    """The same bytes as spans in order; those at most `gap` apart become one."""
    found: list[Span] = []
    for first, stop in sorted(span for span in spans if span[0] < span[1]):
        if found and first <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((first, stop))
    return tuple(found)


def without(wanted: Sequence[Span], present: Sequence[Span]) -> tuple[Span, ...]:
    """The parts of `wanted` that are not `present`; both are merged."""
    found: list[Span] = []
    for first, stop in wanted:
        for begin, end in present:
            if end <= first or begin >= stop:
                continue
            if begin > first:
                found.append((first, begin))
            first = max(first, end)
        if first < stop:
            found.append((first, stop))
    return tuple(found)


def total_bytes(spans: Iterable[Span]) -> int:
    """How many bytes they are."""
    return sum(stop - first for first, stop in spans)
