"""An accelerator made of host memory that does everything as late as a real one may, and detects missing waits.

It implements the interface of `streaming/transfer/accelerator.py`, like `TorchAccelerator`. Its memory is poisoned until it
is written. A copy happens when something waits for an event after it, never before. Kernels run at once, on the CPU; `Watch`
sees them, and the order of streams and events says which copies are done for which kernel. `RaceError`, with names, for

- a kernel that reads bytes whose copy it did not wait for, or that were never written;
- a copy over bytes that a kernel uses which the copy does not wait for;
- a source that changed, or was unpinned, before its copy happened, and one that is not pinned;
- host memory that is written before this thread knows that the copies from it are done (`SimulatedHost` sees that).
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.errors import BudgetError
from rabbit_engine.model.assembly import assemble
from rabbit_engine.model.loading import load
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.storage.directio import as_bytes
from rabbit_engine.streaming import Placeholder, Trace
from rabbit_engine.streaming.transfer.plain_ring import PlainRing
from rabbit_engine.streaming.transfer.stream_ring import StreamRing
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.utils.speeds import Speeds

CPU, PLANNED = torch.device("cpu"), torch.device("cuda", 0)
POISON = 0xFF
"""Bytes of it are NaN in every floating-point dtype."""


class RaceError(Exception):
    """Somebody did not wait."""


@dataclass(slots=True)
class Copy:
    """One that was launched: it is `position` in its stream, and happens after what `clock` says."""

    name: str
    position: int
    clock: Mapping[Stream, int]
    target: memoryview
    source: torch.Tensor
    launched: bytes

    def reads(self, memory: torch.Tensor) -> bool:
        start, own = memory.data_ptr(), self.source.data_ptr()
        return start < own + self.source.nbytes and own < start + memory.nbytes


class Stream:
    """Work in order. `clock` is how far each stream has come, at least, when this one's next work begins."""

    def __init__(self, device: SimulatedAccelerator, name: str, *, eager: bool) -> None:
        self.device, self.name, self.eager = device, name, eager
        self.position = 0
        self.clock: dict[Stream, int] = {}
        self.pending: list[Copy] = []
        self.happened: list[Copy] = []

    def wait_event(self, event: Event) -> None:
        with self.device.lock:
            self.device.merge(self.clock, event.clock)
            if self.eager:
                self.device.do(event.clock)


class Event:
    """A point in a stream: `clock` is how far each stream has come when it is passed."""

    def __init__(self, device: SimulatedAccelerator) -> None:
        self.device = device
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        with self.device.lock:
            stream.position += 1
            self.clock = {**stream.clock, stream: stream.position}

    def synchronize(self) -> None:
        with self.device.lock:
            self.device.do(self.clock)
            self.device.merge(self.device.done, self.clock)


