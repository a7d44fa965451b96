"""The ring of a device that copies while it computes: work is launched asynchronously, and marks order it.

A chunk is read into a pinned staging buffer and copied from there, in the ring's own stream. A copy waits for the last use
of the bytes it overwrites; a computation waits for the copies of the bytes it reads.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass

import torch

from rabbit_engine.storage.directio import PAGE, as_bytes, claim_memory
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.accelerator import Accelerator, Event, Stream
from rabbit_engine.streaming.transfer.ring import STAGING_BYTES, STREAM_BUFFERS, Mark, read_chunk
from rabbit_engine.streaming.transfer.unit import Extent


@dataclass(slots=True)
class _Staging:
    """A pinned buffer; `left` is the mark after the last copy from it."""

    memory: torch.Tensor
    left: Event


class StreamRing:
    """`nbytes` of an accelerator, and STREAM_BUFFERS staging buffers."""

    def __init__(self, accelerator: Accelerator, nbytes: int, trace: Trace) -> None:
        self._accelerator, self._trace = accelerator, trace
        self._memory = accelerator.claim(nbytes)
        self._copies = accelerator.new_stream()
        self._pinned: list[torch.Tensor] = []
        self._staging: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        self._used: tuple[Stream, Event] | None = None
        try:
            for _ in range(STREAM_BUFFERS):
                self._staging.put(_Staging(self.pin(claim_memory(STAGING_BYTES)), accelerator.new_event()))
            accelerator.synchronize()  # its previous owner may still be using it
        except BaseException:
            self.close()
            raise

    def pin(self, memory: torch.Tensor) -> torch.Tensor:
        """Page-lock it until the ring is closed."""
        self._accelerator.pin(memory)
        self._pinned.append(memory)
        return memory

    def fill(self, chunk: Extent, start: int, after: Mark, name: str, lane: int) -> None:
        """Read into the staging buffer whose last copy is oldest, and launch its copy."""
        staging = self._staging.get()
        try:
            staging.left.synchronize()
            read_chunk(chunk, as_bytes(staging.memory), self._trace, name, lane)
            inside = chunk.offset % PAGE
            self.copy(staging.memory[inside : inside + chunk.nbytes], start + chunk.place, after, name)
            staging.left.record(self._copies)
        finally:
            self._staging.put(staging)

    def copy(self, source: torch.Tensor, start: int, after: Mark, name: str) -> None:
        """Launch a copy from pinned memory after `after`."""
        if after is not None:
            self._copies.wait_event(after)
        with self._trace.device_span("copy", name, self._accelerator.device, source.nbytes, self._copies):
            self._accelerator.copy(self._memory[start : start + source.nbytes], source, self._copies)

    def seal(self) -> Mark:
        """An event after the copies launched so far."""
        event = self._accelerator.new_event()
        event.record(self._copies)
        return event

    def wait(self, mark: Mark) -> None:
        """Make this thread's stream wait for the copies."""
        self._accelerator.current_stream().wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """Wait for the copies in this thread."""
        if mark is not None:
            mark.synchronize()

    def last_use(self) -> Mark:
        """An event after all work of this thread's stream so far, and after the last use in any other stream."""
        stream, event = self._accelerator.current_stream(), self._accelerator.new_event()
        if self._used is not None and self._used[0] != stream:
            stream.wait_event(self._used[1])
        event.record(stream)
        self._used = stream, event
        return event

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """The ring's own bytes."""
        return self._memory[start : start + nbytes]

    @property
    def untouched_bytes(self) -> int:
        """A device's memory is taken when it is allocated."""
        return 0

    def close(self) -> None:
        """Wait for the device, then drop the memory."""
        self._accelerator.synchronize()
        while not self._staging.empty():
            self._staging.get()
        while self._pinned:
            self._accelerator.unpin(self._pinned.pop())
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
