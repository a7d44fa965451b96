"""Makes a `Plan` from units and tiers. Pure: no torch, no I/O; a test needs no device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.experts import BUSY_BYTES, NO_EXPERTS, ExpertsPlan, Slots, slots_for
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.tiers import (
    HOST,
    RING,
    SCRATCH,
    STAGING,
    TEXTS,
    UNBOUNDED,
    WORK,
    Budget,
    Tenant,
    Tier,
    UnitSize,
    scratch_shares,
    tenants_of,
    tiers_of,
)
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.speeds import ASSUMED, Speeds

PAGE = 4096
_GOLDEN = 0.6180339887498949
_ENDLESS = 2**62


def place(
    units: Sequence[UnitSize], device: str, budget: Budget = UNBOUNDED, speeds: Speeds = ASSUMED, notes: Iterable[str] = ()
) -> Plan:
    """`place_in` the device, host memory and the disk. Raises BudgetError with the smallest budget that works."""
    tiers = tiers_of(device, budget, speeds)
    tenants = tenants_of(tiers, budget)
    return place_in(units, tiers, tenants, least_ring=budget.least_ring_bytes, source=speeds.source, notes=notes)


def place_in(
    units: Sequence[UnitSize],
    tiers: Sequence[Tier],
    tenants: Sequence[Tenant] = (),
    *,
    least_ring: int = 0,
    source: str = "given",
    notes: Iterable[str] = (),
) -> Plan:
    """Decide which tier keeps each of `units`, given in the order of a pass. `tiers` go from the fastest to the disk.

    The ring is as small as it can be while hiding the longest gap, but of `least_ring` bytes; all other bytes go to weights
    that stay, spread evenly over the depth of the model, the fastest tier first. They are chosen in one fixed order, so more
    memory never means more bytes a pass. What every pass needs stays before any expert does: it saves its bytes in every pass,
    an expert only in the passes routed to it. Raises BudgetError with the smallest budget that works.
    """
    for_decoding = {SCRATCH: sum(scratch_shares(units).values()), WORK: max((unit.work_bytes for unit in units), default=0)}
    held = [*tenants, *(Tenant(name, tiers[0].name, nbytes) for name, nbytes in for_decoding.items() if nbytes)]
    _check_host(tiers, held)
    memory = _Memory(tuple(tiers), tuple(held))
    placed = _place_all(units, memory) or _place_some(units, memory, least_ring)
    ring = [Tenant(RING, tiers[0].name, placed.ring_bytes)] if placed.ring_bytes else []
    return Plan(
        tiers=memory.tiers,
        units=tuple(units),
        tier_of={unit.name: placed.tier_of.get(unit.name, tiers[-1].name) for unit in units},
        tenants=(*held, *ring),
        experts=placed.experts,
        source=source,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Placed:
    """A choice of what stays ahead of the disk, and where."""

    tier_of: Mapping[str, str]
    ring_bytes: int = 0
    experts: ExpertsPlan = NO_EXPERTS


@dataclass(frozen=True, slots=True)
class _Memory:
    """The tiers, and what is set aside in them before any weight is placed."""

    tiers: tuple[Tier, ...]
    tenants: tuple[Tenant, ...]

    @property
    def device(self) -> str:
        """The first tier."""
        return self.tiers[0].name

    def room(self, tier: Tier) -> int:
        """Bytes of the tier for weights: all but what its tenants take."""
        taken = sum(tenant.nbytes for tenant in self.tenants if tenant.tier == tier.name)
        return (_ENDLESS if tier.nbytes is None else tier.nbytes) - taken


def _check_host(tiers: Sequence[Tier], tenants: Sequence[Tenant]) -> None:
    staging = sum(tenant.nbytes for tenant in tenants if (tenant.name, tenant.tier) == (STAGING, HOST))
    for tier in tiers:
        if tier.name == HOST and tier.nbytes is not None and staging > tier.nbytes:
            raise BudgetError(
                f"reading through host memory needs {format_bytes(staging)}, the budget for the CPU is "
                f'{format_bytes(tier.nbytes)}: give max_memory={{"cpu": {staging}}} or more',
                staging,
            )


def _place_all(units: Sequence[UnitSize], memory: _Memory) -> _Placed | None:
    """Place everything where it is used, if it fits: then no ring is needed. The embedding stays too if there is room."""
    if any(unit.role == "experts" and unit.scratch_bytes and not unit.decoded for unit in units):
        return None  # experts are decoded one by one, on demand
    rooms = {tier.name: memory.room(tier) for tier in memory.tiers if tier.computes}
    staying = [unit for unit in units if not unit.only_by_row]
    packed = _packed(staying, rooms) or _packed([unit for unit in staying if unit.role != "embedding"], rooms)
    return None if packed is None else _Placed(packed)


def _packed(units: Sequence[UnitSize], rooms: Mapping[str, int]) -> dict[str, str] | None:
    """Assign each tier a consecutive run of the units, in order; None if they do not fit."""
    found: dict[str, str] = {}
    left = iter(units)
    unit = next(left, None)
    for tier, room in rooms.items():
        while unit is not None and unit.nbytes <= room:
            found[unit.name], room = tier, room - unit.nbytes
            unit = next(left, None)
    return found if unit is None else None


def _place_some(units: Sequence[UnitSize], memory: _Memory, least_ring: int = 0) -> _Placed:
    """Place residents, a ring and slots on the device, then fill the tiers in order with as much of the rest as fits."""
    dense, layers, residents = ([unit for unit in units if unit.role == role] for role in ("streamed", "experts", "resident"))
    slots = slots_for([(unit.name, unit.routing) for unit in _spread(layers) if unit.routing is not None])
    room = memory.room(memory.tiers[0]) - _nbytes(residents)
    smallest, wanted = (max(least_ring, nbytes) for nbytes in _ring_bytes(dense))
    least = slots.least_bytes + (min(smallest, _nbytes(dense)) if layers else smallest)  # all may stay if experts move
    if room < least:
        raise _too_small(memory, _nbytes(residents) + min(least, _nbytes(dense) + _nbytes(layers)), least, bool(layers))
    all_stay = bool(layers) and room >= _nbytes(dense) + slots.least_bytes
    ring = 0 if all_stay else min(wanted, room - slots.least_bytes)
    rooms = {tier.name: memory.room(tier) for tier in memory.tiers[:-1]} | {memory.device: room - ring - slots.least_bytes}
    kept = _keep(dense, memory.tiers, rooms)
    experts = _cache_experts([unit.name for unit in layers], slots, memory.tiers[:-1], _left(dense, kept, rooms))
    return _Placed({unit.name: memory.device for unit in residents} | kept, ring, experts)


def _cache_experts(names: Sequence[str], slots: Slots, tiers: Sequence[Tier], left: Mapping[str, int]) -> ExpertsPlan:
    """Give the room left by dense weights to experts: first to those in transit, then to a cache in each tier that allows it."""
    device = left[tiers[0].name]
    passing = slots.passing(slots.least_bytes + device)
    rooms = {**left, tiers[0].name: device - (passing - slots.fewest) * slots.nbytes}
    return slots.shared(names, passing, [rooms[tier.name] if "experts" in tier.holds else 0 for tier in tiers])


def _keep(dense: Sequence[UnitSize], tiers: Sequence[Tier], rooms: Mapping[str, int]) -> dict[str, str]:
    """The beginning of the order goes where weights are used; each other tier takes what fits of the rest. Room left where
    weights are used, less than the next unit, goes to units of the next tier (of the disk on a CPU): so more room in a tier
    never makes a link carry more.
    """
    order = [unit for rare in (False, True) for unit in _spread([unit for unit in dense if unit.rare is rare])]
    kept: dict[str, str] = {}
    holding = [tier for tier in tiers[:-1] if "weights" in tier.holds]
    for tier in holding:
        rest = [unit for unit in order if unit.name not in kept]
        take = _beginning if tier.computes else _fill
        kept |= dict.fromkeys(_names(take(rest, rooms[tier.name])), tier.name)
    behind = next(tier.name for tier in (*holding, tiers[-1]) if not tier.computes)
    for tier in holding:
        if tier.computes:
            promoted = [unit for unit in order if kept.get(unit.name, tiers[-1].name) == behind]
            kept |= dict.fromkeys(_names(_fill(promoted, _left(dense, kept, rooms)[tier.name])), tier.name)
    return kept


def _left(dense: Sequence[UnitSize], kept: Mapping[str, str], rooms: Mapping[str, int]) -> dict[str, int]:
    """Bytes left in each tier."""
    return {tier: room - _nbytes(unit for unit in dense if kept.get(unit.name) == tier) for tier, room in rooms.items()}


def _ring_bytes(streamed: Sequence[UnitSize]) -> tuple[int, int]:
    """The smallest ring that works, and the one that keeps the readers busy.

    Two of the largest units: one runs while the next arrives; plus a quarter, as units of several sizes leave gaps (simulated:
    2% of the time idle at two, 0.3% at two and a quarter). More would hide the gap between two tokens, but a byte of the
    ring hides it once a pass, no better than a byte that stays. It depends on all units that may be streamed, not on those
    that will be: otherwise more memory could mean a larger ring.
    """
    inside = [unit.nbytes for unit in streamed if not unit.encloses]
    around = max((unit.nbytes for unit in streamed if unit.encloses), default=0)
    largest = max(inside, default=0)
    smallest = (2 if len(inside) > 1 else 1) * largest + around
    total = sum(unit.nbytes for unit in streamed)
    busy = min(BUSY_BYTES, total // 8)
    wanted = max(smallest + (largest // 4 if len(set(inside)) > 1 else 0), busy)
    return smallest, wanted - wanted % PAGE if wanted > smallest + PAGE else smallest


def _too_small(memory: _Memory, weights: int, least: int, has_experts: bool) -> BudgetError:
    room_for = f"a ring{' and slots for experts' if has_experts else ''} of {format_bytes(least)}"
    tenants = [tenant for tenant in memory.tenants if tenant.tier == memory.device]
    weights += sum(tenant.nbytes for tenant in tenants if tenant.name != TEXTS)
    texts = sum(tenant.nbytes for tenant in tenants if tenant.name == TEXTS and not tenant.optional)
    budget = max(0, (memory.tiers[0].nbytes or 0) - sum(tenant.nbytes for tenant in tenants if tenant.optional))
    for_tokens = f" and {format_bytes(texts)} for the tokens of max_seq_len" if texts else ""
    return BudgetError(
        f"{memory.device} needs {format_bytes(weights)} for weights ({room_for} and what must stay){for_tokens}, the budget is "
        f"{format_bytes(budget)}: give max_memory={{{_place_name(memory.device)}: {weights + texts}}} or more",
        weights + texts,
    )


def _place_name(device: str) -> str:
    return '"cpu"' if device == "cpu" else device.partition(":")[2] or "0"


def _spread(units: Sequence[UnitSize]) -> list[UnitSize]:
    """A fixed order in which every prefix is spread evenly over the depth: multiples of the golden ratio, modulo 1."""
    keys = {unit.name: (index + 1) * _GOLDEN % 1.0 for index, unit in enumerate(units)}
    return sorted(units, key=lambda unit: keys[unit.name])


def _beginning(order: Sequence[UnitSize], room: int) -> list[UnitSize]:
    """Take from the beginning while it fits. More room takes the same and more, so the next tier cannot lose."""
    taken = []
    for unit in order:
        room -= unit.nbytes
        if room < 0:
            break
        taken.append(unit)
    return taken


def _fill(order: Sequence[UnitSize], room: int) -> list[UnitSize]:
    """Take each unit that still fits. In a fixed order, more room never takes fewer bytes: where two rooms first differ, the
    larger takes one that the smaller could not."""
    taken = []
    for unit in order:
        if unit.nbytes <= room:
            taken.append(unit)
            room -= unit.nbytes
    return taken


def _names(units: Iterable[UnitSize]) -> list[str]:
    return [unit.name for unit in units]


def _nbytes(units: Iterable[UnitSize]) -> int:
    return sum(unit.nbytes for unit in units)
