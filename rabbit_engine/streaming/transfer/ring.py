"""The memory that weights pass through, allocated once: on the device that computes, and in host memory ahead of it.

Reader threads call `fill`, `copy` and `seal`; the model's thread calls `wait` and `last_use`.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from rabbit_engine.errors import DamagedShardError
from rabbit_engine.storage.directio import CHUNK_BYTES, PAGE, damage_as, is_direct, read_pages
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.accelerator import Event
from rabbit_engine.streaming.transfer.unit import Extent, Unit

READERS = 6
"""Reads under way at once: four saturate the disks we measured, and two more may be copying."""

STAGING_BYTES = CHUNK_BYTES + 2 * PAGE

STREAM_BUFFERS = 2 * READERS
"""Staging buffers of a device that copies while it computes: one is read into while another is copied from."""

Mark = Event | None
"""A point in a device's work: an event, or None if calls return when the work is done."""


class Ring(Protocol):
    """A device's ring of bytes, and how to fill it."""

    def pin(self, memory: torch.Tensor) -> torch.Tensor:
        """Host `memory` that `copy` reads until the ring is closed, page-locked if the device needs that."""

    def fill(self, chunk: Extent, start: int, after: Mark, name: str, lane: int) -> None:
        """Read `chunk` to `start + chunk.place`, not before `after`; it may still be in transit on return."""

    def copy(self, source: torch.Tensor, start: int, after: Mark, name: str) -> None:
        """Copy a unit from host memory to `start`, not before `after`."""

    def seal(self) -> Mark:
        """The mark after everything filled and copied so far."""

    def wait(self, mark: Mark) -> None:
        """Make work launched after this call see what was written before `mark`."""

    def finish(self, mark: Mark) -> None:
        """Return when the work before `mark` is done."""

    def last_use(self) -> Mark:
        """The mark after everything launched so far."""

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of the ring."""

    @property
    def untouched_bytes(self) -> int:
        """Allocated bytes that take no memory until they are first written."""
        ...

    def close(self) -> None:
        """Free the memory once nothing uses it."""


@damage_as(DamagedShardError)
def read_chunk(chunk: Extent, memory: memoryview, trace: Trace, name: str, lane: int) -> None:
    """Read a chunk's pages into `memory`, past the page cache if possible. Raises DamagedShardError or OSError."""
    direct = is_direct(chunk.path)
    with trace.span(f"disk {lane}", name, chunk.nbytes):
        read_pages(chunk.path, chunk.stamp, chunk.offset, chunk.nbytes, memory, direct=direct)


def fill_all(ring: Ring, units: Sequence[tuple[Unit, int]]) -> None:
    """Read each unit to its start in the ring, synchronously, with as many reads at once as the readers have."""
    chunks = [(chunk, start, unit.name) for unit, start in units for chunk in unit.chunks()]
    lanes: queue.SimpleQueue[int] = queue.SimpleQueue()
    for lane in range(READERS):
        lanes.put(lane)

    def fill(chunk: Extent, start: int, name: str) -> None:
        lane = lanes.get()
        try:
            ring.fill(chunk, start, None, name, lane)
        finally:
            lanes.put(lane)

    with ThreadPoolExecutor(READERS, thread_name_prefix="rabbit-loader") as pool:
        for done in [pool.submit(fill, *chunk) for chunk in chunks]:
            done.result()
    ring.finish(ring.seal())  # not `wait`: any stream may use them
