"""Byte counts of experts that are read as they are routed to, and memory shared among their layers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUSY_BYTES = 64 * 2**20
"""What keeps four reads of 8 MiB under way while four have arrived."""


@dataclass(frozen=True, slots=True)
class Routing:
    """A layer's experts: `count` of them, of which a token uses `used`. One takes `nbytes` of memory, and its read asks the
    disk for `read_bytes`."""

    count: int
    used: int
    nbytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of layer `name` that are read as they are routed to, and how many of them may be `cached` in each tier ahead
    of the disk: on the device first."""

    name: str
    routing: Routing
    cached: tuple[int, ...] = (0,)

    @property
    def on_device(self) -> int:
        """The number cached on the device."""
        return self.cached[0]

    @property
    def in_host(self) -> int:
        """The number cached in the tiers between device and disk."""
        return sum(self.cached[1:])

    @property
    def uncached(self) -> int:
        """The number of a token's experts that come from disk, at best."""
        return max(0, self.routing.used - sum(self.cached))


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """Slots of `slot_bytes`, each for one expert: `passing` ones for experts on their way, and the layers' caches."""

    layers: tuple[LayerExperts, ...] = ()
    slot_bytes: int = 0
    passing: int = 0

    def tier_bytes(self, index: int) -> int:
        """Memory of the slots in a tier, of those ahead of the disk; those for experts on their way are in the first."""
        cached = sum(layer.cached[index] for layer in self.layers)
        return self.slot_bytes * (cached + (self.passing if index == 0 else 0))

    @property
    def device_bytes(self) -> int:
        """Memory of the slots on the device."""
        return self.tier_bytes(0)

    @property
    def host_bytes(self) -> int:
        """Memory of the slots behind the device."""
        return self.slot_bytes * sum(layer.in_host for layer in self.layers)

    @property
    def most_bytes(self) -> int:
        """What a token's experts ask the disk for when none is cached."""
        return sum(layer.routing.used * layer.routing.read_bytes for layer in self.layers)

    @property
    def least_bytes(self) -> int:
        """The same when as many of them as can be are cached."""
        return sum(layer.uncached * layer.routing.read_bytes for layer in self.layers)

    @property
    def all_bytes(self) -> int:
        """What reading every expert once asks the disk for: the most that a prompt, however long, needs."""
        return sum(layer.routing.count * layer.routing.read_bytes for layer in self.layers)

    @property
    def link_bytes(self) -> int:
        """What a token's experts move to the device when none is cached there."""
        return sum(layer.routing.used * layer.routing.nbytes for layer in self.layers)

    @property
    def least_link_bytes(self) -> int:
        """The same when as many of them as can be are cached there."""
        return sum(max(0, layer.routing.used - layer.on_device) * layer.routing.nbytes for layer in self.layers)


NO_EXPERTS = ExpertsPlan()
"""The plan of a model without experts, or with all of them resident."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Slots of `nbytes` for the experts of `layers`, each (name, routing): `fewest` must be free for those on their way,
    `wanted` keep the readers busy."""

    layers: tuple[tuple[str, Routing], ...] = ()
    nbytes: int = 0
    fewest: int = 0
    wanted: int = 0

    @property
    def least_bytes(self) -> int:
        """Bytes without which no expert can be read."""
        return self.fewest * self.nbytes

    def passing(self, room: int) -> int:
        """How many slots for experts on their way `room` bytes hold."""
        return min(self.wanted, room // self.nbytes) if self.layers else 0

    def shared(self, names: Sequence[str], passing: int, rooms: Sequence[int]) -> ExpertsPlan:
        """As many cached experts in every layer, one more or less, in the bytes that each tier has room for, the first first.

        Every layer is the same to a token, and one pool for all of them was no better (docs/benchmarks.md). What is left over
        goes to the first of `layers`; the plan has them in the order of `names`.
        """
        if not self.layers:
            return NO_EXPERTS
        left = [routing.count for _, routing in self.layers]
        shares: list[list[int]] = []
        for room in rooms:
            shares.append(_evenly(left, max(0, room) // self.nbytes))
            left = [count - here for count, here in zip(left, shares[-1], strict=True)]
        cached = zip(self.layers, zip(*shares, strict=True), strict=True)
        found = {name: LayerExperts(name, routing, counts) for (name, routing), counts in cached}
        return ExpertsPlan(tuple(found[name] for name in names), self.nbytes, passing)


def slots_for(layers: Sequence[tuple[str, Routing]]) -> Slots:
    """Slots as large as the largest expert; at least two, so that one runs while the next arrives."""
    if not layers:
        return Slots()
    routings = [routing for _, routing in layers]
    nbytes, most = max(routing.nbytes for routing in routings), max(routing.count for routing in routings)
    busy = min(BUSY_BYTES, sum(routing.nbytes * routing.count for routing in routings) // 8)
    fewest = min(2, most)
    return Slots(tuple(layers), nbytes, fewest, min(most, max(fewest, 1 + -(-busy // nbytes))))


def _evenly(most: Sequence[int], total: int) -> list[int]:
    """`total` shared as evenly as can be, each share at most its `most`; what is left over goes to the first ones."""
    shares = [0] * len(most)
    while total > 0 and any(share < limit for share, limit in zip(shares, most, strict=True)):
        wanting = [index for index, share in enumerate(shares) if share < most[index]]
        step = max(1, total // len(wanting))
        for index in wanting[:total]:
            taken = min(step, most[index] - shares[index])
            shares[index] += taken
            total -= taken
    return shares
