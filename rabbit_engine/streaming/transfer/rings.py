"""The memory that weights pass through, claimed once: where the model computes, and what stands before it.

On the CPU a chunk is read straight into the ring. Elsewhere, and where a file's bytes lie so that kernels would see
misaligned weights, it is read into a staging buffer and copied to its place. Readers' threads call `fill`, `copy` and
`seal`; the thread that runs the model calls `wait` and `last_use`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rabbit_engine.errors import DamagedShardError
from rabbit_engine.storage.directio import CHUNK_BYTES, HUGE_PAGE, PAGE, as_bytes, buffered_reason, claim_memory, read_pages
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.unit import Extent, Unit

READERS = 6
"""Reads under way at once: four fill the disks that were measured, and two may be copying to their place."""

STAGING_BYTES = CHUNK_BYTES + 2 * PAGE

Mark = Any
"""A point in a device's work: a CUDA event, or None where calls return when the work is done."""


class Ring(Protocol):
    """A device's ring of bytes, and the way into it."""

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


def claim_ring(device: torch.device, nbytes: int, trace: Trace) -> Ring:
    """A ring of `nbytes` on `device`."""
    return CudaRing(device, nbytes, trace) if device.type == "cuda" else PlainRing(device, nbytes, trace)


def read_chunk(chunk: Extent, memory: memoryview, trace: Trace, name: str, lane: int) -> None:
    """Read a chunk's pages into `memory`, past the page cache where that works. Raises DamagedShardError or OSError."""
    direct = buffered_reason(chunk.path) is None
    with trace.span(f"disk {lane}", name, chunk.nbytes):
        read_pages(chunk.path, chunk.stamp, chunk.offset, chunk.nbytes, memory, DamagedShardError, direct=direct)


class PlainRing:
    """For the CPU, and for devices without streams of their own (MPS): every call returns when its work is done.

    Memory that no read needs staging for is never touched, so it costs nothing.
    """

    def __init__(self, device: torch.device, nbytes: int, trace: Trace) -> None:
        self._device = device
        self._memory = claim_memory(nbytes) if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._trace = trace
        self._untouched = bytearray(b"\1") * (-(-nbytes // HUGE_PAGE) if device.type == "cpu" else 0)
        self._staging: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(READERS):
            self._staging.put(claim_memory(0))

    def fill(self, chunk: Extent, start: int, after: Mark, name: str, lane: int) -> None:
        """Straight into the ring where the pages lie right, else through a staging buffer."""
        del after
        self._touch(start + chunk.place, chunk.nbytes)
        if self._device.type == "cpu" and chunk.in_pages:
            place = start + chunk.place - chunk.offset % PAGE
            read_chunk(chunk, as_bytes(self._memory)[place:], self._trace, name, lane)
            return
        with self._staging_of(chunk.read_bytes) as memory:
            read_chunk(chunk, as_bytes(memory), self._trace, name, lane)
            inside = chunk.offset % PAGE
            self.copy(memory[inside : inside + chunk.nbytes], start + chunk.place, None, name)

    @contextmanager
    def _staging_of(self, nbytes: int) -> Iterator[torch.Tensor]:
        """`nbytes` or more. It grows to what is read through it: of a larger one, huge pages would be touched whole."""
        memory = self._staging.get()
        try:
            if memory.nbytes < nbytes:
                memory = claim_memory(0)  # lets go of the smaller one first
                memory = claim_memory(nbytes)
            yield memory
        finally:
            self._staging.put(memory)

    def copy(self, source: torch.Tensor, start: int, after: Mark, name: str) -> None:
        """Copy, and wait for it."""
        del after
        self._touch(start, source.nbytes)
        with self._trace.span("copy", name, source.nbytes):
            self._memory[start : start + source.nbytes].copy_(source)

    def seal(self) -> Mark:
        """`fill` returns when the bytes are there."""
        return None

    def wait(self, mark: Mark) -> None:
        """They are there."""

    def finish(self, mark: Mark) -> None:
        """It is done."""

    def last_use(self) -> Mark:
        """Let what was launched finish: MPS has one queue for everything."""
        if self._device.type == "mps":
            torch.mps.synchronize()

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """The ring's own bytes."""
        return self._memory[start : start + nbytes]

    def _touch(self, start: int, nbytes: int) -> None:
        first, stop = start // HUGE_PAGE, -(-(start + nbytes) // HUGE_PAGE)
        if self._untouched:
            self._untouched[first:stop] = bytes(stop - first)

    @property
    def untouched_bytes(self) -> int:
        """By huge pages, as the system gives them."""
        return min(self._memory.nbytes, self._untouched.count(1) * HUGE_PAGE)

    def close(self) -> None:
        """Drop the memory."""
        self._untouched = bytearray()
        while not self._staging.empty():
            self._staging.get()
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(slots=True)
class _Staging:
    memory: torch.Tensor
    left: torch.cuda.Event


class CudaRing:
    """Pinned staging buffers, a stream of their own for the copies, an event for every reuse."""

    def __init__(self, device: torch.device, nbytes: int, trace: Trace) -> None:
        self._device = device
        self._trace = trace
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._pinned = [pin(claim_memory(STAGING_BYTES)) for _ in range(2 * READERS)]
        self._staging: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        for memory in self._pinned:
            self._staging.put(_Staging(memory, torch.cuda.Event()))
        torch.cuda.synchronize(device)  # the ring's memory may be another stream's until now

    def fill(self, chunk: Extent, start: int, after: Mark, name: str, lane: int) -> None:
        """Read into the staging buffer whose last copy left longest ago, and launch its copy."""
        staging = self._staging.get()
        try:
            staging.left.synchronize()
            read_chunk(chunk, as_bytes(staging.memory), self._trace, name, lane)
            inside = chunk.offset % PAGE
            self.copy(staging.memory[inside : inside + chunk.nbytes], start + chunk.place, after, name)
            staging.left.record(self._stream)
        finally:
            self._staging.put(staging)

    def copy(self, source: torch.Tensor, start: int, after: Mark, name: str) -> None:
        """Launch a copy from pinned memory, behind `after`."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            with self._traced(name, source.nbytes):
                self._memory[start : start + source.nbytes].copy_(source, non_blocking=True)

    @contextmanager
    def _traced(self, name: str, nbytes: int) -> Iterator[None]:
        if not self._trace.on:
            yield
            return
        begin = self._trace.device_mark(self._stream)
        yield
        self._trace.add("copy", name, begin, self._trace.device_mark(self._stream), nbytes)

    def seal(self) -> Mark:
        """An event behind the copies launched so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        """The current stream waits for the copies."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """This thread waits for the event."""
        if mark is not None:
            mark.synchronize()

    def last_use(self) -> Mark:
        """An event behind what the current stream was given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """The ring's own bytes."""
        return self._memory[start : start + nbytes]

    @property
    def untouched_bytes(self) -> int:
        """A device's memory is taken when it is claimed."""
        return 0

    def close(self) -> None:
        """Wait for the device, then drop the memory."""
        torch.cuda.synchronize(self._device)
        while not self._staging.empty():
            self._staging.get()
        for memory in self._pinned:
            unpin(memory)
        self._pinned.clear()
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")


def pin(memory: torch.Tensor) -> torch.Tensor:
    """Page-lock memory that is there, to the byte: torch's own pinned allocator rounds up to powers of two."""
    if memory.numel():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    return memory


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`."""
    if memory.numel():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


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
    ring.wait(ring.seal())
