"""What a device that copies while it computes offers: memory, streams, events. torch's own, for any accelerator of its."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work, set by `record`; one that was never recorded is passed already."""

    def record(self, stream: Any) -> None:
        """Stand behind everything that `stream` was given so far, and nowhere else any more."""

    def synchronize(self) -> None:
        """Return when the work before it is done."""


class Stream(Protocol):
    """A queue of work that a device does in order, beside its other queues."""

    def wait_event(self, event: Any) -> None:
        """Begin what is launched from now on when the work before `event` is done."""


class Accelerator(Protocol):
    """One device. `torch.Stream` and `torch.Event` are the streams and events of a real one."""

    @property
    def device(self) -> torch.device:
        """Where tensors in its memory say that they are."""
        ...

    def claim(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of its memory, which work of the current stream may still use that was given it before."""

    def new_stream(self) -> Stream:
        """A stream that nobody else uses."""

    def new_event(self) -> Event:
        """An event that keeps no time."""

    def current_stream(self) -> Stream:
        """Where this thread's kernels go."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Launch a copy from host memory in `stream`; `source` is read when its turn comes."""

    def synchronize(self) -> None:
        """Return when the work of all streams is done."""

    def pin(self, memory: torch.Tensor) -> None:
        """Page-lock host memory, so that copies from it need no help of the CPU."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`; no copy from it may be under way."""


class TorchAccelerator:
    """A device as `torch.accelerator` has it: CUDA, ROCm, XPU and others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def device(self) -> torch.device:
        """The device itself."""
        return self._device

    def claim(self, nbytes: int) -> torch.Tensor:
        """From torch's allocator."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def new_stream(self) -> torch.Stream:
        """One of the device's pool."""
        return torch.Stream(self._device)

    def new_event(self) -> torch.Event:
        """Of the device's kind."""
        return torch.Event(self._device, enable_timing=False)

    def current_stream(self) -> torch.Stream:
        """This thread's."""
        return torch.accelerator.current_stream(self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Make `stream` current for the launch alone: `with stream:` keeps its state in the stream, for one thread at a time."""
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
        """Nothing: torch pins memory of its own alone. Copies are right without, and slower."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Nothing was pinned."""
