"""A model as a row of stages: ranges of layers on several machines, or on several devices, and the cost of a pass. Pure.

`stage_costs` says what a stage costs. A pass of one text is the sum of the stages' turns. Several texts go in groups, one behind
another, which fill all stages at once: then a pass takes as long as its busiest machine, each group reading what is streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.planning import stages_report
from rabbit_engine.planning.machines import Machine
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.stage_costs import LayeredUnits, StageBound, StageWork, Turn, place_on, turn_of, work_of
from rabbit_engine.planning.stage_waits import RingUse, with_waits
from rabbit_engine.utils.report import Report

_ROUNDING = 1e-9
"""Of sums of seconds that differ by as little, none is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Layers `first` to `stop` on `machine`, whose `plan` says which units of all its layers stay, and the `work` of a pass."""

    machine: Machine
    first: int
    stop: int
    plan: Plan
    work: StageWork

    @property
    def layers(self) -> range:
        """Its layers."""
        return range(self.first, self.stop)

    @property
    def streamed_bytes(self) -> int:
        """Bytes from disk in a pass with one text, on average if experts are among them."""
        return round(self.work.read_bytes(1))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay on the machine, with cached experts: of all its stages."""
        return self.plan.resident_bytes + self.plan.experts.device_bytes


@dataclass(frozen=True, slots=True)
class HeldStages:
    """The stages of a machine that were placed together: one process has them, with one ring for all of their weights."""

    stages: tuple[Stage, ...]

    @property
    def machine(self) -> Machine:
        """Where they are."""
        return self.stages[0].machine

    @property
    def plan(self) -> Plan:
        """Which of their units stay."""
        return self.stages[0].plan

    @property
    def layers(self) -> tuple[int, ...]:
        """Their layers, ascending."""
        return tuple(layer for stage in self.stages for layer in stage.layers)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StagesPlan(Report):
    """The `stages` of a pass, in order, over `machines`, of which the first is the driver: it keeps what stands around the layers
    too, with the work `ends`. A machine may have no stage, or several. It was made for `texts` in a pass."""

    units: LayeredUnits
    machines: tuple[Machine, ...]
    stages: tuple[Stage, ...]
    ends_plan: Plan
    ends: StageWork
    texts: int = 1

    @property
    def driver(self) -> Machine:
        """The machine that begins and ends each pass."""
        return self.machines[0]

    @property
    def held(self) -> tuple[HeldStages, ...]:
        """The stages by what they were placed with: those of a machine, and beside them those that it took over."""
        found: dict[int, list[Stage]] = {}
        for stage in self.stages:
            found.setdefault(id(stage.plan), []).append(stage)
        return tuple(HeldStages(tuple(stages)) for stages in found.values())

    def stages_of(self, name: str) -> tuple[Stage, ...]:
        """The stages of a machine."""
        return tuple(stage for stage in self.stages if stage.machine.name == name)

    def plans_of(self, name: str) -> list[Plan]:
        """What a machine holds: one plan, or more if it took over a stage."""
        plans = [stage.plan for stage in self.stages_of(name)]
        plans += [self.ends_plan] if name == self.driver.name else []
        return [plan for index, plan in enumerate(plans) if all(plan is not other for other in plans[:index])]

    @property
    def max_memory(self) -> dict[str, int]:
        """The bytes of memory for weights and their buffers on each machine that holds any."""
        held = {one.name: sum(plan.device_bytes for plan in self.plans_of(one.name)) for one in self.machines}
        return {name: nbytes for name, nbytes in held.items() if nbytes}

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay in memory, of all machines."""
        plans = [plan for machine in self.machines for plan in self.plans_of(machine.name)]
        return sum(plan.resident_bytes + plan.experts.device_bytes for plan in plans)

    @property
    def pass_bytes(self) -> int:
        """Bytes from all disks in a pass of one text, on average if experts are among them."""
        return round(self.ends.read_bytes(1)) + sum(stage.streamed_bytes for stage in self.stages)

    def turns(self, texts: int = 1) -> tuple[Turn, ...]:
        """The turn of each stage in a pass with `texts`, and last that of the driver's ends."""
        nbytes, before, found = texts * self.units.hidden_bytes, self.driver.name, []
        for stage in self.stages:
            there = before == stage.machine.name  # the states are there already
            before = stage.machine.name
            found.append(self._use(stage.work, stage.plan, stage.machine, texts, 0 if there else nbytes))
        return with_waits((*found, self._use(self.ends, self.ends_plan, self.driver, texts, 0)))

    def _use(self, work: StageWork, plan: Plan, machine: Machine, texts: int, nbytes: int) -> RingUse:
        turn = turn_of(work, plan, machine, texts, self.driver, nbytes)
        return RingUse(turn, work, id(plan), plan.ring_bytes, machine.disk_rate)

    @property
    def pass_s(self) -> float:
        """Seconds of a pass of one text: of a token."""
        return self.seconds(1)

    def seconds(self, texts: int, groups: int | None = None) -> float:
        """Seconds until each of `texts` has one more token, if they go in that many `groups` one behind another; in the best
        number of them by default."""
        if groups is None:
            return self.seconds(texts, self.groups(texts))
        turns = self.turns(-(-texts // groups))
        return max(sum(turn.seconds for turn in turns), groups * self._busiest(turns)[0])

    def groups(self, texts: int) -> int:
        """The number of groups that `texts` go in for the least seconds: one if stages share a ring, which reads ahead in the
        order of one pass."""
        if self._shares_rings:
            return 1
        return min(numbers_of_groups(texts, len(self.machines)), key=lambda each: self.seconds(texts, each))

    @property
    def _shares_rings(self) -> bool:
        """Whether stages that stream share the ring of their machine."""
        rings = [id(stage.plan) for stage in self.stages if stage.work.streams]
        return len(set(rings)) < len(rings)

    def token_s(self, texts: int) -> float:
        """Seconds a token, of all texts together."""
        return self.seconds(texts) / texts

    def _busiest(self, turns: Sequence[Turn]) -> tuple[float, str, StageBound]:
        """The seconds that one group takes from the processors, disk or link that it takes most of, whose, and the kind."""
        busy: dict[tuple[str, StageBound | Literal["processors"]], float] = {}
        owners = [*(stage.machine for stage in self.stages), self.driver]
        for turn, machine in zip(turns, owners, strict=True):
            kinds: tuple[tuple[str, StageBound | Literal["processors"], float], ...] = (
                (machine.name, "computing", turn.compute_s),
                (machine.processors_name, "processors", turn.compute_s * machine.processors_share),
                (machine.disk_name, "disk", turn.disk_s),
                (machine.name, "link", turn.wire_s),
                (self.driver.name, "link", turn.driver_wire_s),
            )
            for name, kind, seconds in kinds:
                busy[name, kind] = busy.get((name, kind), 0.0) + seconds
        (name, kind), seconds = max(busy.items(), key=lambda item: item[1])
        if kind == "processors":
            return seconds, ", ".join(one.name for one in self.machines if one.processors_name == name), "computing"
        return seconds, name, kind

    def bound(self, texts: int = 1) -> tuple[StageBound, str]:
        """What bounds a pass of `texts`: computing, a disk or a link, and the machine if it is that of one alone."""
        groups = self.groups(texts)
        turns = self.turns(-(-texts // groups))
        busiest, name, kind = self._busiest(turns)
        if groups * busiest >= sum(turn.seconds for turn in turns) * (1 - _ROUNDING):
            return kind, name
        parts: dict[StageBound, float] = {
            "computing": sum(turn.compute_s for turn in turns),
            "disk": sum(turn.waiting_s for turn in turns),
            "link": sum(turn.hop_s for turn in turns),
        }
        return max(parts, key=parts.__getitem__), ""

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (name, value) rows."""
        return stages_report.rows(self)

    def __repr__(self) -> str:
        return stages_report.line(self)


def numbers_of_groups(texts: int, machines: int) -> list[int]:
    """The numbers of groups to try: more than two for each machine would only wait for each other."""
    return [each for each in range(1, min(texts, 2 * machines) + 1) if each == 1 or -(-texts // each) < -(-texts // (each - 1))]


def row_of_stages(
    units: LayeredUnits, machines: Sequence[Machine], layers: Sequence[tuple[int, range]], *, texts: int = 1
) -> StagesPlan:
    """The plan with given ranges: of each, the index of its machine and the layers. Raises BudgetError if a machine's layers do
    not fit in its memory even streamed, or if it streams nothing."""
    plans: dict[int, Plan] = {}
    for index, machine in enumerate(machines):
        own = [layer for owner, found in layers if owner == index for layer in found]
        if own or index == 0:
            sizes = [*(units.ends if index == 0 else ()), *units.of(own)]
            plans[index] = place_on(machine, sizes, len(own) * units.cache_bytes)
    stages = [
        Stage(
            machine=machines[owner],
            first=found.start,
            stop=found.stop,
            plan=plans[owner],
            work=work_of(units.of(found), plans[owner], len(found)),
        )
        for owner, found in layers
        if found
    ]
    ends = work_of(units.ends, plans[0], 0)
    return StagesPlan(units=units, machines=tuple(machines), stages=tuple(stages), ends_plan=plans[0], ends=ends, texts=texts)
