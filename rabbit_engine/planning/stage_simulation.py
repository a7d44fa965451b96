"""Simulates passes over a row of stages: machines, disks, links and failures, event by event. Pure; a seed gives one result.

Where `stages_plan` adds up, here groups of texts wait for each other at machines and links. A ring holds as many pieces of what a
stage streams as it holds units of their average size. A machine that fails loses the caches of all texts: each is computed again
from its tokens, in one pass through all stages, as soon as the machine is back.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.stage_costs import StageWork
from rabbit_engine.planning.stages_plan import StagesPlan

RING_PIECES = 8
"""Pieces of weights in a ring, if nothing else is known: a piece is read while others are there or in use."""

_MOST_FAILURES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A stop of every pass: `compute_s` and `read_s` on `machine`, in `pieces` of which its ring holds `slots`, then `asked_s` of
    reading that nobody does ahead; after a message of `wire_s` on the machine's link and `driver_wire_s` on the driver's, with
    `latency_s` besides, and before one back. Each further row of a pass takes `further_row` times the computing. A machine may
    have several rings, by number."""

    machine: str
    compute_s: float
    read_s: float = 0.0
    asked_s: float = 0.0
    pieces: int = 1
    slots: int = RING_PIECES
    wire_s: float = 0.0
    driver_wire_s: float = 0.0
    latency_s: float = 0.0
    further_row: float = 1.0
    ring: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Each machine but the driver fails once in `every_s` seconds on average, and is back after `recovery_s`: noticed, started
    anew, its weights in memory."""

    every_s: float
    recovery_s: float
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPasses:
    """What a simulation showed: `tokens` of each text in `seconds`, and `pass_s` a token of each once all stages are filled.

    `computing`, `reading` and `sending` are the shares of the time in which a machine computes, its disk reads, its link to the
    driver is busy (of the driver: with all others). `failures` machines failed, and `replays` passes computed texts again.
    """

    texts: int
    tokens: int
    seconds: float
    pass_s: float
    computing: Mapping[str, float]
    reading: Mapping[str, float]
    sending: Mapping[str, float]
    failures: int = 0
    replays: int = 0

    @property
    def token_s(self) -> float:
        """Seconds a token, of all texts together."""
        return self.pass_s / self.texts

    @property
    def bubbles(self) -> float:
        """The share of the time in which a machine waits, on average over the machines."""
        return 1 - sum(self.computing.values()) / len(self.computing)


def stations_of(plan: StagesPlan, texts: int = 1, groups: int = 1) -> tuple[Station, ...]:
    """The stops of a pass of one of `groups` of `texts` each. Devices that share a disk have equal parts of its rate; machines
    that share processors compute slower by as much as they are too many at once."""
    owners = [*(stage.machine for stage in plan.stages), plan.driver]
    used = {machine.name: machine.disk_name for machine in owners}
    crowds: defaultdict[str, float] = defaultdict(float)
    for machine in {machine.name: machine for machine in owners}.values():
        crowds[machine.processors_name] += machine.processors_share
    plans = [*(stage.plan for stage in plan.stages), plan.ends_plan]
    works = [*(stage.work for stage in plan.stages), plan.ends]
    found = []
    for turn, machine, own, work in zip(plan.turns(texts), owners, plans, works, strict=True):
        sharing = sum(disk == machine.disk_name for disk in used.values())
        found.append(
            Station(
                machine=machine.name,
                compute_s=turn.compute_s * max(1.0, crowds[machine.processors_name] * min(1.0, groups / len(used))),
                read_s=turn.read_s * sharing,
                asked_s=turn.asked_s * sharing,
                pieces=max(1, len(work.streamed)),
                slots=_slots(work, own),
                wire_s=turn.wire_s,
                driver_wire_s=turn.driver_wire_s,
                latency_s=machine.link_latency_s if turn.hop_s else 0.0,
                further_row=machine.further_text,
                ring=next(index for index, other in enumerate(plans) if other is own),
            )
        )
    return tuple(found)


def _slots(work: StageWork, plan: Plan) -> int:
    """The units of average size that the ring holds at once."""
    nbytes = sum(unit.used_bytes for unit in work.streamed)
    return max(1, plan.ring_bytes * len(work.streamed) // nbytes) if nbytes else RING_PIECES


def simulate_plan(
    plan: StagesPlan, texts: int = 1, *, tokens: int = 20, prompt: int = 1, failures: Failures | None = None
) -> SimulatedPasses:
    """Simulate `texts` over the plan, in the number of groups that it says is best."""
    groups = plan.groups(texts)
    stations = stations_of(plan, -(-texts // groups), groups)
    driver = plan.driver.name
    return simulate(stations, groups, texts=texts, tokens=tokens, prompt=prompt, failures=failures, driver=driver)


def simulate(
    stations: Sequence[Station],
    groups: int = 1,
    *,
    texts: int | None = None,
    tokens: int = 20,
    prompt: int = 1,
    failures: Failures | None = None,
    driver: str | None = None,
) -> SimulatedPasses:
    """Simulate `groups` of texts, each going through `stations` once a token. The first station's machine is the `driver` by
    default. The first pass computes a `prompt` of that many tokens. Raises ConfigurationError if machines fail sooner than texts
    are computed again."""
    driver = driver or stations[0].machine
    run = _Run(stations, [_Group(prompt) for _ in range(groups)], tokens, prompt, driver)
    times = _failure_times({station.machine for station in stations} - {driver}, failures)
    now, count = 0.0, 0
    while run.left:
        machine, failed_at = next(times)
        now = run.until(failed_at)
        if run.left and failures is not None:
            count += 1
            if count > _MOST_FAILURES:
                raise ConfigurationError(
                    f"the texts are not done after {_MOST_FAILURES} failures: one every {failures.every_s} s"
                )
            run.fail(machine, now, failures.recovery_s)
    seconds = max(group.ends[-1] for group in run.groups)
    shown = seconds or 1.0  # nothing takes time if no rate is given
    return SimulatedPasses(
        texts=groups if texts is None else texts,
        tokens=tokens,
        seconds=seconds,
        pass_s=_steady(run.groups, tokens),
        computing={name: one.computed_s / shown for name, one in run.machines.items()},
        reading={name: one.read_s / shown for name, one in run.machines.items()},
        sending={name: one.sent_s / shown for name, one in run.machines.items()},
        failures=count,
        replays=run.replays,
    )


def _failure_times(machines: Set[str], failures: Failures | None) -> Iterator[tuple[str, float]]:
    """Which machine fails when, in order; at last nothing fails."""
    names = sorted(machines)
    if failures is not None and names and failures.every_s < math.inf:
        drawn, now = random.Random(failures.seed), 0.0  # noqa: S311 - nothing secret
        while True:
            now += drawn.expovariate(len(names) / failures.every_s)
            yield drawn.choice(names), now
    while True:
        yield "", math.inf


def _steady(groups: Sequence[_Group], tokens: int) -> float:
    """Seconds from token to token, without the first fourth: stages fill, rings too."""
    first = tokens // 4
    if tokens - first < 2:
        return max(group.ends[-1] for group in groups) / tokens
    return sum((group.ends[-1] - group.ends[first]) / (tokens - 1 - first) for group in groups) / len(groups)


@dataclass(slots=True)
class _Group:
    """Texts that go together: the rows of their next pass, and when each token was there."""

    rows: int
    ends: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Ring:
    """When the newest pieces in it were used, and the station whose pieces are read next, before anybody asks."""

    freed: list[float] = field(default_factory=list)
    expected: int | None = None


@dataclass(slots=True)
class _Machine:
    """When each of a machine's parts is free again, and for how long they were busy."""

    free: float = 0.0
    disk_free: float = 0.0
    link_in: float = 0.0
    link_out: float = 0.0
    rings: dict[int, _Ring] = field(default_factory=dict)
    computed_s: float = 0.0
    read_s: float = 0.0
    sent_s: float = 0.0

    def visit(self, now: float, station: Station, index: int, scale: float) -> float:
        """When a pass that arrives `now` has been computed: each piece after the one before, once it has been read."""
        self.free = max(self.free, now)
        compute, read = station.compute_s * scale / station.pieces, station.read_s / station.pieces
        ring = self.rings.setdefault(station.ring, _Ring())
        asked = 0.0 if ring.expected in (None, index) else self.free
        for _ in range(station.pieces):
            if station.read_s:
                room = ring.freed[-station.slots] if len(ring.freed) >= station.slots else 0.0
                self.disk_free = max(self.disk_free, room, asked) + read
                self.free = max(self.free, self.disk_free)
                ring.freed = [*ring.freed[1 - station.slots :], self.free + compute]
            self.free += compute
        if station.asked_s:
            self.free = self.disk_free = max(self.free, self.disk_free) + station.asked_s
        self.computed_s += station.compute_s * scale
        self.read_s += station.read_s + station.asked_s
        return self.free

    def lose(self, now: float, back: float) -> None:
        """Drop all work at `now`; the machine takes work again at `back`."""
        self.free, self.disk_free, self.link_in, self.link_out = back, back, now, now
        self.rings.clear()