class SimulatedAccelerator:
    """One device; `races` are all that were found, including those that raised nothing."""

    def __init__(self, seed: int = 0) -> None:
        self.device = CPU
        self.lock = threading.RLock()
        self.done: dict[Stream, int] = {}
        self.races: list[str] = []
        self.copies = 0
        self._streams: list[Stream] = []
        self._order = random.Random(seed)
        self._here = threading.local()
        self._default = self.add_stream("the model's stream", eager=True)
        self._pinned: list[torch.Tensor] = []
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._names: list[str] = ["nothing"]

    # The seam.

    def claim(self, nbytes: int) -> torch.Tensor:
        """Poisoned, and still in use by work that the current stream was given for the memory's previous owner."""
        self._memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._last: dict[Stream, Any] = {}  # by byte: the position of the last kernel that used it, or copy that wrote it
        self._written: dict[Stream, Any] = {}  # by byte: the position of the last kernel that wrote it
        self._named = np.zeros(nbytes, np.int32)
        stream = self.current_stream()
        stream.position += 1
        self._last[stream] = np.full(nbytes, stream.position, np.int64)
        return self._memory

    def new_stream(self) -> Stream:
        return self.add_stream(f"stream {len(self._streams)}", eager=False)

    def new_event(self) -> Event:
        return Event(self)

    def current_stream(self) -> Stream:
        stream: Stream = getattr(self._here, "stream", self._default)
        return stream

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        name, place = getattr(self._here, "name", "a copy"), self._place(target)
        with self.lock:
            if not any(memory.data_ptr() <= source.data_ptr() < memory.data_ptr() + memory.nbytes for memory in self._pinned):
                self.race(f"{name} is copied from memory that is not pinned")
            self._require_unused(name, place, stream)
            stream.position += 1
            self._names.append(name)
            self._named[place] = len(self._names) - 1
            self._positions(stream)[place] = stream.position
            as_bytes(self._memory)[place] = bytes([POISON]) * target.nbytes  # nothing may rely on the previous contents
            launched = bytes(as_bytes(source))
            stream.pending.append(Copy(name, stream.position, {**stream.clock}, as_bytes(target), source, launched))

    def synchronize(self) -> None:
        with self.lock:
            now = {stream: stream.position for stream in self._streams}
            self.do(now)
            self.merge(self.done, now)

    def pin(self, memory: torch.Tensor) -> None:
        self._pinned.append(memory)

    def unpin(self, memory: torch.Tensor) -> None:
        with self.lock:
            for copy in (copy for stream in self._streams for copy in stream.pending):
                if copy.reads(memory):
                    self.race(f"{copy.name} is still to be copied from memory that is unpinned")
            self._pinned = [other for other in self._pinned if other is not memory]

    # What it knows.

    def host_write(self, memory: torch.Tensor, name: str) -> None:
        """The host is about to write `name` to `memory`."""
        with self.lock:
            for stream in self._streams:
                known = self.done.get(stream, 0)
                stream.happened = [copy for copy in stream.happened if copy.position > known]
                for copy in (*stream.pending, *stream.happened):
                    if copy.position > known and copy.reads(memory):
                        self.race(f"{name} is read over {copy.name}, which may still be copied")

    @property
    def pending(self) -> int:
        """Copies that were launched and have not happened."""
        return sum(len(stream.pending) for stream in self._streams)

    def race(self, text: str) -> None:
        self.races.append(text)
        raise RaceError(text)

    @staticmethod
    def merge(clock: dict[Stream, int], other: Mapping[Stream, int]) -> None:
        for stream, position in other.items():
            clock[stream] = max(clock.get(stream, 0), position)

    def do(self, clock: Mapping[Stream, int]) -> None:
        """Run the copies before `clock`, in any order that keeps overlapping ones in sequence."""
        for stream, position in clock.items():
            due = [copy for copy in stream.pending if copy.position <= position]
            stream.pending = [copy for copy in stream.pending if copy.position > position]
            while due:
                copy = self._order.choice(due)
                copy = next(other for other in due if other is copy or _overlap(other, copy))
                due.remove(copy)
                self._happen(copy)
                stream.happened.append(copy)

    def _happen(self, copy: Copy) -> None:
        self.do(copy.clock)
        self.copies += 1
        now = bytes(as_bytes(copy.source))
        copy.target[:] = now
        if now != copy.launched:
            self.race(f"the source of {copy.name} changed before it was copied")

    def use(self, tensor: torch.Tensor, kernel: str) -> None:
        """A kernel of the current stream reads `tensor`, which is in this device's memory."""
        place, stream = self._place(tensor), self.current_stream()
        with self.lock:
            written = np.zeros(place.stop - place.start, np.int64)
            for other, positions in self._last.items():
                if not other.eager:
                    self._require_before(int(positions[place].max(initial=0)), other, stream, f"{kernel} reads", place)
                    written = np.maximum(written, positions[place])
            for other, positions in self._written.items():
                if other is not stream:
                    self._require_before(int(positions[place].max(initial=0)), other, stream, f"{kernel} reads", place)
                written = np.maximum(written, positions[place])
            if not written.all():
                self.race(f"{kernel} reads bytes that nothing was copied to")
            stream.position += 1
            self._positions(stream)[place] = stream.position

    def write(self, tensor: torch.Tensor, kernel: str) -> None:
        """A kernel of the current stream writes `tensor`, which is in this device's memory."""
        place, stream = self._place(tensor), self.current_stream()
        with self.lock:
            for other, positions in self._last.items():
                if other is not stream:
                    self._require_before(int(positions[place].max(initial=0)), other, stream, f"{kernel} writes", place)
            stream.position += 1
            self._positions(stream)[place] = stream.position
            if stream not in self._written:
                self._written[stream] = np.zeros(len(self._memory), np.int64)
            self._written[stream][place] = stream.position

    def holds(self, tensor: torch.Tensor) -> bool:
        return (
            tensor.device == CPU
            and tensor.numel() > 0
            and tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()
        )

    @contextlib.contextmanager
    def in_stream(self) -> Iterator[None]:
        """Run this thread's kernels in a new stream, as within `torch.cuda.stream`."""
        self._here.stream = self.add_stream(f"stream {len(self._streams)}", eager=True)
        try:
            yield
        finally:
            del self._here.stream

    @contextlib.contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """What this thread copies is `name`."""
        self._here.name = name
        yield

    def add_stream(self, name: str, *, eager: bool) -> Stream:
        self._streams.append(Stream(self, name, eager=eager))
        return self._streams[-1]

    def _place(self, tensor: torch.Tensor) -> slice:
        start = tensor.data_ptr() - self._memory.data_ptr()
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return slice(start, start + (last + 1) * tensor.element_size())

    def _positions(self, stream: Stream) -> Any:
        if stream not in self._last:
            self._last[stream] = np.zeros(len(self._memory), np.int64)
        return self._last[stream]

    def _require_unused(self, name: str, place: slice, stream: Stream) -> None:
        for other, positions in self._last.items():
            if other is not stream:
                self._require_before(int(positions[place].max(initial=0)), other, stream, f"{name} is copied over", place)

    def _require_before(self, position: int, other: Stream, stream: Stream, what: str, place: slice) -> None:
        if position > max(stream.clock.get(other, 0), self.done.get(other, 0)):
            names = " and ".join(sorted({self._names[index] for index in np.unique(self._named[place])}))
            self.race(f"{what} {names}, and did not wait for {other.name}")


