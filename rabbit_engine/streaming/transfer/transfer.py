"""Brings a model's weights to its device: one machine that moves them, with one policy for units and one for experts."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

import torch

from rabbit_engine.storage.directio import aligned_down
from rabbit_engine.streaming.telemetry.profile import Profile, UnitProfile
from rabbit_engine.streaming.telemetry.speculation import SpeculationProfile
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.arena import Arena
from rabbit_engine.streaming.transfer.entry import HostPlace
from rabbit_engine.streaming.transfer.experts import ExpertCache, ExpertSlots
from rabbit_engine.streaming.transfer.machine import UnitMachine
from rabbit_engine.streaming.transfer.reader import Job, Reader, shared_reader
from rabbit_engine.streaming.transfer.ring import Ring
from rabbit_engine.streaming.transfer.ring_queue import RingQueue
from rabbit_engine.streaming.transfer.unit import Unit


class Transfer:
    """Brings units into a ring ahead of the model, and experts on demand. `close` ends it and the ring.

    `start` is where the ring's part for units in transit begins, `nbytes` its size. Units in `host` are copied from host
    memory, the others are read from their files. Units in `rare` are only predicted after one another. Experts in `slots`
    are read before any prediction. `rates` are the disk's and the link's own bytes per second, for the profile.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        ring: Ring,
        nbytes: int,
        *,
        start: int = 0,
        host: Mapping[str, HostPlace] | None = None,
        rare: Collection[str] = (),
        slots: ExpertSlots | None = None,
        prefetching: bool = True,
        rates: tuple[float, float] = (0.0, 0.0),
        trace: Trace | None = None,
        reader: Reader | None = None,
    ) -> None:
        host, self._reader, self._ring = host or {}, reader or shared_reader(), ring
        self.pass_read_s = _seconds_to_move(units, host, rare, rates)
        """Seconds in which the units of a pass move, at the links' own rates; 0 if they are unknown."""
        counts = {unit.name: UnitProfile(unit.name) for unit in units}
        self._profile = Profile(units=counts, disk_rate=rates[0], link_rate=rates[1])
        self._machine = UnitMachine(ring, self._profile, self._reader)
        arena = Arena(aligned_down(nbytes), start)  # other units share its edges, and reads cover whole pages
        self._queue = RingQueue(self._machine, arena, units, host=host, rare=rare, prefetching=prefetching)
        self.experts = ExpertCache(self._machine, slots, trace or Trace()) if slots is not None else None
        host_rings = [place.ring for place in host.values()] + ([slots.host] if slots is not None and slots.host else [])
        self._host_rings = list(dict.fromkeys(host_rings))
        self._freed = False
        if units or slots is not None:
            self._reader.join(self)

    # For the model's thread.

    def acquire(self, name: str) -> tuple[int, torch.Tensor]:
        """Wait for the unit and hold it until `release`: its place in the ring, and its bytes. Raises what its read raised."""
        self.require_open()
        with self._machine.lock:
            self.require_open()
            held = self._queue.acquire(name)
            self._ring.wait(held.arrived)
            return held.place, self._ring.view(held.place, held.nbytes)

    def release(self, name: str) -> bool:
        """Release the unit; True if this was its last holder and its room is free again."""
        if self.forked:
            return False
        with self._machine.lock:
            is_free = self._queue.release(name)
            if is_free:
                self._machine.changed.notify_all()
            return is_free

    def release_all(self) -> None:
        """Release everything at the end of a pass, however it ended (a KeyboardInterrupt may strike between any two lines)."""
        if self.forked:
            return
        with self._machine.lock:
            self._queue.release_all()
            if self.experts is not None:
                self.experts.recover()
            self._machine.changed.notify_all()

    # From loading to the end.

    def abandon(self) -> None:
        """`close`, for a finalizer: garbage collection may run in a reader's thread or amid bookkeeping."""
        if not self.forked and not self._freed:
            if self._reader.is_busy_here():
                threading.Thread(target=self.close, name="rabbit-closer").start()
            else:
                self.close()

    def close(self) -> None:
        """Stop reading and free the ring. Idempotent, also after an interrupt."""
        if self.forked or self._freed:
            return
        with self._machine.lock:
            self._machine.closed = True
            if self.experts is not None:
                self.experts.forget()
            self._machine.changed.notify_all()
            while self._machine.under_way:
                self._machine.changed.wait()
        self._reader.leave(self)
        self._queue.forget()
        for ring in (self._ring, *self._host_rings):
            ring.close()
        self._freed = True

    def wait_until_idle(self) -> None:
        """Return when nothing is being prefetched any more: the ring is full, or there is nothing to read."""
        with self._machine.lock:
            while self._machine.under_way or (not self._machine.closed and self._queue.has_work()):
                self._machine.changed.wait()

    @property
    def closed(self) -> bool:
        """Whether it can bring nothing any more: it was closed, or this process was forked after loading."""
        return self._machine.closed or self.forked

    @property
    def forked(self) -> bool:
        """Whether this process was forked after loading: it has no reader, and locks may never be released."""
        return self._machine.forked

    def require_open(self) -> None:
        """Raise ModelClosedError after `close`, and in a process that was forked after loading."""
        self._machine.require_open()

    def require_process(self) -> None:
        """Raise ModelClosedError in a process that was forked after loading, which has no reader threads."""
        self._machine.require_process()

    # Its units and counts.

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that pass through the ring, in the order of a pass."""
        return self._queue.units

    @property
    def held(self) -> tuple[str, ...]:
        """The units held now."""
        return self._queue.held

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk so far."""
        return self._profile.bytes_read

    @property
    def speculation(self) -> SpeculationProfile:
        """The counts of generations that guess tokens ahead, for whoever decodes to add to."""
        return self._profile.speculation

    def profile(self) -> Profile:
        """A copy of the counts so far."""
        if self.forked:
            return self._profile.copy()
        with self._machine.lock:
            return self._profile.copy()

    def count_compute(self, name: str, seconds: float) -> None:
        """Count `seconds` for the module of unit `name`, or an expert of it."""
        self._profile.of(name if name in self._profile.units else name.rpartition("[")[0]).compute_s += seconds

    def count_pass(self, seconds: float) -> None:
        """Count one pass of the model."""
        if self.forked:
            return
        with self._machine.lock:
            self._profile.passes += 1
            self._profile.pass_s += seconds

    # For the reader threads, with the lock held.

    def next_job(self, *, wanted: bool) -> Job | None:
        """The next part of an expert that is waited for, else of a unit; `wanted` restricts it to what the model waits for."""
        if self._machine.closed:
            return None
        job = self.experts.next_job() if self.experts is not None else None
        return job or self._queue.next_job(wanted=wanted)


def _seconds_to_move(
    units: Sequence[Unit], host: Mapping[str, HostPlace], rare: Collection[str], rates: tuple[float, float]
) -> float:
    usual = [unit for unit in units if unit.name not in rare]
    links = zip(rates, (False, True), strict=True)
    return max(
        sum(one.nbytes for one in usual if (one.name in host) == in_host) / rate if rate else 0.0 for rate, in_host in links
    )
