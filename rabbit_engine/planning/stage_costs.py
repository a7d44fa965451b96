"""What a stage costs a pass: its computing, its reads, its messages. Pure.

A stage computes with its weights and, if they do not all stay, reads the others from disk meanwhile, through a ring. While other
stages compute, it fills the ring for its next turn, and no more than the ring: so a turn takes at least

    max(computing, reading - what was read ahead) + reading of experts that it lacks + messages to the stage and back

and more where units are large for their ring, as one is read into the room of those before it: `stage_waits` follows that. A pass
of one text is the sum of the turns, but no shorter than all the reads of any one disk. The states of a text go from
the driver to a stage and back to the driver, which sends them to the next: two messages a stage, none to the driver's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.experts import Routing
from rabbit_engine.planning.machines import Machine
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.tiers import DISK, Budget, UnitSize
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.speeds import Speeds

if TYPE_CHECKING:
    from rabbit_engine.planning.partition import Partition

StageBound = Literal["computing", "disk", "link"]

_MEMORY = "cpu"
"""The name of a machine's memory in its own plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredUnits:
    """A model's units: those of each of its `layers`, in order, and of its `ends`, all the others, which the driver keeps.

    A token's states between two layers have `hidden_bytes`, and the caches of all texts `cache_bytes` in each layer.
    """

    layers: tuple[tuple[UnitSize, ...], ...]
    ends: tuple[UnitSize, ...]
    hidden_bytes: int
    cache_bytes: int = 0

    def of(self, layers: Iterable[int]) -> list[UnitSize]:
        """The units of those layers."""
        return [unit for index in layers for unit in self.layers[index]]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(unit.nbytes for unit in (*self.ends, *self.of(range(len(self.layers)))))


