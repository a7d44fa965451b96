"""The ring of a device whose calls return when their work is done: the CPU, and MPS, which has a single queue."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from rabbit_engine.storage.directio import HUGE_PAGE, PAGE, as_bytes, claim_memory
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.ring import READERS, Mark, read_chunk
from rabbit_engine.streaming.transfer.unit import Extent


class PlainRing:
    """On the CPU a chunk is read straight to its place; on other devices, or if kernels would see misaligned weights, through a
    staging buffer. Staging memory that is not used is never touched, and costs nothing.
    """

    def __init__(self, device: torch.device, nbytes: int, trace: Trace) -> None:
        self._device = device
        self._memory = claim_memory(nbytes) if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._trace = trace
        self._untouched = bytearray(b"\1") * (-(-nbytes // HUGE_PAGE) if device.type == "cpu" else 0)
        self._staging: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(READERS):
            self._staging.put(claim_memory(0))

    def pin(self, memory: torch.Tensor) -> torch.Tensor:
        """Return it unchanged: the CPU copies from any memory."""
        return memory

    def fill(self, chunk: Extent, start: int, after: Mark, name: str, lane: int) -> None:
        """Read straight into the ring if the pages are aligned, else through a staging buffer."""
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
        """At least `nbytes`. It grows as needed: of a larger buffer, huge pages would be touched whole."""
        memory = self._staging.get()
        try:
            if memory.nbytes < nbytes:
                memory = claim_memory(0)  # frees the smaller one first
                memory = claim_memory(nbytes)
            yield memory
        finally:
            self._staging.put(memory)

    def copy(self, source: torch.Tensor, start: int, after: Mark, name: str) -> None:
        """Copy synchronously."""
        del after
        self._touch(start, source.nbytes)
        with self._trace.span("copy", name, source.nbytes):
            _copy(self._memory[start : start + source.nbytes], source)

    def seal(self) -> None:
        """No mark: `fill` returns when the bytes have arrived."""

    def wait(self, mark: Mark) -> None:
        """Do nothing: the bytes have arrived."""

    def finish(self, mark: Mark) -> None:
        """Do nothing: the work is done."""

    def last_use(self) -> None:
        """Wait for launched work: MPS has a single queue."""
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
        """In huge pages, as the system allocates them."""
        return min(self._memory.nbytes, self._untouched.count(1) * HUGE_PAGE)

    def close(self) -> None:
        """Drop the memory."""
        self._untouched = bytearray()
        while not self._staging.empty():
            self._staging.get()
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy uint8 [nbytes]. On a CPU numpy does it, in the calling thread: torch would start threads for every reader, and with
    more of them than processors every operation of the model waits for them to wake (32 microseconds, 6 before)."""
    if target.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
