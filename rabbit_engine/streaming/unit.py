"""What moves as one: the weights of a module, where they lie on disk and where they go in a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rabbit_engine.tensorfiles import ALIGNMENT, TensorEntry


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` of `path` from `offset`, into a slot at `slot_offset`; `stamp` tells the file from one that replaced it."""

    path: Path
    offset: int
    nbytes: int
    slot_offset: int
    stamp: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One weight of a unit: a view of its slot."""

    entry: TensorEntry
    slot_offset: int

    def view(self, slot: torch.Tensor) -> torch.Tensor:
        """The weight in `slot` (uint8 [slot bytes]), without a copy."""
        flat = slot[self.slot_offset : self.slot_offset + self.entry.nbytes]
        return flat.view(self.entry.dtype).view(self.entry.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """A named list of extents, and the weights they hold once read."""

    name: str
    pieces: tuple[Piece, ...]
    extents: tuple[Extent, ...]
    nbytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without what aligns them."""
        return sum(piece.entry.nbytes for piece in self.pieces)


def make_unit(name: str, entries: Sequence[TensorEntry]) -> Unit:
    """Lay the weights out in a slot, each on a 4,096-byte boundary; neighbours on disk become one read."""
    pieces: list[Piece] = []
    extents: list[Extent] = []
    end = 0
    for entry in sorted(entries, key=lambda e: (str(e.path), e.offset)):
        last = extents[-1] if extents else None
        gap = entry.offset - (last.offset + last.nbytes) if last and last.path == entry.path else None
        if last is not None and gap is not None and 0 <= gap < ALIGNMENT:
            extents[-1] = replace(last, nbytes=last.nbytes + gap + entry.nbytes)
            start = last.slot_offset + entry.offset - last.offset
        else:
            start = end + -end % ALIGNMENT
            extents.append(Extent(entry.path, entry.offset, entry.nbytes, start, entry.stamp))
        pieces.append(Piece(entry, start))
        end = start + entry.nbytes
    return Unit(name, tuple(pieces), tuple(extents), end + -end % ALIGNMENT)