def layered_units(partition: Partition, *, cached_tokens: int = 0) -> LayeredUnits:
    """The units of a partition by layer, with room for the caches of `cached_tokens`."""
    layout, probe = partition.layout, partition.probe
    layers: dict[str, list[UnitSize]] = {name: [] for name in layout.layers}
    ends: list[UnitSize] = []
    for size in partition.sizes:
        layers.get(layout.shard_of(f"{size.name}."), ends).append(size)
    entry = partition.weights.entries.get(partition.embedding or "")
    hidden = entry.shape[-1] * entry.dtype.itemsize if entry is not None else probe.carried_token_bytes
    tokens = probe.cache_token_bytes * cached_tokens + (probe.cache_fixed_bytes if cached_tokens else 0)
    return LayeredUnits(
        layers=tuple(map(tuple, layers.values())),
        ends=tuple(ends),
        hidden_bytes=hidden,
        cache_bytes=-(-tokens // len(layers)),
    )


@dataclass(frozen=True, slots=True)
class StreamedUnit:
    """A unit of `used_bytes` that passes through the ring, for which `read_bytes` are read. Between the one before and this one,
    `before_bytes` that stay are computed with."""

    before_bytes: int
    used_bytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a pass does with some units on one machine: `used_bytes` are computed with for every text, the units `streamed` are
    read from disk once for all of them. Of `experts`, alike in some number of layers, a number is cached."""

    layers: int = 0
    used_bytes: int = 0
    streamed: tuple[StreamedUnit, ...] = ()
    experts: tuple[tuple[Routing, int, int], ...] = ()

    @property
    def streams(self) -> bool:
        """Whether a pass reads any of it through the ring."""
        return bool(self.streamed)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass reads through the ring."""
        return sum(unit.read_bytes for unit in self.streamed)

    def compute_s(self, machine: Machine, texts: int) -> float:
        """Seconds to compute with `texts` in one pass: the first use of a weight in full, each further one for less."""
        further = 1 + (texts - 1) * machine.further_text
        nbytes = self.used_bytes * further
        for routing, _, layers in self.experts:
            first = different_experts(routing, texts)
            nbytes += layers * routing.nbytes * (first + (texts * routing.used - first) * machine.further_text)
        return nbytes * machine.seconds_per_byte + self.layers * further * machine.seconds_per_layer

    def read_bytes(self, texts: int) -> float:
        """Bytes from disk in a pass with `texts`."""
        return self.streamed_bytes + self.asked_bytes(texts)

    def asked_bytes(self, texts: int) -> float:
        """Bytes of experts from disk, if each is as likely as any other. Only the layer knows which: nobody reads them ahead."""
        return sum(
            layers * routing.read_bytes * different_experts(routing, texts) * (1 - cached / routing.count)
            for routing, cached, layers in self.experts
        )


def different_experts(routing: Routing, texts: int) -> float:
    """How many of a layer's experts a pass with `texts` uses on average, if each is as likely as any other."""
    return routing.count * (1 - (1 - routing.used / routing.count) ** texts)


def work_of(units: Iterable[UnitSize], plan: Plan, layers: int) -> StageWork:
    """The work with `units` of `layers` layers that `plan` places. What runs in few passes is left out."""
    cached = {layer.name: sum(layer.cached) for layer in plan.experts.layers}
    used = before = 0
    streamed: list[StreamedUnit] = []
    experts: Counter[tuple[Routing, int]] = Counter()
    for unit in units:
        if unit.routing is not None:
            experts[unit.routing, cached.get(unit.name, unit.routing.count)] += 1
        elif not unit.rare and unit.role != "embedding":
            used += unit.nbytes
            if plan.tier_of[unit.name] == DISK:
                streamed.append(StreamedUnit(before, unit.nbytes, unit.disk_bytes))
                before = 0
            else:
                before += unit.nbytes
    return StageWork(layers, used, tuple(streamed), tuple((routing, held, count) for (routing, held), count in experts.items()))


def place_on(machine: Machine, units: Sequence[UnitSize], cache_bytes: int = 0) -> Plan:
    """The plan of `units` in the machine's memory, with room for caches. Raises BudgetError, which names the machine, if they do
    not fit even streamed, or must be and it streams nothing."""
    budget = Budget(device_bytes=machine.memory_bytes, reserved_bytes=cache_bytes)
    try:
        plan = place(units, _MEMORY, budget, Speeds(disk=machine.disk_rate, source=machine.source))
    except BudgetError as error:
        raise _too_small(machine, "to stream its part of the model", error.smallest_bytes) from error
    if not machine.disk_rate and (plan.streamed or plan.experts.layers):
        need = sum(unit.nbytes for unit in units if unit.role != "embedding") + cache_bytes
        raise _too_small(machine, "for its part of the model, as it reads from no disk", need)
    return plan


def _too_small(machine: Machine, what_for: str, need: int) -> BudgetError:
    return BudgetError(
        f"{machine.name} needs {format_bytes(need)} {what_for}, and has {format_bytes(machine.memory_bytes)}", need
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """A stage's part of a pass, in seconds: computing, reading while it computes, of that what is read ahead, reading that
    computing waits for (`asked_s`), and messages there and back. Each message keeps the link of its machine busy for `wire_s`,
    that of the driver for `driver_wire_s`. It waits `late_s` for its ring; if nobody has followed that, the least it must."""

    compute_s: float
    read_s: float = 0.0
    ahead_s: float = 0.0
    asked_s: float = 0.0
    hop_s: float = 0.0
    wire_s: float = 0.0
    driver_wire_s: float = 0.0
    late_s: float | None = None

    @property
    def disk_s(self) -> float:
        """Seconds in which its disk is busy."""
        return self.read_s + self.asked_s

    @property
    def waiting_s(self) -> float:
        """Seconds in which it waits for its disk and computes nothing."""
        late_s = max(0.0, self.read_s - self.ahead_s - self.compute_s) if self.late_s is None else self.late_s
        return late_s + self.asked_s

    @property
    def seconds(self) -> float:
        """Seconds from the message to the stage to the answer."""
        return self.compute_s + self.waiting_s + self.hop_s

    @property
    def bound(self) -> StageBound:
        """What most of its time goes to."""
        if self.hop_s > self.compute_s + self.waiting_s:
            return "link"
        return "disk" if max(self.read_s - self.ahead_s, self.waiting_s) > self.compute_s else "computing"


def turn_of(work: StageWork, plan: Plan, machine: Machine, texts: int, driver: Machine, nbytes: int) -> Turn:
    """The turn of a stage in a pass with `texts`, to which a message of `nbytes` goes from the `driver`; 0 if the states are
    there."""
    read, asked = (moved / machine.disk_rate if moved else 0.0 for moved in (work.streamed_bytes, work.asked_bytes(texts)))
    ahead = min(read, plan.ring_bytes / machine.disk_rate) if read else 0.0
    compute = work.compute_s(machine, texts)
    if not nbytes or machine.name == driver.name:
        return Turn(compute, read, ahead, asked)
    wire, driver_wire = nbytes / min(machine.link_rate, driver.link_rate), nbytes / driver.link_rate
    return Turn(compute, read, ahead, asked, 2 * (machine.link_latency_s + wire), wire, driver_wire)
