"""The memory that weights pass through, claimed once: on the CPU one buffer a slot, elsewhere a host and a device buffer."""

from __future__ import annotations

from typing import Protocol

import torch

from rabbit_engine.errors import DamagedShardError
from rabbit_engine.streaming.unit import Unit
from rabbit_engine.tensorfiles import as_bytes, open_unchanged, read_into


class Slots(Protocol):
    """Slots of a device. `fill` is called by the reader's thread, the rest by the thread that runs the model."""

    def fill(self, index: int, unit: Unit) -> None:
        """Bring `unit` into slot `index`; on return it may still be on its way."""

    def wait(self, index: int) -> torch.Tensor:
        """The slot's bytes, uint8 [slot bytes]; what is launched after this call sees the unit."""

    def free(self, index: int) -> None:
        """What was launched before this call is the slot's last use."""

    def close(self) -> None:
        """Let go of the memory once nothing uses it."""


def claim_slots(device: torch.device, count: int, nbytes: int) -> Slots:
    """`count` slots of `nbytes` on `device`."""
    if device.type == "cuda":
        return CudaSlots(device, count, nbytes)
    return HostSlots(count, nbytes) if device.type == "cpu" else StagedSlots(device, count, nbytes)


def read_unit(unit: Unit, buffer: memoryview) -> None:
    """Read a unit's extents into `buffer`. Raises DamagedShardError or OSError."""
    for extent in unit.extents:
        with open_unchanged(extent.path, extent.stamp, DamagedShardError) as file:
            file.seek(extent.offset)
            read_into(file, buffer[extent.slot_offset : extent.slot_offset + extent.nbytes], extent.path, DamagedShardError)


class HostSlots:
    """Read where the model computes: no copy."""

    def __init__(self, count: int, nbytes: int) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device="cpu") for _ in range(count)]

    def fill(self, index: int, unit: Unit) -> None:
        """Read into the slot."""
        read_unit(unit, as_bytes(self._buffers[index]))

    def wait(self, index: int) -> torch.Tensor:
        """The slot; `fill` has returned, so the bytes are there."""
        return self._buffers[index]

    def free(self, index: int) -> None:
        """Nothing runs behind the CPU's back."""

    def close(self) -> None:
        """Drop the buffers."""
        self._buffers.clear()


class StagedSlots:
    """Read into host memory, then copy and wait: for devices without streams of their own (MPS)."""

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        self._host = [torch.empty(nbytes, dtype=torch.uint8, device="cpu") for _ in range(count)]
        self._device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]

    def fill(self, index: int, unit: Unit) -> None:
        """Read, and copy."""
        read_unit(unit, as_bytes(self._host[index]))
        self._device[index].copy_(self._host[index])

    def wait(self, index: int) -> torch.Tensor:
        """The slot; the copy is done."""
        return self._device[index]

    def free(self, index: int) -> None:
        """Let what uses slot `index` finish before the reader overwrites it."""
        del index  # MPS waits for everything
        torch.mps.synchronize()

    def close(self) -> None:
        """Drop the buffers."""
        self._host.clear()
        self._device.clear()


class CudaSlots:
    """Pinned host slots, a stream of their own for the copies, an event for every reuse."""

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        self._device = device
        self._host = [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(count)]
        self._slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(count)]
        self._used = [torch.cuda.Event() for _ in range(count)]
        torch.cuda.synchronize(device)  # the slots' memory may be another stream's until now

    def fill(self, index: int, unit: Unit) -> None:
        """Read into the host slot once its last copy has left, then copy once the device slot's last use has ended."""
        self._copied[index].synchronize()
        read_unit(unit, as_bytes(self._host[index]))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[index])
            self._slots[index][: unit.nbytes].copy_(self._host[index][: unit.nbytes], non_blocking=True)
            self._copied[index].record(self._stream)

    def wait(self, index: int) -> torch.Tensor:
        """The device slot; the current stream waits for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._copied[index])
        return self._slots[index]

    def free(self, index: int) -> None:
        """Mark the current stream's position as the slot's last use."""
        self._used[index].record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Wait for the device, then drop the buffers."""
        torch.cuda.synchronize(self._device)
        self._host.clear()
        self._slots.clear()
