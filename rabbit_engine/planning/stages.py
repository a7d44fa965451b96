"""Cuts a model into stages for the least seconds a pass, by dynamic programming over layers and machines. Pure.

`stage_costs` says what a stage costs; `stages_plan` adds the stages up. With more than one round, a machine has several ranges of
layers, and the machines take turns: while one computes, all the others read the weights of their next range. So disks add up
for a single text too, which one range a machine, with its small ring, does not give: there a disk rests while others read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rabbit_engine.errors import BudgetError, ConfigurationError
from rabbit_engine.planning.machines import Machine
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.stage_costs import LayeredUnits, StageWork, layered_units, place_on, turn_of, work_of
from rabbit_engine.planning.stages_plan import HeldStages, Stage, StagesPlan, numbers_of_groups, row_of_stages
from rabbit_engine.planning.tiers import UnitSize
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.spans import format_layers

__all__ = ["LayeredUnits", "Machine", "Stage", "StagesPlan", "crowd", "layered_units", "plan_stages", "take_over"]

Seconds = np.ndarray[Any, np.dtype[np.float64]]
"""[layers + 1, layers + 1]: of the layers from the first index to the second."""

_MOST_ORDERS = 24
_READING = 0.25
"""What reading counts where computing hides it: memory is better, as reads take computing too."""

MOST_ROUNDS = 32
"""Ranges of layers on a machine, at most, where machines take turns."""

SEVERAL = 4
"""Texts for which turns must not be slower: with one range a machine, all machines compute at once."""

_LEAST_SAVED = 0.05
"""The share of the seconds that more ranges a machine must save: rings are not always full in time for them."""

_BALANCE = 1e-3
"""What squares of the machines' seconds add to the sum, at most: of sums as close as this the most even is taken."""


def plan_stages(
    units: LayeredUnits, machines: Sequence[Machine], *, texts: int = 1, most_rounds: int = 1, several: int = SEVERAL
) -> StagesPlan:
    """The stages with which a pass of `texts` takes the least seconds.

    The first of `machines` is the driver, the first to run. The others follow in the best order, if they are few and layers
    differ. A machine may get no layers. With `most_rounds` above 1, machines that read from several disks may take turns with
    several ranges each, if that saves some percent and a pass of `several` texts takes no longer than with one range each. Raises
    BudgetError, which names what is missing, if the model does not fit even streamed.
    """
    if not machines or len({machine.name for machine in machines}) < len(machines):
        names = ", ".join(machine.name for machine in machines) or "none"
        raise ConfigurationError(f"machines must have different names, and there must be one at least: {names}")
    searches = [(_Search(units, order), _some_groups(texts, len(order))) for order in _orders(units, machines)]
    best = _best_of(searches, texts, 1)
    if best is None:
        raise _too_little(units, machines)
    in_ranges = best
    if not best.pass_bytes or len({machine.disk_name for machine in machines}) < 2:
        return best
    for rounds in _doubling(most_rounds)[1:]:
        found = _best_of(searches, texts, rounds)
        saves = found is not None and found.seconds(texts) < best.seconds(texts) * (1 - _LEAST_SAVED)
        if found is not None and saves and found.seconds(several) <= in_ranges.seconds(several) * (1 + _BALANCE):
            best = found
    return best


