"""How long the turns of a pass wait for their rings: unit by unit, over passes that follow one another. Pure.

A ring reads the streamed units of its stages in the order of a pass, each as soon as those before it have left room for it in one
piece: so also ahead of its next turn, in the same pass or in the next one. Computing with a unit waits until it has been read.
Passes are followed until the rings are in step. Each ring is taken to have its disk for itself: where some share one, a plan also
counts how long that disk is busy.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field, replace

from rabbit_engine.planning.stage_costs import StageWork, StreamedUnit, Turn
from rabbit_engine.streaming.transfer.arena import Arena

_PASSES = 5
"""Passes that are followed; what the last two wait is what all later ones do."""

_COUNTED = 2


@dataclass(frozen=True, slots=True)
class RingUse:
    """A turn with the `work` it does: through the ring number `ring` of `ring_bytes`, from a disk of `disk_rate`."""

    turn: Turn
    work: StageWork
    ring: int
    ring_bytes: int
    disk_rate: float


@functools.lru_cache(maxsize=256)
def with_waits(uses: tuple[RingUse, ...]) -> tuple[Turn, ...]:
    """The turns of a pass, in order, each with the seconds that it waits for its ring."""
    if not any(use.work.streamed for use in uses):
        return tuple(use.turn for use in uses)
    rings: dict[int, _RingReads] = {}
    waits, now = [0.0] * len(uses), 0.0
    for number in range(_PASSES):
        for index, use in enumerate(uses):
            ring = rings.setdefault(use.ring, _RingReads(Arena(use.ring_bytes), use.disk_rate))
            waited, now = _visit(use, ring, now)
            waits[index] += waited if number >= _PASSES - _COUNTED else 0.0
    return tuple(replace(use.turn, late_s=late_s / _COUNTED) for use, late_s in zip(uses, waits, strict=True))


@dataclass(slots=True)
class _RingReads:
    """When its disk has read what was asked, and the units that are done with but not yet overwritten: when, and their places."""

    arena: Arena
    disk_rate: float
    read_until: float = 0.0
    done: deque[tuple[float, int]] = field(default_factory=deque)

    def read(self, unit: StreamedUnit) -> int | None:
        """Read the next unit, up to `read_until`, into the room of those that are done with. Its place; None if there is none."""
        while self.done and self.done[0][0] <= self.read_until:
            self._give()
        while (place := self.arena.take(unit.used_bytes)) is None and self.done:
            self.read_until = max(self.read_until, self._give())
        self.read_until += unit.read_bytes / self.disk_rate
        return place

    def _give(self) -> float:
        """Free the oldest; when it was done with."""
        when, place = self.done.popleft()
        self.arena.give(place)
        return when


def _visit(use: RingUse, ring: _RingReads, now: float) -> tuple[float, float]:
    """The seconds that a turn which begins `now` waits for its ring, and when it ends."""
    waited, left_s = 0.0, use.turn.compute_s
    pace = left_s / use.work.used_bytes if use.work.used_bytes else 0.0
    now += use.turn.hop_s
    for unit in use.work.streamed:
        before_s, unit_s = unit.before_bytes * pace, unit.used_bytes * pace
        now += before_s
        place = ring.read(unit)
        late_s = max(0.0, ring.read_until - now)
        waited, now = waited + late_s, now + late_s + unit_s
        if place is not None:
            ring.done.append((now, place))
        left_s -= before_s + unit_s
    now += left_s + use.turn.asked_s
    if use.turn.asked_s:
        ring.read_until = max(ring.read_until, now)
    return waited, now
