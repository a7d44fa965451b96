"""The reader's thread and the queue between it and the model.

One entry a unit on its way: `wanted -> reading -> ready -> held -> gone`. The reader fills the oldest wanted entry that
a slot is free for; when nothing is wanted it wants the successor of the newest entry, in the order it has learned, also
across the end of a pass. A unit asked for out of order drops what lies ahead of it: correct first. An error lives in its
entry, is raised where the unit is asked for, and is tried again the next time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from rabbit_engine.errors import ModelClosedError, StreamingError
from rabbit_engine.streaming.slots import Slots
from rabbit_engine.streaming.unit import Unit


@dataclass(slots=True)
class Profile:
    """What happened since the model was loaded. Seconds are of the reader (`read_s`) and of the model (`wait_s`, `pass_s`)."""

    passes: int = 0
    units: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    wait_s: float = 0.0
    pass_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Entry:
    unit: Unit
    state: Literal["wanted", "reading", "ready", "dropped"] = "wanted"
    slot: int = -1
    error: BaseException | None = None


@dataclass(slots=True)
class _Held:
    slot: int
    count: int = 1
    thread: int = field(default_factory=threading.get_ident)


class Streamer:
    """Brings units into slots, ahead of the model. `acquire` and `release` pair up; `close` ends the thread."""

    def __init__(self, units: Sequence[Unit], slots: Slots, count: int, *, prefetching: bool = True) -> None:
        self._slots = slots
        self._count = count
        self._free = deque(range(count))
        self._filling = -1
        self._queue: deque[_Entry] = deque()
        self._held: dict[str, _Held] = {}
        self._units = {unit.name: unit for unit in units}
        names = [unit.name for unit in units]
        self._successor = dict(zip(names, names[1:] + names[:1], strict=True))
        self._previous: str | None = None
        self._prefetching = prefetching
        self._closed = False
        self._mutex = threading.RLock()  # entered as C code: an interrupt cannot leave it half taken
        self._changed = threading.Condition(self._mutex)
        self._process = os.getpid()
        self._profile = Profile()
        self._thread = threading.Thread(target=self._read_on, name="rabbit-reader", daemon=True)
        self._thread.start()

    def acquire(self, name: str) -> tuple[int, torch.Tensor]:
        """Hold the unit: its slot's index and bytes. Waits for it to arrive; raises what its read raised."""
        self.require_open()
        with self._mutex:
            self.require_open()
            if name in self._held:
                self._held[name].count += 1
                return self._held[name].slot, self._slots.wait(self._held[name].slot)
            entry = self._next_entry(name)
            self._wait_for(entry)
            if entry.error is None:
                self._held[name] = _Held(entry.slot)
            self._queue.popleft()
            self._changed.notify_all()
            if entry.error is not None:
                raise entry.error
            return entry.slot, self._slots.wait(entry.slot)

    def _next_entry(self, name: str) -> _Entry:
        """The entry of `name`, at the head of the queue: what lies ahead of it is dropped, what is missing is wanted."""
        if self._previous is not None:
            self._successor[self._previous] = name
        self._previous = name
        while self._queue and self._queue[0].unit.name != name:
            self._drop(self._queue.popleft())
        if not self._queue:
            self._require_slot(name)
            self._queue.append(_Entry(self._units[name]))
        self._changed.notify_all()
        return self._queue[0]

    def _require_slot(self, name: str) -> None:
        mine = [held for held in self._held.values() if held.thread == threading.get_ident()]
        if len(mine) == self._count:
            raise StreamingError(
                f"{name} is asked for inside {' and '.join(self._held)}: more units at once than there are slots"
            )

    def _wait_for(self, entry: _Entry) -> None:
        start = time.perf_counter()
        while entry.state in ("wanted", "reading"):
            self._changed.wait()
            self.require_open()
        self._profile.wait_s += time.perf_counter() - start

    def _drop(self, entry: _Entry) -> None:
        if entry.state == "ready" and entry.slot >= 0:
            self._give_back(entry.slot)
        entry.state = "dropped"

    def _give_back(self, slot: int) -> None:
        self._free.append(slot)
        self._changed.notify_all()

    def release(self, name: str) -> bool:
        """Let go of the unit; True when this was its last holder and its slot is free again."""
        with self._mutex:
            held = self._held.get(name)
            if held is None:
                return False
            held.count -= 1
            if held.count > 0:
                return False
            del self._held[name]
            self._slots.free(held.slot)
            self._give_back(held.slot)
            return True

    def release_all(self) -> None:
        """Let go of everything: a pass has ended, however it ended (a KeyboardInterrupt may strike between any two lines)."""
        with self._mutex:
            for name in list(self._held):
                self._held[name].count = 1
                self.release(name)
            taken = {self._filling, *(entry.slot for entry in self._queue)}
            self._free = deque(slot for slot in range(self._count) if slot not in taken)
            self._changed.notify_all()

    def close(self) -> None:
        """End the reader's thread and let go of the slots. Safe to call again."""
        if os.getpid() != self._process:
            return
        with self._mutex:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._queue.clear()
        self._slots.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def held(self) -> tuple[str, ...]:
        """The units that are held now."""
        return tuple(self._held)

    def profile(self) -> Profile:
        """A copy of the counts so far."""
        with self._mutex:
            return replace(self._profile)

    def count_pass(self, seconds: float) -> None:
        """One pass of the model is over."""
        with self._mutex:
            self._profile.passes += 1
            self._profile.pass_s += seconds

    def require_open(self) -> None:
        """Raise ModelClosedError after `close`, and in a process that was forked after loading: threads do not follow."""
        if os.getpid() != self._process:
            raise ModelClosedError("this process was forked after the model was loaded: load it in the process that uses it")
        if self._closed:
            raise ModelClosedError("the model is closed: load it again")

    # What follows runs in the reader's thread.

    def _read_on(self) -> None:
        while True:
            with self._mutex:
                entry = None if self._closed else self._next_work()
                while entry is None:
                    if self._closed:
                        return
                    self._changed.wait()
                    entry = None if self._closed else self._next_work()
            self._fill(entry)

    def _next_work(self) -> _Entry | None:
        """The entry to read now, a slot taken for it; None while there is nothing to do. The lock is held."""
        if not self._free:
            return None
        entry = next((entry for entry in self._queue if entry.state == "wanted"), None)
        if entry is None and self._prefetching:
            entry = self._foresee()
        if entry is not None:
            entry.state, entry.slot = "reading", self._free.popleft()
            self._filling = entry.slot
        return entry

    def _foresee(self) -> _Entry | None:
        tail = self._queue[-1].unit.name if self._queue else self._previous
        if tail is None or (self._queue and self._queue[-1].error is not None):
            return None
        name = self._successor[tail]
        if name in self._held or any(entry.unit.name == name for entry in self._queue):
            return None
        self._queue.append(_Entry(self._units[name]))
        return self._queue[-1]

    def _fill(self, entry: _Entry) -> None:
        start = time.perf_counter()
        try:
            self._slots.fill(entry.slot, entry.unit)
        except Exception as error:  # noqa: BLE001 - raised where the unit is asked for
            entry.error = error
        with self._mutex:
            self._filling = -1
            self._profile.units += 1
            self._profile.read_s += time.perf_counter() - start
            self._profile.bytes_read += 0 if entry.error else sum(extent.nbytes for extent in entry.unit.extents)
            if entry.error is not None or entry.state == "dropped":
                self._give_back(entry.slot)
                entry.slot = -1
            if entry.state == "reading":
                entry.state = "ready"
            self._changed.notify_all()
