"""The queue between the readers and the model.

One entry a unit on its way: `waiting` (for room in the ring) -> `reading` -> `ready` -> held -> gone. The readers fill the
oldest entry first; when all of it is under way they go on to the successor of the newest one, in the order that was
learned, also across the end of a pass. A unit asked for out of order drops what lies ahead of it: correct first. An error
lives in its entry, is raised where the unit is asked for, and is tried again the next time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from rabbit_engine.errors import ModelClosedError, StreamingError
from rabbit_engine.storage.directio import aligned_down
from rabbit_engine.streaming.telemetry.profile import Profile, UnitProfile
from rabbit_engine.streaming.transfer.arena import Arena
from rabbit_engine.streaming.transfer.experts import ExpertCache
from rabbit_engine.streaming.transfer.reader import Job, Reader, shared_reader
from rabbit_engine.streaming.transfer.ring import Mark, Ring
from rabbit_engine.streaming.transfer.unit import Extent, Unit


@dataclass(slots=True, eq=False)
class _Entry:
    unit: Unit
    state: Literal["waiting", "reading", "ready", "failed", "dropped"] = "waiting"
    place: int = -1
    after: Mark = None
    issued: int = 0
    under_way: int = 0
    wanted: bool = False
    arrived: Mark = None
    error: BaseException | None = None


@dataclass(slots=True)
class _Held:
    place: int
    arrived: Mark
    count: int = 1
    thread: int = field(default_factory=threading.get_ident)


class Streamer:
    """Brings units into a ring, ahead of the model. `acquire` and `release` pair up; `close` ends it.

    `base` is where the ring's part for units on their way begins, `nbytes` how large it is. Units in `host` wait in
    (pinned) host memory and are copied from there, the others are read from their files. Units in `rare` are foreseen only
    behind one another. `experts` are brought before anything that is foreseen, and share this one's counts. `rates` are the
    disk's and the link's own bytes a second, for the profile; `at_close` is called once the ring is gone.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        ring: Ring,
        nbytes: int,
        *,
        base: int = 0,
        host: Mapping[str, torch.Tensor] | None = None,
        rare: Collection[str] = (),
        experts: ExpertCache | None = None,
        prefetching: bool = True,
        rates: tuple[float, float] = (0.0, 0.0),
        at_close: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._ring = ring
        self._arena = Arena(aligned_down(nbytes))  # units lie at its ends too, and reads go to whole pages
        self._base = base
        self._host = dict(host or {})
        self._queue: deque[_Entry] = deque()
        self._under_way: dict[int, _Entry] = {}  # changed by readers alone: an interrupt of the model's thread loses none
        self._held: dict[str, _Held] = {}
        self._units = {unit.name: unit for unit in units}
        self._chunks = {unit.name: () if unit.name in self._host else unit.chunks() for unit in units}
        names = [unit.name for unit in units]
        first = next((name for name in names if name not in rare), names[0] if names else "")
        self._successor = dict(zip(names, [*names[1:], first], strict=True)) if names else {}
        self._rare = frozenset(rare)
        self._previous: str | None = None
        self._prefetching = prefetching
        self._closed = self._freed = False
        self._at_close = tuple(at_close)
        self._process = os.getpid()
        self._last_use: Mark = None
        counts = {unit.name: UnitProfile(unit.name) for unit in units}
        self._profile = experts.profile if experts is not None else Profile()
        self._profile.units, self._profile.disk_rate, self._profile.link_rate = counts, *rates
        self._experts = experts
        self._reader: Reader = shared_reader()
        self._lock, self._changed = self._reader.lock, self._reader.changed
        if units or experts is not None:
            self._reader.join(self)

    def acquire(self, name: str) -> tuple[int, torch.Tensor]:
        """Hold the unit: where it lies in the ring, and its bytes. Waits for it; raises what its read raised."""
        self.require_open()
        with self._lock:
            self.require_open()
            held = self._held.get(name)
            if held is not None:
                held.count += 1
            else:
                held = self._hold(self._next_entry(name))
            self._ring.wait(held.arrived)
            return held.place, self._ring.view(self._base + held.place, self._units[name].nbytes)

    def _next_entry(self, name: str) -> _Entry:
        """The entry of `name`, at the head of the queue: what lies ahead of it is dropped, what is missing is wanted."""
        if self._previous is not None and (name not in self._rare or self._previous in self._rare):
            self._successor[self._previous] = name
        self._previous = name
        while self._queue and (self._queue[0].unit.name != name or self._queue[0].state == "dropped"):
            self._drop_first()  # one that is dropped already: an interrupt struck before it was gone
        if self._queue and self._queue[0].state == "failed":  # a prefetch: now that it matters it is tried again
            while self._queue:
                self._drop_first()
        if not self._queue or self._queue[0].state == "waiting":
            self._require_room(name)
        if not self._queue:
            self._queue.append(_Entry(self._units[name]))
        self._queue[0].wanted = True
        self._changed.notify_all()
        return self._queue[0]

    def _hold(self, entry: _Entry) -> _Held:
        start = time.perf_counter()
        while entry.state in ("waiting", "reading"):
            self._changed.wait()
            self.require_open()
        self._profile.count_wait(entry.unit.name, time.perf_counter() - start)
        held = _Held(entry.place, entry.arrived)
        if entry.error is None:
            self._held[entry.unit.name] = held
        self._queue.popleft()
        self._changed.notify_all()
        if entry.error is not None:
            raise entry.error
        return held

    def _require_room(self, name: str) -> None:
        mine = [held.place for held in self._held.values() if held.thread == threading.get_ident()]
        if not self._arena.fits_beside(mine, self._units[name].nbytes):
            raise StreamingError(f"{name} is asked for inside {' and '.join(self._held)}: more at once than the ring can hold")

    def _drop_first(self) -> None:
        """Let the head of the queue go; bytes that are being read to its place keep it until they have arrived."""
        entry = self._queue[0]
        entry.state = "dropped"
        if not entry.under_way:
            self._give_back(entry)
        self._queue.popleft()

    def _give_back(self, entry: _Entry) -> None:
        place, entry.place = entry.place, -1
        if place >= 0:
            self._arena.give(place)

    def release(self, name: str) -> bool:
        """Let go of the unit; True when this was its last holder and its room is free again."""
        if self.forked:
            return False
        with self._lock:
            held = self._held.get(name)
            if held is None:
                return False
            held.count -= 1
            if held.count > 0:
                return False
            self._last_use = self._ring.last_use()
            del self._held[name]
            self._arena.give(held.place)
            self._changed.notify_all()
            return True

    def release_all(self) -> None:
        """Let go of everything: a pass has ended, however it ended (a KeyboardInterrupt may strike between any two lines)."""
        if self.forked:
            return
        with self._lock:
            if self._held:
                self._last_use = self._ring.last_use()
            self._held.clear()
            self._arena.keep_only({entry.place for entry in (*self._queue, *self._under_way.values())})
            if self._experts is not None:
                self._experts.recover()
            self._changed.notify_all()

    def abandon(self) -> None:
        """`close`, for a finalizer: the garbage collector may strike in a reader's thread or amid bookkeeping."""
        if not self.forked and not self._freed:
            if self._reader.is_busy_here():
                threading.Thread(target=self.close, name="rabbit-closer").start()
            else:
                self.close()

    def close(self) -> None:
        """End the reading and let go of the ring. Safe to call again, also after an interrupt."""
        if self.forked or self._freed:
            return
        with self._lock:
            self._closed = True
            if self._experts is not None:
                self._experts.close()
            self._changed.notify_all()
            while self._under_way or (self._experts is not None and self._experts.busy):
                self._changed.wait()
        self._reader.leave(self)
        self._queue.clear()
        self._host.clear()
        self._ring.close()
        for free in self._at_close:
            free()
        self._freed = True

    def wait_until_idle(self) -> None:
        """Return when nothing is being read ahead any more: the ring is full, or nothing is to come."""
        with self._lock:
            while self._under_way or self._has_work() or (self._experts is not None and self._experts.busy):
                self._changed.wait()

    @property
    def units(self) -> tuple[Unit, ...]:
        """What it brings, in the order of a pass."""
        return tuple(self._units.values())

    @property
    def closed(self) -> bool:
        """Whether it can bring nothing any more: `close` was called, or this process was forked after loading."""
        return self._closed or self.forked

    @property
    def forked(self) -> bool:
        """Whether this process was forked after loading: it has no reader, and locks may be held that nobody here frees."""
        return os.getpid() != self._process

    @property
    def held(self) -> tuple[str, ...]:
        """The units that are held now."""
        return tuple(self._held)

    @property
    def bytes_read(self) -> int:
        """From disk, so far."""
        return self._profile.bytes_read

    def profile(self) -> Profile:
        """A copy of the counts so far."""
        if self.forked:
            return self._profile.copy()
        with self._lock:
            return self._profile.copy()

    def count_compute(self, name: str, seconds: float) -> None:
        """The module of unit `name`, or an expert of it, ran for so long."""
        units = self._profile.units
        self._profile.of(name if name in units else name.rpartition("[")[0]).compute_s += seconds

    def count_pass(self, seconds: float) -> None:
        """One pass of the model is over."""
        if self.forked:
            return
        with self._lock:
            self._profile.passes += 1
            self._profile.pass_s += seconds

    def require_open(self) -> None:
        """Raise ModelClosedError after `close`, and in a process that was forked after loading."""
        self.require_process()
        if self._closed:
            raise ModelClosedError("the model is closed: load it again")

    def require_process(self) -> None:
        """Raise ModelClosedError in a process that was forked after loading: threads do not follow."""
        if self.forked:
            raise ModelClosedError("this process was forked after the model was loaded: load it in the process that uses it")

    # What follows runs in the readers' threads; the lock is held, but for what a job does.

    def next_job(self, *, wanted: bool) -> Job | None:
        """The oldest unfinished entry's next chunk, else the first of an entry that is foreseen; None while there is no room."""
        if self._closed:
            return None
        job = self._experts.next_job() if self._experts is not None else None
        if job is not None:
            return job
        for entry in self._queue:
            if wanted and not entry.wanted:
                return None
            if entry.state == "waiting" and not self._find_room(entry):
                return None
            if entry.state == "reading" and entry.issued < self._parts(entry):
                return self._issue(entry)
        if wanted or not self._prefetching:
            return None
        name = self._foreseen()
        if name is None:
            return None
        self._queue.append(_Entry(self._units[name]))
        return self._issue(self._queue[-1]) if self._find_room(self._queue[-1]) else None

    def _has_work(self) -> bool:
        """Whether `next_job` would find one."""
        for entry in self._queue:
            if entry.state == "waiting":
                return self._arena.fits(entry.unit.nbytes)
            if entry.state == "reading" and entry.issued < self._parts(entry):
                return True
        ahead = self._foreseen() if self._prefetching and not self._closed else None
        return ahead is not None and self._arena.fits(self._units[ahead].nbytes)

    def _find_room(self, entry: _Entry) -> bool:
        place = self._arena.take(entry.unit.nbytes)
        if place is None:
            return False
        entry.place, entry.after, entry.state = place, self._last_use, "reading"
        return True

    def _parts(self, entry: _Entry) -> int:
        return max(1, len(self._chunks[entry.unit.name]))

    def _foreseen(self) -> str | None:
        """The successor of the newest entry, unless it is here or on its way already."""
        tail = self._queue[-1].unit.name if self._queue else self._previous
        if tail is None or (self._queue and self._queue[-1].error is not None):
            return None
        name = self._successor[tail]
        return None if name in self._held or any(entry.unit.name == name for entry in self._queue) else name

    def _issue(self, entry: _Entry) -> Job:
        index, chunks = entry.issued, self._chunks[entry.unit.name]
        entry.issued += 1
        entry.under_way += 1
        self._under_way[id(entry)] = entry
        self._profile.begin_read(time.perf_counter())
        return partial(self._work, entry, chunks[index] if chunks else None)

    def _work(self, entry: _Entry, chunk: Extent | None, lane: int) -> Callable[[], None]:
        """Read one chunk, or copy a unit that waits in host memory. Without the lock."""
        start, error = time.perf_counter(), None
        place, name = self._base + entry.place, entry.unit.name
        try:
            if chunk is not None:
                self._ring.fill(chunk, place, entry.after, name, lane)
            else:
                self._ring.copy(self._host[name], place, entry.after, name)
        except Exception as caught:  # noqa: BLE001 - raised where the unit is asked for
            error = caught
        return partial(self._done, entry, chunk, error, time.perf_counter() - start)

    def _done(self, entry: _Entry, chunk: Extent | None, error: Exception | None, seconds: float) -> None:
        entry.under_way -= 1
        if not entry.under_way:
            del self._under_way[id(entry)]
        self._profile.end_read(time.perf_counter())
        if chunk is not None and error is None:
            self._profile.count_read(entry.unit.name, chunk.read_bytes, seconds)
        elif error is None:
            self._profile.count_copy(entry.unit.name, entry.unit.nbytes, seconds)
        entry.error = entry.error or error
        if entry.error is not None:
            entry.issued = self._parts(entry)
        if entry.under_way or entry.issued < self._parts(entry):
            if entry.state == "dropped" and not entry.under_way:
                self._give_back(entry)
            return
        self._finish(entry)

    def _finish(self, entry: _Entry) -> None:
        if entry.state == "dropped":
            self._give_back(entry)
        elif entry.error is not None:
            self._give_back(entry)
            entry.state = "failed"
        else:
            entry.arrived, entry.state = self._ring.seal(), "ready"
