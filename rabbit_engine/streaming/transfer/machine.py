"""Moves entries in the readers' threads: from files, from host memory, or from files through host memory.

Policies decide which entries go where, in what order: `ring_queue` for the units of a pass, `experts` for those read on
demand. An error is stored in its entry, and raised where the unit is requested.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from rabbit_engine.errors import ModelClosedError
from rabbit_engine.streaming.telemetry.profile import Profile
from rabbit_engine.streaming.transfer.entry import Entry
from rabbit_engine.streaming.transfer.reader import Job, Reader
from rabbit_engine.streaming.transfer.ring import Ring
from rabbit_engine.streaming.transfer.unit import Extent


class UnitMachine:
    """Brings entries into `ring`. Everything except a job itself is called with the reader's lock held."""

    def __init__(self, ring: Ring, profile: Profile, reader: Reader) -> None:
        self.ring, self.profile = ring, profile
        self.lock, self.changed = reader.lock, reader.changed
        self.closed = False
        self.under_way: dict[int, Entry] = {}  # changed only by readers, so an interrupt of the model's thread loses none
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this process was forked after loading: it has no reader, and locks may never be released."""
        return os.getpid() != self._process

    def require_process(self) -> None:
        """Raise ModelClosedError in a process that was forked after loading, which has no reader threads."""
        if self.forked:
            raise ModelClosedError("this process was forked after the model was loaded: load it in the process that uses it")

    def require_open(self) -> None:
        """Raise ModelClosedError after the end, and in a process that was forked after loading."""
        self.require_process()
        if self.closed:
            raise ModelClosedError("the model is closed: load it again")

    def wait(self) -> None:
        """Wait for any change. Raises ModelClosedError if none can come."""
        self.changed.wait()
        self.require_open()

    def issue(self, entry: Entry) -> Job:
        """The job for the next part of an entry that has parts left."""
        chunk = entry.chunks[entry.issued] if entry.chunks else None
        entry.issued += 1
        entry.under_way += 1
        self.under_way[id(entry)] = entry
        self.profile.begin_read(time.perf_counter())
        return partial(self._work, entry, chunk)

    def drop(self, entry: Entry) -> None:
        """Give up an entry: its place is free at once, or when the bytes being read to it have arrived."""
        entry.state = "dropped"
        if not entry.under_way:
            entry.give_back(entry)

    def _work(self, entry: Entry, chunk: Extent | None, lane: int) -> Callable[[], None]:
        """Bring one part, without the lock."""
        start, error = time.perf_counter(), None
        try:
            self._bring(entry, chunk, lane)
        except Exception as caught:  # noqa: BLE001 - raised where the unit is requested
            error = caught
        return partial(self._done, entry, chunk, error, time.perf_counter() - start)

    def _bring(self, entry: Entry, chunk: Extent | None, lane: int) -> None:
        name, host = entry.unit.name, entry.host
        if host is None:
            assert chunk is not None  # noqa: S101 - an entry without chunks is in host memory
            self.ring.fill(chunk, entry.place, entry.after, name, lane)
            return
        inside, nbytes = (0, entry.unit.nbytes) if chunk is None else (chunk.place, chunk.nbytes)
        if chunk is not None:
            self.ring.finish(host.copied)  # of the previous unit there
            host.ring.fill(chunk, host.start, None, name, lane)
        self.ring.copy(host.ring.view(host.start + inside, nbytes), entry.place + inside, entry.after, name)

    def _done(self, entry: Entry, chunk: Extent | None, error: Exception | None, seconds: float) -> None:
        entry.under_way -= 1
        if not entry.under_way:
            del self.under_way[id(entry)]
        self.profile.end_read(time.perf_counter())
        if error is None and chunk is not None:
            self.profile.count_read(entry.counted_as, chunk.read_bytes, seconds)
        elif error is None:
            self.profile.count_copy(entry.counted_as, entry.unit.nbytes, seconds)
        entry.error = entry.error or error
        if entry.error is not None or entry.state == "dropped":
            entry.issued = entry.parts  # the rest is not read
        if not entry.under_way and entry.issued == entry.parts:
            self._end(entry)

    def _end(self, entry: Entry) -> None:
        entry.arrived = self.ring.seal()
        if entry.host is not None:
            entry.host.copied = entry.arrived
        if entry.state == "reading" and entry.error is None:
            entry.state = "here"
            if entry.host is not None:
                entry.host.filled = True
            return
        if entry.state == "reading":
            entry.state = "failed"
        entry.give_back(entry)