def _best_of(searches: Sequence[tuple[_Search, Sequence[int]]], texts: int, rounds: int) -> StagesPlan | None:
    """The plan with the least seconds, of those that each search finds with its numbers of groups."""
    best: StagesPlan | None = None
    for search, numbers in searches:
        for groups in numbers:
            found = search.best(rounds, groups, -(-texts // groups))
            if found is not None and (best is None or found.seconds(texts) < best.seconds(texts) * (1 - _BALANCE)):
                best = replace(found, texts=texts)
    return best


def take_over(plan: StagesPlan, lost: str) -> StagesPlan:
    """The plan without the machine `lost`: what it had goes to that machine with room left which gives the least seconds.

    Machines keep what they hold, and stages that were placed together stay together. Raises BudgetError if none has room, or if
    the driver is lost: then plan anew.
    """
    if lost == plan.driver.name:
        raise BudgetError(f"{lost} is the driver, which keeps what stands around the layers: load the model anew on another")
    left = tuple(machine for machine in plan.machines if machine.name != lost)
    found = replace(plan, machines=left)
    for orphan in plan.held:
        if orphan.machine.name == lost:
            found = _taken_over(found, orphan)
    return found


def crowd(plan: StagesPlan, lost: str) -> StagesPlan:
    """The plan without the machine `lost`: what it had goes to that machine which then gives the least seconds, though all of its
    stages hold less: its memory is divided among what it holds by bytes. The driver holds what it holds.

    Raises BudgetError if no machine is left that has the memory to stream what it would have.
    """
    found = replace(plan, machines=tuple(machine for machine in plan.machines if machine.name != lost))
    for orphan in plan.held:
        if orphan.machine.name == lost:
            found = _crowded(found, orphan)
    return found


def _crowded(plan: StagesPlan, orphan: HeldStages) -> StagesPlan:
    found, problems = [], []
    for machine in plan.machines[1:]:
        moved = HeldStages(tuple(replace(stage, machine=machine) for stage in orphan.stages))
        there = [moved, *(one for one in plan.held if one.machine.name == machine.name)]
        try:
            found.append(_with(plan, _divided(plan.units, machine, there)))
        except BudgetError as error:
            problems.append(str(error))
    if not found:
        raise BudgetError(
            f"no machine is left with memory for {format_layers(orphan.layers)} of {orphan.machine.name} "
            f"({'; '.join(problems) or 'the driver holds its own already'}): load the model again with the machines that are left"
        )
    return min(found, key=lambda one: one.seconds(plan.texts))


def _divided(units: LayeredUnits, machine: Machine, held: Sequence[HeldStages]) -> list[Stage]:
    """All those stages, with the memory of `machine` divided among what was placed together. Raises BudgetError."""
    nbytes = [sum(unit.nbytes for unit in units.of(one.layers)) for one in held]
    shares = [machine.memory_bytes * own // max(1, sum(nbytes)) for own in nbytes]
    return [stage for one, share in zip(held, shares, strict=True) for stage in _placed_on(units, machine, one, share)]


def _placed_on(units: LayeredUnits, machine: Machine, held: HeldStages, nbytes: int) -> list[Stage]:
    """The stages on `machine`, in `nbytes` of its memory. Raises BudgetError."""
    room = replace(machine, memory_bytes=nbytes)
    plan = place_on(room, units.of(held.layers), len(held.layers) * units.cache_bytes)
    return [
        replace(stage, machine=machine, plan=plan, work=work_of(units.of(stage.layers), plan, len(stage.layers)))
        for stage in held.stages
    ]


def _with(plan: StagesPlan, stages: Sequence[Stage]) -> StagesPlan:
    """The plan with these stages in place of those of the same layers."""
    new = {stage.first: stage for stage in stages}
    return replace(plan, stages=tuple(new.get(stage.first, stage) for stage in plan.stages))


def _taken_over(plan: StagesPlan, orphan: HeldStages) -> StagesPlan:
    found, problems = [], []
    for machine in plan.machines:
        held = sum(one.held_bytes(one.device) for one in plan.plans_of(machine.name))
        try:
            stages = _placed_on(plan.units, machine, orphan, max(0, machine.memory_bytes - held))
        except BudgetError as error:
            problems.append(error)
            continue
        found.append(_with(plan, stages))
    if not found:
        least = min(problems, key=lambda error: error.smallest_bytes).smallest_bytes
        raise BudgetError(
            f"no machine has {format_bytes(least)} left for {format_layers(orphan.layers)} of {orphan.machine.name}: "
            "plan anew with the machines that are left",
            least,
        )
    return min(found, key=lambda one: one.seconds(plan.texts))


def _orders(units: LayeredUnits, machines: Sequence[Machine]) -> Iterator[Sequence[Machine]]:
    """The driver first; the others as given, or in each order that makes a difference, if those are few."""
    driver, *others = machines
    kinds = [replace(machine, name="one", disk=machine.disk) for machine in others]
    yield machines
    if len(set(map(_shape, units.layers))) < 2 or len(set(kinds)) < 2 or math.factorial(len(others)) > _MOST_ORDERS:
        return
    seen = {tuple(kinds)}
    for order in itertools.permutations(range(len(others))):
        kind = tuple(kinds[index] for index in order)
        if kind not in seen:
            seen.add(kind)
            yield [driver, *(others[index] for index in order)]


def _shape(layer: Sequence[UnitSize]) -> tuple[UnitSize, ...]:
    return tuple(replace(unit, name="") for unit in layer)


def _doubling(most: int) -> list[int]:
    """1, 2, 4 and so on up to `most`."""
    return [2**power for power in range(max(1, most).bit_length())]


def _some_groups(texts: int, machines: int) -> list[int]:
    """Few numbers of groups, from one to the most that may help."""
    numbers = numbers_of_groups(texts, machines)
    return [number for number in numbers if number in (*_doubling(numbers[-1]), machines, numbers[-1])]


@dataclass(slots=True)
class _Held:
    """A range of layers on a machine, as placed there; with the driver's ends if it is the driver's."""

    plan: Plan
    work: StageWork
    ends: StageWork | None


class _Search:
    """Looks for the best ranges over the `machines` in this order."""

    def __init__(self, units: LayeredUnits, machines: Sequence[Machine]) -> None:
        self._units, self._machines = units, machines
        kinds: dict[tuple[UnitSize, ...], int] = {}
        self._kinds = tuple(kinds.setdefault(_shape(layer), len(kinds)) for layer in units.layers)
        self._held: dict[object, _Held | None] = {}

    def best(self, rounds: int, groups: int, texts: int) -> StagesPlan | None:
        """The plan of `texts` in each of `groups`, with each machine's layers in `rounds` ranges; None if nothing fits."""
        tables = [self._tables(index, rounds, groups, texts) for index in range(len(self._machines))]
        counts = _shares(*zip(*tables, strict=True))
        if counts is None:
            return None
        try:
            return row_of_stages(self._units, self._machines, _dealt(counts, rounds))
        except BudgetError:  # with several rounds a machine gets other layers, which may be larger
            return None

    def _tables(self, index: int, rounds: int, groups: int, texts: int) -> tuple[Seconds, Seconds, Seconds]:
        """Of each range of layers on that machine: what it adds to a pass of one group, for how long all groups keep the machine
        busy, and the reading."""
        count = len(self._kinds)
        tables = np.full((3, count + 1, count + 1), math.inf)
        known: dict[object, tuple[float, float, float]] = {}
        for first in range(count + 1) if index else (0,):
            for stop in range(first, count + 1):
                key = self._kinds[first:stop]
                if key not in known:
                    known[key] = self._costs(index, range(first, stop), rounds, groups, texts)
                tables[:, first, stop] = known[key]
        return tables[0], tables[1], tables[2]

    def _costs(self, index: int, layers: range, rounds: int, groups: int, texts: int) -> tuple[float, float, float]:
        machine, driver = self._machines[index], self._machines[0]
        if not layers and index:
            return 0.0, 0.0, 0.0
        held = self._placed(index, layers)
        if held is None:
            return math.inf, math.inf, math.inf
        nbytes, times = texts * self._units.hidden_bytes, min(rounds, max(1, len(layers)))
        turn = turn_of(held.work, held.plan, machine, texts, driver, nbytes)
        ahead = min(turn.read_s, turn.ahead_s * times)
        seconds = max(turn.compute_s, turn.read_s - ahead) + turn.asked_s + turn.hop_s * times
        compute, read = turn.compute_s, turn.disk_s
        if held.ends is not None:
            ends = turn_of(held.ends, held.plan, machine, texts, driver, 0)
            seconds, compute, read = seconds + ends.seconds, compute + ends.compute_s, read + ends.disk_s
        return seconds, groups * max(compute, read, turn.wire_s * times), read

    def _placed(self, index: int, layers: range) -> _Held | None:
        machine = self._machines[index]
        key = (replace(machine, name="one"), index == 0, self._kinds[layers.start : layers.stop])
        if key not in self._held:
            self._held[key] = self._place(machine, index == 0, layers)
        return self._held[key]

    def _place(self, machine: Machine, is_driver: bool, layers: range) -> _Held | None:
        own = self._units.of(layers)
        ends = self._units.ends if is_driver else ()
        try:
            plan = place_on(machine, [*ends, *own], len(layers) * self._units.cache_bytes)
        except BudgetError:
            return None
        return _Held(plan, work_of(own, plan, len(layers)), work_of(ends, plan, 0) if is_driver else None)


def _shares(sums: Sequence[Seconds], busy: Sequence[Seconds], reading: Sequence[Seconds]) -> list[int] | None:
    """How many layers each machine takes so that the larger of the sum of `sums` and the most of `busy` is least; of choices
    about as good, one that reads little and is even."""
    finite = np.concatenate([table[np.isfinite(table)] for table in busy])
    scale = max(1e-12, float(finite.max(initial=0.0)))
    even = [
        total + _READING * read + _BALANCE * most * (most / scale) for total, most, read in zip(sums, busy, reading, strict=True)
    ]
    counts = _least(even)
    if counts is None:
        return None
    limits = np.unique(finite)
    low, high = 0, int(np.searchsorted(limits, _most(busy, counts)))  # at `high` nothing changes
    found = [counts]
    while low < high:  # the least limit on a machine's seconds that the sum does not exceed
        middle = (low + high) // 2
        limited = _least([np.where(most <= limits[middle], total, math.inf) for total, most in zip(even, busy, strict=True)])
        if limited is not None:
            found.append(limited)
        if limited is not None and _sum(sums, limited) <= limits[middle]:
            high = middle
        else:
            low = middle + 1
    return min(found, key=lambda each: (max(_sum(sums, each), _most(busy, each)), _sum(even, each)))


def _least(tables: Sequence[Seconds]) -> list[int] | None:
    """How many layers each machine takes, in order, so that the sum is least; None if no choice is possible."""
    reached, choices = tables[0][0], []
    for table in tables[1:]:
        through = reached[:, None] + table
        choices.append(through.argmin(axis=0))
        reached = through.min(axis=0)
    stop = len(reached) - 1
    if not math.isfinite(reached[stop]):
        return None
    counts = []
    for choice in reversed(choices):
        counts.append(stop - int(choice[stop]))
        stop = int(choice[stop])
    return [stop, *reversed(counts)]


def _ranges(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    stop = 0
    for count in counts:
        yield stop, stop + count
        stop += count


def _sum(tables: Sequence[Seconds], counts: Sequence[int]) -> float:
    return float(sum(table[found] for table, found in zip(tables, _ranges(counts), strict=True)))


def _most(tables: Sequence[Seconds], counts: Sequence[int]) -> float:
    return float(max(table[found] for table, found in zip(tables, _ranges(counts), strict=True)))


def _dealt(counts: Sequence[int], rounds: int) -> list[tuple[int, range]]:
    """The ranges of each round, with the index of the machine: a machine's layers, divided evenly among the rounds."""
    found, stop = [], 0
    for turn in range(rounds):
        for index, count in enumerate(counts):
            own = count * (turn + 1) // rounds - count * turn // rounds
            if own:
                found.append((index, range(stop, stop + own)))
                stop += own
    return found


def _too_little(units: LayeredUnits, machines: Sequence[Machine]) -> BudgetError:
    """What is missing: for the driver's ends, for a layer on any machine, or for all of them together."""
    try:
        place_on(machines[0], units.ends, 0)
    except BudgetError as error:
        return BudgetError(
            f"{error}: {machines[0].name} is the first, and keeps what stands around the layers. Give it more with max_memory",
            error.smallest_bytes,
        )
    room, least = {}, []
    for index, machine in enumerate(machines):
        ends = units.ends if index == 0 else ()
        room[machine.name] = 0
        for count in range(1, len(units.layers) + 1):
            try:
                place_on(machine, [*ends, *units.of(range(count))], count * units.cache_bytes)
            except BudgetError as error:
                least.append(error)
                break
            room[machine.name] = count
    fit = ", ".join(f"{name} {count}" for name, count in room.items())
    smallest = min(least, key=lambda error: error.smallest_bytes)
    return BudgetError(
        f"the machines hold too few of the {len(units.layers)} layers even streamed ({fit}): add machines or memory; {smallest}",
        smallest.smallest_bytes,
    )
