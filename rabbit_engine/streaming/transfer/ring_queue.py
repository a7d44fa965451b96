"""The policy for the units of a pass: each is read as far ahead of the model as the ring has room.

The readers fill the oldest entry first; once all of it is under way, they continue with the successor of the newest one, in
the learned order, also across the end of a pass. A unit requested out of order drops those ahead of it: correctness first. A
failed one is tried again at its next request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rabbit_engine.errors import StreamingError
from rabbit_engine.streaming.transfer.arena import Arena
from rabbit_engine.streaming.transfer.entry import Entry, HostPlace
from rabbit_engine.streaming.transfer.machine import UnitMachine
from rabbit_engine.streaming.transfer.order import PassOrder
from rabbit_engine.streaming.transfer.reader import Job
from rabbit_engine.streaming.transfer.ring import Mark
from rabbit_engine.streaming.transfer.unit import Unit


@dataclass(slots=True)
class Held:
    """A unit in use, `count` times: its place in the ring, and the mark after its copies."""

    place: int
    nbytes: int
    arrived: Mark
    count: int = 1
    thread: int = field(default_factory=threading.get_ident)


class RingQueue:
    """`units` in the order of a pass, through the part of the ring that `arena` allocates. Those in `host` are copied from
    there. Everything is called with the lock held."""

    def __init__(
        self,
        machine: UnitMachine,
        arena: Arena,
        units: Sequence[Unit],
        *,
        host: Mapping[str, HostPlace],
        rare: Collection[str],
        prefetching: bool,
    ) -> None:
        self._machine, self._arena = machine, arena
        self._units = {unit.name: unit for unit in units}
        self._host = dict(host)
        self._chunks = {unit.name: () if unit.name in host else unit.chunks() for unit in units}
        self._order = PassOrder(list(self._units), rare)
        self._prefetching = prefetching
        self._queue: deque[Entry] = deque()
        self._held: dict[str, Held] = {}
        self._last_use: Mark = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """Its units, in the order of a pass."""
        return tuple(self._units.values())

    @property
    def held(self) -> tuple[str, ...]:
        """The units in use now."""
        return tuple(self._held)

    # For the model's thread.

    def acquire(self, name: str) -> Held:
        """Wait for the unit and hold it. Raises what its read raised."""
        held = self._held.get(name)
        if held is not None:
            held.count += 1
            return held
        return self._hold(self._next_entry(name))

    def _next_entry(self, name: str) -> Entry:
        """The entry of `name`, moved to the head of the queue: those ahead are dropped, a missing one is added as wanted."""
        self._order.ask(name)
        while self._queue and (self._queue[0].unit.name != name or self._queue[0].state == "dropped"):
            self._drop_first()  # already dropped: an interrupt struck before it was removed
        if self._queue and self._queue[0].state == "failed":  # a prefetch: now that it is needed, try again
            while self._queue:
                self._drop_first()
        if not self._queue or self._queue[0].state == "waiting":
            self._require_room(name)
        if not self._queue:
            self._queue.append(self._entry_of(name))
        self._queue[0].wanted = True
        self._machine.changed.notify_all()
        return self._queue[0]

    def _hold(self, entry: Entry) -> Held:
        start = time.perf_counter()
        while entry.on_its_way:
            self._machine.wait()
        self._machine.profile.count_wait(entry.unit.name, time.perf_counter() - start)
        held = Held(entry.place, entry.unit.nbytes, entry.arrived)
        if entry.error is None:
            self._held[entry.unit.name] = held
        self._queue.popleft()
        self._machine.changed.notify_all()
        if entry.error is not None:
            raise entry.error
        return held

    def _require_room(self, name: str) -> None:
        mine = [held.place for held in self._held.values() if held.thread == threading.get_ident()]
        if not self._arena.fits_beside(mine, self._units[name].nbytes):
            raise StreamingError(f"{name} is requested inside {' and '.join(self._held)}: more at once than the ring can hold")

    def _drop_first(self) -> None:
        """Drop the head of the queue; an interrupt may strike between any two lines."""
        self._machine.drop(self._queue[0])
        self._queue.popleft()

    def _give_back(self, entry: Entry) -> None:
        place, entry.place = entry.place, -1
        if place >= 0:
            self._arena.give(place)

    def release(self, name: str) -> bool:
        """Release the unit; True if this was its last holder and its room is free again."""
        held = self._held.get(name)
        if held is None:
            return False
        held.count -= 1
        if held.count > 0:
            return False
        self._last_use = self._machine.ring.last_use()
        del self._held[name]
        self._arena.give(held.place)
        return True

    def release_all(self) -> None:
        """Release everything, however the pass ended. Units in transit continue."""
        if self._held:
            self._last_use = self._machine.ring.last_use()
        self._held.clear()
        self._arena.keep_only({entry.place for entry in (*self._queue, *self._machine.under_way.values())})

    def forget(self) -> None:
        """Drop everything: nothing will be read any more."""
        self._queue.clear()
        self._host.clear()

    # For the reader threads.

    def next_job(self, *, wanted: bool) -> Job | None:
        """The next part of the oldest unfinished entry, else the first part of a predicted entry; None if there is no room."""
        for entry in self._queue:
            if wanted and not entry.wanted:
                return None
            if entry.state == "waiting" and not self._find_room(entry):
                return None
            if entry.has_parts_left:
                return self._machine.issue(entry)
        name = None if wanted else self._foreseen()
        if name is None:
            return None
        entry = self._entry_of(name)
        self._queue.append(entry)
        return self._machine.issue(entry) if self._find_room(entry) else None

    def has_work(self) -> bool:
        """Whether `next_job` would return one."""
        for entry in self._queue:
            if entry.state == "waiting":
                return self._arena.fits(entry.unit.nbytes)
            if entry.has_parts_left:
                return True
        name = self._foreseen()
        return name is not None and self._arena.fits(self._units[name].nbytes)

    def _entry_of(self, name: str) -> Entry:
        return Entry(self._units[name], name, self._chunks[name], self._host.get(name), self._give_back)

    def _find_room(self, entry: Entry) -> bool:
        place = self._arena.take(entry.unit.nbytes)
        if place is not None:
            entry.begin(place, self._last_use)
        return place is not None

    def _foreseen(self) -> str | None:
        """The successor of the newest entry, unless it is here or in transit already."""
        tail = self._queue[-1].unit.name if self._queue else self._order.latest
        if not self._prefetching or tail is None or (self._queue and self._queue[-1].error is not None):
            return None
        name = self._order.after(tail)
        return None if name in self._held or any(entry.unit.name == name for entry in self._queue) else name
