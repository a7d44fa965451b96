"""What moves as one: some weights of a module, where they lie on disk and where they go in memory. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from rabbit_engine.directio import CHUNK_BYTES, PAGE, aligned_down, aligned_up
from rabbit_engine.tensorfiles import TensorEntry

KERNEL_ALIGNMENT = 16
"""Weights start on a multiple of this: float32 kernels round otherwise at 8 mod 16, and equal bits are promised."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` of `path` from `offset`, into memory at `place`; `stamp` tells the file from one that replaced it."""

    path: Path
    offset: int
    nbytes: int
    place: int
    stamp: tuple[int, int] | None = None

    @property
    def in_pages(self) -> bool:
        """Whether whole pages of the file can be read to where they go; else they go through a staging buffer."""
        return self.place % PAGE == self.offset % PAGE

    @property
    def read_bytes(self) -> int:
        """What a read of it asks the disk for: whole pages."""
        return aligned_up(self.offset + self.nbytes) - aligned_down(self.offset)


@dataclass(frozen=True, slots=True)
class Piece:
    """One weight of a unit: a view of its memory."""

    entry: TensorEntry
    place: int

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The weight in `memory` (uint8 [unit.nbytes]), without a copy."""
        flat = memory[self.place : self.place + self.entry.nbytes]
        return flat.view(self.entry.dtype).view(self.entry.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """A named list of extents, and the weights they hold once read. `nbytes` of memory, whole pages."""

    name: str
    pieces: tuple[Piece, ...]
    extents: tuple[Extent, ...]
    nbytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without what aligns them."""
        return sum(piece.entry.nbytes for piece in self.pieces)

    @property
    def read_bytes(self) -> int:
        """Bytes that a read of the unit asks the disk for: whole pages of its files."""
        return sum(extent.read_bytes for extent in self.extents)

    def chunks(self) -> tuple[Extent, ...]:
        """The extents cut into reads of at most CHUNK_BYTES, at page boundaries of the file."""
        return tuple(chunk for extent in self.extents for chunk in _cut(extent))


def _cut(extent: Extent) -> Iterator[Extent]:
    position, end = extent.offset, extent.offset + extent.nbytes
    while position < end:
        stop = min(end, aligned_down(position) + CHUNK_BYTES)
        yield replace(extent, offset=position, nbytes=stop - position, place=extent.place + position - extent.offset)
        position = stop


def make_unit(name: str, entries: Sequence[TensorEntry]) -> Unit:
    """Lay the weights out so that each starts on a 16-byte boundary, and neighbours on disk become one read.

    An extent lies in memory as it lies in its file's pages where that aligns its weights, so that it is read without a copy.
    """
    pieces: list[Piece] = []
    extents: list[Extent] = []
    end = 0
    for entry in sorted(entries, key=lambda e: (str(e.path), e.offset)):
        last = extents[-1] if extents else None
        grown = _grown(last, entry) if last is not None else None
        if last is not None and grown is not None:
            extents[-1] = grown
            place = grown.place + entry.offset - grown.offset
        else:
            place = aligned_up(end) + (0 if entry.offset % KERNEL_ALIGNMENT else entry.offset % PAGE)
            extents.append(Extent(entry.path, entry.offset, entry.nbytes, place, entry.stamp))
        pieces.append(Piece(entry, place))
        end = place + entry.nbytes
    return Unit(name, tuple(pieces), tuple(extents), aligned_up(end))


def _grown(last: Extent, entry: TensorEntry) -> Extent | None:
    """`last` with `entry` in it, where it follows in the same file and comes to lie on a boundary; else None."""
    gap = entry.offset - (last.offset + last.nbytes)
    aligned = (last.place + entry.offset - last.offset) % KERNEL_ALIGNMENT == 0
    if last.path != entry.path or not 0 <= gap < PAGE or not aligned:
        return None
    return replace(last, nbytes=entry.offset + entry.nbytes - last.offset)


def row_blocks(entry: TensorEntry, most_bytes: int) -> list[tuple[int, int, TensorEntry]]:
    """A matrix cut by rows: `(first row, row behind the last, the rows as a weight of their own)`, each at most `most_bytes`.

    Blocks are of about equal size; a row that is larger than `most_bytes` is a block.
    """
    rows = entry.shape[0]
    row_bytes = entry.nbytes // rows
    count = -(-rows // max(1, most_bytes // row_bytes))
    bounds = [rows * index // count for index in range(count + 1)]
    return [
        (
            first,
            stop,
            replace(
                entry,
                name=f"{entry.name}[{first}:{stop}]",
                offset=entry.offset + first * row_bytes,
                nbytes=(stop - first) * row_bytes,
                shape=(stop - first, *entry.shape[1:]),
            ),
        )
        for first, stop in pairwise(bounds)
    ]
