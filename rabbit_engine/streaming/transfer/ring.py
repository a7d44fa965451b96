"""The memory that weights pass through, claimed once: where the model computes, and what stands before it.

Readers' threads call `fill`, `copy` and `seal`; the thread that runs the model calls `wait` and `last_use`.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from rabbit_engine.errors import DamagedShardError
from rabbit_engine.storage.directio import CHUNK_BYTES, PAGE, damage_as, is_direct, read_pages
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.unit import Extent, Unit

READERS = 6
"""Reads under way at once: four fill the disks that were measured, and two may be copying to their place."""

STAGING_BYTES = CHUNK_BYTES + 2 * PAGE

Mark = Any
"""A point in a device's work: an event, or None where calls return when the work is done."""


class Ring(Protocol):
    """A device's ring of bytes, and the way into it."""

    def pin(self, memory: torch.Tensor) -> torch.Tensor:
        """`memory` of the host, from which `copy` copies until the ring is closed, page-locked where the device needs that."""

    def fill(self, chunk: Extent, start: int, after: Mark, name: str, lane: int) -> None:
        """Read `chunk` to `start + chunk.place`, not before `after`; on return it may still be on its way."""

    def copy(self, source: torch.Tensor, start: int, after: Mark, name: str) -> None:
        """Copy a unit that waits in host memory to `start`, not before `after`."""

    def seal(self) -> Mark:
        """The mark behind everything that was filled and copied so far."""

    def wait(self, mark: Mark) -> None:
        """What is launched after this call sees what lies before `mark`."""

    def finish(self, mark: Mark) -> None:
        """Return when what lies before `mark` is done."""

    def last_use(self) -> Mark:
        """The mark behind everything that was launched so far."""

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of the ring."""

    @property
    def untouched_bytes(self) -> int:
        """What was claimed, but takes no memory until it is first written."""
        ...

    def close(self) -> None:
        """Let go of the memory once nothing uses it."""


@damage_as(DamagedShardError)
def read_chunk(chunk: Extent, memory: memoryview, trace: Trace, name: str, lane: int) -> None:
    """Read a chunk's pages into `memory`, past the page cache where that works. Raises DamagedShardError or OSError."""
    direct = is_direct(chunk.path)
    with trace.span(f"disk {lane}", name, chunk.nbytes):
        read_pages(chunk.path, chunk.stamp, chunk.offset, chunk.nbytes, memory, direct=direct)


def fill_all(ring: Ring, units: Sequence[tuple[Unit, int]]) -> None:
    """Read each unit to its start in the ring, here and now, as many reads at once as the readers have."""
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
