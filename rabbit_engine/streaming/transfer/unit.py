"""What moves as one: some weights of a module, where they lie on disk and where they go in memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from rabbit_engine.storage.directio import CHUNK_BYTES, PAGE, aligned_down, aligned_up
from rabbit_engine.storage.tensorfiles import TensorEntry, decode

SCRATCH_ALIGNMENT = 64

KERNEL_ALIGNMENT = 16
"""Weights start on a multiple of this: float32 kernels round otherwise at 8 mod 16, and equal bits are promised."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` of `path` from `offset`, into memory at `place`; `stamp` tells the file from one that replaced it.

    One that is `beside` another shares a page of memory with it.
    """

    path: Path
    offset: int
    nbytes: int
    place: int
    stamp: tuple[int, int] | None = None
    beside: bool = False

    @property
    def in_pages(self) -> bool:
        """Whether whole pages of the file can be read to where they go; else they go through a staging buffer."""
        return self.place % PAGE == self.offset % PAGE and not self.beside

    @property
    def read_bytes(self) -> int:
        """What a read of it asks the disk for: whole pages."""
        return aligned_up(self.offset + self.nbytes) - aligned_down(self.offset)


@dataclass(frozen=True, slots=True)
class UnitWeight:
    """One weight of a unit: where the tensors that it is stored as start in the unit's memory."""

    entry: TensorEntry
    places: tuple[int, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """A weight that is not encoded in `memory` (uint8 [unit.nbytes]), without a copy."""
        return _view(memory, self.entry, self.places[0])

    def decode(self, memory: torch.Tensor, out: torch.Tensor) -> None:
        """Write an encoded weight to `out`, of its shape and dtype."""
        decode(self.entry, iter(self.stored_views(memory)), out)

    def stored_views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors that an encoded weight is stored as, in `memory`, without a copy."""
        return list(map(partial(_view, memory), self.entry.stored, self.places))


def _view(memory: torch.Tensor, entry: TensorEntry, place: int) -> torch.Tensor:
    return memory[place : place + entry.nbytes].view(entry.dtype).view(entry.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """A named list of extents, and the weights they hold once read. `nbytes` of memory, whole pages.

    `scratch_bytes` are what its encoded weights take once they are decoded, each from a multiple of SCRATCH_ALIGNMENT on.
    """

    name: str
    weights: tuple[UnitWeight, ...]
    extents: tuple[Extent, ...]
    nbytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without what aligns them."""
        return sum(weight.entry.nbytes for weight in self.weights)

    @property
    def is_encoded(self) -> bool:
        """Whether any of its weights is decoded before use."""
        return any(weight.entry.is_encoded for weight in self.weights)

    @property
    def encoded(self) -> tuple[UnitWeight, ...]:
        """Those of its weights that are decoded before use."""
        return tuple(weight for weight in self.weights if weight.entry.is_encoded)

    @property
    def scratch_bytes(self) -> int:
        """Whole pages for its encoded weights once they are decoded."""
        return _decoded_bytes(self.encoded)

    def work_bytes(self, device: torch.device) -> int:
        """Bytes of temporaries while its weights are decoded on `device`, one at a time."""
        return max((weight.entry.work_bytes(device) for weight in self.encoded), default=0)

    @property
    def decoded_bytes(self) -> int:
        """Whole pages for all its weights, decoded, each from a multiple of SCRATCH_ALIGNMENT on."""
        return _decoded_bytes(self.weights)

    def scratch_views(self, scratch: torch.Tensor) -> list[torch.Tensor]:
        """Where its encoded weights are decoded to in `scratch` (uint8 [scratch_bytes] or more), in their order."""
        return _decoded_views(self.encoded, scratch)

    def decode_encoded(self, memory: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
        """Write the encoded weights of the unit that lies in `memory` (uint8 [nbytes]) to their `views`."""
        for weight, out in zip(self.encoded, views, strict=True):
            weight.decode(memory, out)

    def decode(self, memory: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        """Every weight of the unit that lies in `memory` (uint8 [nbytes]), in `out` (uint8 [decoded_bytes])."""
        found = _decoded_views(self.weights, out)
        for weight, tensor in zip(self.weights, found, strict=True):
            if weight.entry.is_encoded:
                weight.decode(memory, tensor)
            else:
                tensor.copy_(weight.view(memory))
        return found

    @property
    def read_bytes(self) -> int:
        """Bytes that a read of the unit asks the disk for: whole pages of its files."""
        return sum(extent.read_bytes for extent in self.extents)

    def chunks(self) -> tuple[Extent, ...]:
        """The extents cut into reads of at most CHUNK_BYTES, at page boundaries of the file."""
        return tuple(chunk for extent in self.extents for chunk in _cut(extent))

    def staged_chunks(self) -> tuple[Extent, ...]:
        """Those of them that go through a staging buffer, also on a CPU."""
        return tuple(chunk for extent in self.extents if not extent.in_pages for chunk in _cut(extent))


def _decoded_bytes(weights: Iterable[UnitWeight]) -> int:
    return aligned_up(sum(_padded(weight.entry.decoded_bytes) for weight in weights))


def _decoded_views(weights: Iterable[UnitWeight], memory: torch.Tensor) -> list[torch.Tensor]:
    """Where each weight lies in `memory`, decoded, one behind another."""
    found, place = [], 0
    for entry in (weight.entry for weight in weights):
        found.append(memory[place : place + entry.decoded_bytes].view(entry.dtype).view(entry.shape))
        place += _padded(entry.decoded_bytes)
    return found


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % SCRATCH_ALIGNMENT


def _cut(extent: Extent) -> Iterator[Extent]:
    position, end = extent.offset, extent.offset + extent.nbytes
    while position < end:
        stop = min(end, aligned_down(position) + CHUNK_BYTES)
        yield replace(extent, offset=position, nbytes=stop - position, place=extent.place + position - extent.offset)
        position = stop


def make_unit(name: str, entries: Sequence[TensorEntry]) -> Unit:
    """Lay the weights out so that each starts on a 16-byte boundary (one that is decoded: on its dtype's), and neighbours on
    disk become one read.

    An extent lies in memory as it lies in its file's pages where that aligns its weights, so that it is read without a copy.
    The parts of a weight that is stored in several places come to lie one behind another.
    """
    places: dict[TensorEntry, int] = {}
    extents: list[Extent] = []
    end = 0
    alignments = {tensor: _alignment(entry, tensor) for entry in entries for tensor in entry.stored}
    for entry, alignment in sorted(alignments.items(), key=lambda item: _on_disk(item[0])):
        first, *others = entry.places
        grown = _grown(extents[-1], first, alignment) if extents else None
        if grown is not None:
            extents[-1] = grown
            place = grown.place + first.offset - grown.offset
        else:
            place = aligned_up(end) + (0 if first.offset % alignment else first.offset % PAGE)
            extents.append(_extent(first, place))
        places[entry] = place
        end = place + first.nbytes
        for part in others:
            _append(extents, part, end)
            end += part.nbytes
    weights = (UnitWeight(entry, tuple(places[tensor] for tensor in entry.stored)) for entry in sorted(entries, key=_on_disk))
    return Unit(name, tuple(weights), tuple(extents), aligned_up(end))


def _on_disk(entry: TensorEntry) -> tuple[str, int, str]:
    return str(entry.path), entry.offset, entry.name


def _alignment(weight: TensorEntry, tensor: TensorEntry) -> int:
    """Of a stored tensor of a weight: kernels see those that are not decoded."""
    return tensor.dtype.itemsize if weight.is_encoded else KERNEL_ALIGNMENT


def _extent(entry: TensorEntry, place: int) -> Extent:
    return Extent(entry.path, entry.offset, entry.nbytes, place, entry.stamp)


def _grown(last: Extent, entry: TensorEntry, alignment: int) -> Extent | None:
    """`last` with `entry` in it, where it follows in the same file and comes to lie aligned; else None."""
    gap = entry.offset - (last.offset + last.nbytes)
    aligned = (last.place + entry.offset - last.offset) % alignment == 0
    if (last.path, last.stamp) != (entry.path, entry.stamp) or not 0 <= gap < PAGE or not aligned:
        return None
    return replace(last, nbytes=entry.offset + entry.nbytes - last.offset)


def _append(extents: list[Extent], part: TensorEntry, place: int) -> None:
    """Add `part`, which must lie at `place`: to the last extent where it follows that in its file, else as one of its own.

    What it and the last extent have in one page of memory is split off from each: a read of whole pages would spoil the other.
    """
    last, following = extents[-1], _extent(part, place)
    if (last.path, last.stamp) == (part.path, part.stamp) and part.offset - last.offset == place - last.place == last.nbytes:
        extents[-1] = replace(last, nbytes=last.nbytes + part.nbytes)
        return
    shared = place % PAGE
    if shared and last.in_pages:
        extents[-1:] = _halves(last, last.nbytes - shared, beside=1)
    extents += _halves(following, PAGE - shared, beside=0) if shared and following.in_pages else [following]


def _halves(extent: Extent, nbytes: int, *, beside: int) -> list[Extent]:
    """The extent cut behind `nbytes`, its half number `beside` (0 or 1) marked so; one half where there is nothing to cut."""
    if nbytes <= 0 or nbytes >= extent.nbytes:
        return [replace(extent, beside=True)]
    rest = replace(extent, offset=extent.offset + nbytes, nbytes=extent.nbytes - nbytes, place=extent.place + nbytes)
    halves = [replace(extent, nbytes=nbytes), rest]
    halves[beside] = replace(halves[beside], beside=True)
    return halves


def row_blocks(entry: TensorEntry, most_bytes: int) -> list[tuple[int, int, TensorEntry]]:
    """A matrix cut by rows: `(first row, row behind the last, the rows as a weight of their own)`, each at most `most_bytes`.

    Blocks are of about equal size. A row, or rows that are encoded together, may be larger.
    """
    rows, together = entry.shape[0], entry.rows_together
    groups = rows // together
    count = -(-groups // max(1, most_bytes // (entry.nbytes // groups)))
    bounds = [groups * index // count * together for index in range(count + 1)]
    return [(first, stop, entry.rows(first, stop)) for first, stop in pairwise(bounds)]