def _overlap(one: Copy, other: Copy) -> bool:
    first, second = (np.frombuffer(copy.target, np.uint8) for copy in (one, other))
    return np.shares_memory(first, second)


class Watch(TorchDispatchMode):
    """Tells the device of every kernel of this thread that reads or writes its memory."""

    def __init__(self, device: SimulatedAccelerator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_view(func):
            written = _written(func, args, kwargs or {})
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Placeholder) and self._device.holds(leaf):
                    note = self._device.write if any(leaf is tensor for tensor in written) else self._device.use
                    note(leaf, func._schema.name)
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that a kernel writes without reading them first: `copy_`'s target, and what `out=` names."""
    schema = func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    names = [argument.name for argument in schema if argument.alias_info is not None and argument.alias_info.is_write]
    if func is not torch.ops.aten.copy_.default and any(name == "self" for name in names):
        return []  # in place: it reads what it changes
    return [given[name] for name in names if name in given]


@functools.cache
def _is_view(func: Any) -> bool:
    return any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)


class SimulatedRing(StreamRing):
    """The ring that is tested; it tells its device the names of what is copied."""

    def __init__(self, device: SimulatedAccelerator, nbytes: int, trace: Trace | None = None) -> None:
        self.simulated = device
        super().__init__(device, nbytes, trace or Trace())

    def copy(self, source: torch.Tensor, start: int, after: Any, name: str) -> None:
        with self.simulated.naming(name):
            super().copy(source, start, after, name)


class SimulatedHost(PlainRing):
    """Host memory that the device copies from; it records what is read into it."""

    def __init__(self, device: SimulatedAccelerator, nbytes: int) -> None:
        super().__init__(CPU, nbytes, Trace())
        self.simulated = device

    def fill(self, chunk: Extent, start: int, after: Any, name: str, lane: int) -> None:
        self.simulated.host_write(self.view(start + chunk.place, chunk.nbytes), name)
        super().fill(chunk, start, after, name, lane)


def load_simulated(
    folder: Path,
    device: SimulatedAccelerator,
    *,
    beyond: float = 0.0,
    in_host: int = 0,
    ring: Any = SimulatedRing,
    **keywords: Any,
) -> Any:
    """The model of a folder, computed on the CPU from weights in the memory of `device`, placed as for a GPU: in the smallest
    memory of it that works, and a part `beyond` of what all weights take on top, with `in_host` bytes of host memory."""
    stream = StreamConfig(device=CPU, **keywords)

    def decide(partition: Any, stream: StreamConfig) -> Any:
        asked = replace(stream, device=PLANNED, device_budget_bytes=0, host_budget_bytes=0, speeds=Speeds(link=1e10))
        asked = replace(asked, host_budget_bytes=smallest(partition, asked) + in_host)
        more = int(beyond * sum(size.nbytes for size in partition.sizes))
        return plan_for(partition, replace(asked, device_budget_bytes=smallest(partition, asked) + more))

    def smallest(partition: Any, asked: StreamConfig) -> int:
        with pytest.raises(BudgetError) as caught:
            plan_for(partition, asked)
        return caught.value.smallest_bytes

    claim = lambda _, nbytes, trace: ring(device, nbytes, trace)  # noqa: E731
    settings = LoadSettings(SourceConfig(), SplitConfig(), stream)
    return load(folder, settings, functools.partial(assemble, decide=decide, claim=claim))
