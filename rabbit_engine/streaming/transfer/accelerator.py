"""What a device that copies while it computes provides: memory, streams and events; torch's own for any accelerator."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work, set by `record`; one that was never recorded has passed."""

    def record(self, stream: Any) -> None:
        """Mark the end of all work given to `stream` so far, replacing the previous mark."""

    def synchronize(self) -> None:
        """Return when the work before it is done."""


class Stream(Protocol):
    """A queue of work that a device does in order, in parallel with its other queues."""

    def wait_event(self, event: Any) -> None:
        """Make work launched from now on wait for the work before `event`."""


class Accelerator(Protocol):
    """One device. `torch.Stream` and `torch.Event` are the streams and events of a real one."""

    @property
    def device(self) -> torch.device:
        """The device of tensors in its memory."""
        ...

    def claim(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of its memory, which work given to the current stream earlier may still use."""

    def new_stream(self) -> Stream:
        """A stream of its own for the caller."""

    def new_event(self) -> Event:
        """An event without timing."""

    def current_stream(self) -> Stream:
        """The stream of this thread's kernels."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Launch a copy from host memory in `stream`, which reads `source` when it runs."""

    def synchronize(self) -> None:
        """Return when the work of all streams is done."""

    def pin(self, memory: torch.Tensor) -> None:
        """Page-lock host memory, so that copies from it do not involve the CPU."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`; no copy from it may be under way."""


class TorchAccelerator:
    """A device of `torch.accelerator`: CUDA, ROCm, XPU and others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    def claim(self, nbytes: int) -> torch.Tensor:
        """Allocate from torch's allocator."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def new_stream(self) -> torch.Stream:
        """A stream from the device's pool."""
        return torch.Stream(self._device)

    def new_event(self) -> torch.Event:
        """An event of the device's kind."""
        return torch.Event(self._device, enable_timing=False)

    def current_stream(self) -> torch.Stream:
        """This thread's."""
        return torch.accelerator.current_stream(self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Make `stream` current only for the launch: `with stream:` keeps its state in the stream, for one thread at a time."""
        before = torch.accelerator.current_stream(self._device)
        torch.accelerator.set_stream(stream)
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.accelerator.set_stream(before)

    def synchronize(self) -> None:
        """Wait for the whole device."""
        torch.accelerator.synchronize(self._device)

    def pin(self, memory: torch.Tensor) -> None:
        """Do nothing: torch only pins memory that it allocated. Copies are correct without pinning, but slower."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Do nothing: nothing was pinned."""
