"""Sizes of experts that are read on demand, and how their layers share memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BUSY_BYTES = 64 * 2**20
"""Keeps four reads of 8 MiB under way while four have arrived."""


@dataclass(frozen=True, slots=True)
class Routing:
    """A layer's `count` experts, of which each token uses `used`. One takes `nbytes` of memory and reads `read_bytes` from
    disk."""

    count: int
    used: int
    nbytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of layer `name` that are read on demand, and how many of them may be `cached` in each tier ahead of the
    disk, the device first."""

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
        """The number of a token's experts read from disk at best."""
        return self.used_from(len(self.cached))

    def used_from(self, tier: int) -> int:
        """The number of a token's experts that come from a tier, at best; the disk follows the tiers of `cached`."""
        ahead, here = sum(self.cached[:tier]), self.cached[tier] if tier < len(self.cached) else self.routing.count
        return min(here, max(0, self.routing.used - ahead))


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """Slots of `slot_bytes` for one expert each: `passing` ones for experts in transit, and the layers' caches."""

    layers: tuple[LayerExperts, ...] = ()
    slot_bytes: int = 0
    passing: int = 0

    def tier_bytes(self, index: int) -> int:
        """Bytes of the slots in a tier ahead of the disk; the slots for experts in transit are in the first."""
        cached = sum(layer.cached[index] for layer in self.layers)
        return self.slot_bytes * (cached + (self.passing if index == 0 else 0))

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots on the device."""
        return self.tier_bytes(0)

    @property
    def host_bytes(self) -> int:
        """Bytes of the slots in the tiers between device and disk."""
        return self.slot_bytes * sum(layer.in_host for layer in self.layers)

    @property
    def most_bytes(self) -> int:
        """Bytes read from disk for a token's experts if none is cached."""
        return sum(layer.routing.used * layer.routing.read_bytes for layer in self.layers)

    @property
    def least_bytes(self) -> int:
        """Bytes read from disk for a token's experts if as many as possible are cached."""
        return sum(layer.uncached * layer.routing.read_bytes for layer in self.layers)

    @property
    def all_bytes(self) -> int:
        """Bytes read from disk if every expert is read once: the most for a prompt of any length."""
        return sum(layer.routing.count * layer.routing.read_bytes for layer in self.layers)

    @property
    def link_bytes(self) -> int:
        """Bytes moved to the device for a token's experts if none is cached there."""
        return sum(layer.routing.used * layer.routing.nbytes for layer in self.layers)

    def least_moved_bytes(self, tiers: Iterable[int]) -> int:
        """Bytes of a token's experts that come from `tiers` if as many as possible are cached."""
        return sum(layer.used_from(tier) * layer.routing.nbytes for tier in tiers for layer in self.layers)


NO_EXPERTS = ExpertsPlan()
"""The plan of a model without experts, or with all of them resident."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Slots of `nbytes` for the experts of `layers`, each (name, routing): at least `fewest` for experts in transit, `wanted`
    to keep the readers busy."""

    layers: tuple[tuple[str, Routing], ...] = ()
    nbytes: int = 0
    fewest: int = 0
    wanted: int = 0

    @property
    def least_bytes(self) -> int:
        """The bytes below which no expert can be read."""
        return self.fewest * self.nbytes

    def passing(self, room: int) -> int:
        """The number of slots for experts in transit that fit in `room` bytes."""
        return min(self.wanted, room // self.nbytes) if self.layers else 0

    def shared(self, names: Sequence[str], passing: int, rooms: Sequence[int]) -> ExpertsPlan:
        """Divide the bytes in `rooms`, one per tier, evenly among the layers' caches, give or take one expert.

        Every layer matters equally to a token, and one pool for all of them was no better (docs/benchmarks.md). The remainder
        goes to the first of `layers`; the plan lists them in the order of `names`.
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
    """Slots of the size of the largest expert; at least two, so that one runs while the next arrives."""
    if not layers:
        return Slots()
    routings = [routing for _, routing in layers]
    nbytes, most = max(routing.nbytes for routing in routings), max(routing.count for routing in routings)
    busy = min(BUSY_BYTES, sum(routing.nbytes * routing.count for routing in routings) // 8)
    fewest = min(2, most)
    return Slots(tuple(layers), nbytes, fewest, min(most, max(fewest, 1 + -(-busy // nbytes))))


def _evenly(most: Sequence[int], total: int) -> list[int]:
    """Divide `total` as evenly as possible, each share at most its `most`; the remainder goes to the first ones."""
    shares = [0] * len(most)
    while total > 0 and any(share < limit for share, limit in zip(shares, most, strict=True)):
        wanting = [index for index, share in enumerate(shares) if share < most[index]]
        step = max(1, total // len(wanting))
        for index in wanting[:total]:
            taken = min(step, most[index] - shares[index])
            shares[index] += taken
            total -= taken
    return shares
