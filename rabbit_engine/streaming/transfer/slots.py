"""Decides which experts of a layer stay: the most used ones. A use counts less with each token that the layer sees later
(docs/benchmarks.md lists the policies that were tried). Pure: independent of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rabbit_engine.streaming.transfer.entry import Entry, HostPlace
from rabbit_engine.streaming.transfer.ring import Mark
from rabbit_engine.streaming.transfer.unit import Unit

HALF_LIFE_TOKENS = 32
"""A use counts half after its layer has seen this many more tokens."""

_MOST_AGE = 600.0
"""Halvings before scores are rescaled: floats hold about a thousand."""

_LEAST_USE = 1e-3
"""A use that is remembered for the next start counts at least this much."""


@dataclass(slots=True, eq=False)
class Expert:
    """One expert. A `kept` one stays on the device, or in host memory if it has a place there; `entry` is set from its request
    until it leaves the device; `is_read` tells whether its last use read the disk."""

    unit: Unit
    index: int
    kept: bool = False
    score: float = 0.0
    host: HostPlace | None = None
    entry: Entry | None = None
    last_use: Mark = None
    is_read: bool = False

    @property
    def is_here(self) -> bool:
        """Whether it is on the device."""
        return self.entry is not None and self.entry.state == "here"

    @property
    def in_host(self) -> bool:
        """Whether its bytes are in host memory."""
        return self.host is not None and self.host.filled


@dataclass(slots=True)
class ExpertLayer:
    """One layer's experts, of which a token uses `used`, and the numbers it may keep on the device and in host memory."""

    name: str
    units: Sequence[Unit]
    used: int
    on_device: int
    in_host: int = 0
    experts: list[Expert] = field(init=False)
    age: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.experts = [Expert(unit, index) for index, unit in enumerate(self.units)]

    def count(self, uses: Mapping[int, float], tokens: int) -> None:
        """Add the uses of a pass over `tokens` tokens, weighted as of its end: older uses fade, as newer ones weigh more."""
        self.age += tokens / HALF_LIFE_TOKENS
        if self.age > _MOST_AGE:
            for expert in self.experts:
                expert.score *= 2.0**-self.age
            self.age = 0.0
        for index, weight in uses.items():
            self.experts[index].score += weight * 2.0**self.age

    def uses(self) -> dict[int, float]:
        """The uses of each expert, weighted as of now; without those that have faded."""
        now = {expert.index: expert.score * 2.0**-self.age for expert in self.experts}
        return {index: use for index, use in now.items() if use >= _LEAST_USE}

    def most_used(self) -> list[Expert]:
        """Those that were ever used, the most used first."""
        return [expert for expert in _by_use(self.experts) if expert.score > 0]

    def kept(self) -> list[Expert]:
        """The experts that stay."""
        return [expert for expert in self.experts if expert.kept]


@dataclass(frozen=True, slots=True)
class Stay:
    """`expert` is to stay: in place of another one, or where there is room, in host memory or on the device."""

    expert: Expert
    instead_of: Expert | None = None
    in_host: bool = False


def who_stays(layer: ExpertLayer, needed: Sequence[Expert]) -> list[Stay]:
    """Which of the `needed` experts that are not kept will stay, the most used first: where there is room, or in place of one
    that is not needed now or was used less.

    A layer that keeps no more than a token uses would forget everything at each token: there, only a more used one stays.
    """
    new = _by_use(expert for expert in needed if not expert.kept and not expert.is_here)
    if not new:
        return []
    kept, now = layer.kept(), {*needed}
    idle = _by_use(expert for expert in kept if expert not in now)
    in_use = _by_use(expert for expert in kept if expert in now and expert.is_here)
    is_small = layer.on_device + layer.in_host <= layer.used
    room_in_host = layer.in_host - sum(expert.host is not None for expert in kept)
    room = layer.on_device - sum(expert.host is None for expert in kept)
    stays: list[Stay] = []
    for expert in new:
        if room > 0:
            room -= 1
            stays.append(Stay(expert))
        elif room_in_host > 0:
            room_in_host -= 1
            stays.append(Stay(expert, in_host=True))
        elif idle and (not is_small or idle[-1].score < expert.score):
            stays.append(Stay(expert, instead_of=idle.pop()))
        elif in_use and in_use[-1].score < expert.score:
            stays.append(Stay(expert, instead_of=in_use.pop()))
        else:
            break
    return stays


def _by_use(experts: Iterable[Expert]) -> list[Expert]:
    """Sorted by use, the least used one last."""
    return sorted(experts, key=lambda expert: -expert.score)