def _same_ring(one: Station, other: Station) -> bool:
    return (one.machine, one.ring) == (other.machine, other.ring)


class _Run:
    """The events of a simulation: a group is sent to a station, visits it, and comes back."""

    def __init__(self, stations: Sequence[Station], groups: Sequence[_Group], tokens: int, prompt: int, driver: str) -> None:
        self.stations, self.groups, self._tokens, self._prompt = stations, groups, tokens, prompt
        self.machines = {station.machine: _Machine() for station in stations}
        self.replays = 0
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, _Group, int]] = []
        self._driver = self.machines[driver]
        for group in groups:
            self._add(0.0, "send", group, 0)

    @property
    def left(self) -> bool:
        """Whether a text lacks tokens."""
        return any(len(group.ends) < self._tokens for group in self.groups)

    def until(self, end: float) -> float:
        """Run all events before `end`; the time then."""
        now = 0.0
        while self._events and self._events[0][0] < end:
            now, _, kind, group, index = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(now, group, index)
        return end if self._events else now

    def fail(self, machine: str, now: float, recovery_s: float) -> None:
        """A machine fails: all passes under way end, and each text is computed again from its tokens."""
        self._events.clear()
        for name, one in self.machines.items():
            one.lose(now, now + recovery_s if name == machine else now)
        for group in self.groups:
            if len(group.ends) < self._tokens:
                group.rows = self._prompt + len(group.ends)
                self.replays += 1
                self._add(now, "send", group, 0)

    def _add(self, when: float, kind: str, group: _Group, index: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, group, index))

    def _send(self, now: float, group: _Group, index: int) -> None:
        station, machine = self.stations[index], self.machines[self.stations[index].machine]
        wire, driver_wire = station.wire_s * group.rows, station.driver_wire_s * group.rows
        start = max(now, self._driver.link_out, machine.link_in) if wire else now
        if wire:
            self._driver.link_out, machine.link_in = start + driver_wire, start + wire
            self._driver.sent_s += driver_wire
            machine.sent_s += wire
        self._add(start + wire + station.latency_s, "visit", group, index)

    def _visit(self, now: float, group: _Group, index: int) -> None:
        station, machine = self.stations[index], self.machines[self.stations[index].machine]
        end = machine.visit(now, station, index, 1 + (group.rows - 1) * station.further_row)
        if station.read_s:
            own = [place for place, other in enumerate(self.stations) if other.read_s and _same_ring(other, station)]
            machine.rings[station.ring].expected = own[(own.index(index) + 1) % len(own)]
        self._add(end, "back", group, index)

    def _back(self, now: float, group: _Group, index: int) -> None:
        station, machine = self.stations[index], self.machines[self.stations[index].machine]
        wire = station.wire_s * group.rows
        start = max(now, machine.link_out, self._driver.link_in) if wire else now
        if wire:
            machine.link_out, self._driver.link_in = start + wire, start + station.driver_wire_s * group.rows
        there = start + wire + station.latency_s
        self._add(there, "send" if index + 1 < len(self.stations) else "end", group, index + 1)

    def _end(self, now: float, group: _Group, index: int) -> None:
        del index
        group.ends.append(now)
        group.rows = 1
        if len(group.ends) < self._tokens:
            self._add(now, "send", group, 0)
