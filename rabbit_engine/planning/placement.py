"""Byte counts and budgets into a `Plan`. Pure: no torch, no I/O; a test needs no device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.experts import BUSY_BYTES, NO_EXPERTS, ExpertsPlan, Routing, slots_for
from rabbit_engine.planning.plan import UNBOUNDED, Budget, Plan
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.speeds import ASSUMED, Speeds

Role = Literal["streamed", "embedding", "resident", "experts"]

PAGE = 4096
_GOLDEN = 0.6180339887498949
_ENDLESS = 2**62


@dataclass(frozen=True, slots=True)
class UnitSize:
    """What a unit of weights is to the model, and how many bytes of memory it takes.

    A `streamed` one passes through the ring unless there is room for it to stay; an `embedding` is read by row unless
    there is room for everything; a `resident` must stay. One that `encloses` is held while units inside of it are asked
    for. A `rare` one runs in few passes (a vision tower, when an image comes): it is the last to stay. The `experts` of a
    layer are read as they are routed to, with `routing`, unless there is room for everything. One whose weights are stored
    encoded takes `scratch_bytes` of the device while it is used.
    """

    name: str
    role: Role
    nbytes: int
    read_bytes: int | None = None
    encloses: bool = False
    rare: bool = False
    routing: Routing | None = None
    scratch_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        """What a read of it asks the disk for."""
        return self.nbytes if self.read_bytes is None else self.read_bytes


@dataclass(frozen=True, slots=True)
class _Placed:
    """A choice of who stays where."""

    device: list[UnitSize]
    host: list[UnitSize]
    disk: list[UnitSize]
    ring_bytes: int
    embedding_stays: bool = False
    experts: ExpertsPlan = NO_EXPERTS


def place(
    units: Sequence[UnitSize], device: str, budget: Budget = UNBOUNDED, speeds: Speeds = ASSUMED, notes: Iterable[str] = ()
) -> Plan:
    """Decide what is resident, in the order of a pass.

    The ring is as small as hides the longest gap; every other byte of the budget is a resident, spread evenly over the
    depth of the model, the device's memory first and the host's next. Who stays is chosen in one fixed order, so more
    memory never means more bytes a pass. What every pass needs stays before any expert does: a byte of it saves a byte
    a pass, a byte of an expert saves one in the passes that are routed to it. Raises BudgetError, with the smallest budget
    that works.
    """
    _check_host(device, budget)
    scratch = _scratch_bytes(units)
    apart = scratch + (budget.host_staging_bytes if device == "cpu" else 0)
    placed = _place_all(units, budget, apart) or _place_some(units, device, budget, apart)
    embeddings, experts = [unit for unit in units if unit.role == "embedding"], placed.experts
    stays = [unit for unit in units if unit.role == "resident"] + placed.device + (embeddings if placed.embedding_stays else [])
    chosen = {unit.name for unit in stays}
    moving = [*placed.host, *placed.disk]
    host = {unit.name for unit in placed.host}
    disk = [unit.name for unit in placed.disk]
    return Plan(
        device=device,
        resident=tuple(unit.name for unit in units if unit.name in chosen),
        host=tuple(unit.name for unit in units if unit.name in host),
        streamed=tuple(disk),
        by_row=tuple(unit.name for unit in embeddings if not placed.embedding_stays),
        resident_bytes=sum(unit.nbytes for unit in stays),
        host_bytes=sum(unit.nbytes for unit in placed.host) + experts.host_bytes,
        staging_bytes=budget.host_staging_bytes,
        ring_bytes=placed.ring_bytes,
        scratch_bytes=scratch,
        pass_bytes=sum(unit.disk_bytes for unit in placed.disk if not unit.rare) + experts.most_bytes,
        link_bytes=0 if device == "cpu" else sum(unit.nbytes for unit in moving if not unit.rare) + experts.link_bytes,
        load_bytes=sum(unit.disk_bytes for unit in (*stays, *placed.host)),
        weights_bytes=sum(unit.nbytes for unit in units),
        budget=budget,
        speeds=speeds,
        notes=tuple(notes),
        rare_bytes=sum(unit.disk_bytes for unit in placed.disk if unit.rare),
        experts=experts,
    )


def _check_host(device: str, budget: Budget) -> None:
    if device != "cpu" and budget.host_bytes is not None and budget.host_staging_bytes > budget.host_bytes:
        raise BudgetError(
            f"reading through host memory needs {format_bytes(budget.host_staging_bytes)}, the budget for the CPU is "
            f'{format_bytes(budget.host_bytes)}: give max_memory={{"cpu": {budget.host_staging_bytes}}} or more',
            budget.host_staging_bytes,
        )


def _scratch_bytes(units: Sequence[UnitSize]) -> int:
    """The most scratch in use at once: a unit that encloses others keeps its own while one inside of it runs."""
    around, inside = ([unit.scratch_bytes for unit in units if unit.encloses is encloses] for encloses in (True, False))
    return max(around, default=0) + max(inside, default=0)


def _place_all(units: Sequence[UnitSize], budget: Budget, apart: int) -> _Placed | None:
    """Everything on the device, if it fits: then nothing needs a ring. The embedding stays too where it fits as well."""
    streamed = [unit for unit in units if unit.role in ("streamed", "experts")]
    without = apart + sum(unit.nbytes for unit in units if unit.role != "embedding")
    if budget.device_bytes is not None and without > budget.device_bytes:
        return None
    whole = apart + sum(unit.nbytes for unit in units)
    return _Placed(streamed, [], [], 0, budget.device_bytes is None or whole <= budget.device_bytes)


def _place_some(units: Sequence[UnitSize], device: str, budget: Budget, apart: int) -> _Placed:
    assert budget.device_bytes is not None  # noqa: S101 - without a bound everything fits
    dense, layers = ([unit for unit in units if unit.role == role] for role in ("streamed", "experts"))
    slots = slots_for([(unit.name, unit.routing) for unit in _spread(layers) if unit.routing is not None])
    fixed = sum(unit.nbytes for unit in units if unit.role == "resident") + apart
    dense_bytes = sum(unit.nbytes for unit in dense)
    smallest, wanted = _ring_bytes(dense)
    least = slots.least_bytes + (min(smallest, dense_bytes) if layers else smallest)  # all may stay beside moving experts
    room = budget.device_bytes - fixed
    if room < least:
        everything = dense_bytes + sum(unit.nbytes for unit in layers)  # takes no ring, and may be less
        room_for = f"a ring{' and slots for experts' if layers else ''} of {format_bytes(least)}"
        raise _too_small(device, fixed + min(least, everything), room_for, budget)
    all_stay = bool(layers) and room >= dense_bytes + slots.least_bytes
    ring = 0 if all_stay else min(wanted, room - slots.least_bytes)
    free = room - ring - slots.least_bytes
    order = [unit for rare in (False, True) for unit in _spread([unit for unit in dense if unit.rare is rare])]
    on_device, in_host = _tiers(order, free, device, budget)
    free -= sum(unit.nbytes for unit in on_device)
    passing = slots.passing(slots.least_bytes + free)
    free -= (passing - slots.fewest) * slots.nbytes
    free_host = _room_in_host(device, budget) - sum(unit.nbytes for unit in in_host)
    return _Placed(
        [unit for unit in dense if unit in on_device],
        [unit for unit in dense if unit in in_host],
        [unit for unit in dense if unit not in on_device and unit not in in_host],
        ring,
        experts=slots.shared([unit.name for unit in layers], passing, free, free_host),
    )


def _tiers(order: Sequence[UnitSize], room: int, device: str, budget: Budget) -> tuple[set[UnitSize], set[UnitSize]]:
    """Who stays on the device and who in host memory.

    The device takes the beginning of the order, the host what fits of the rest. Room left on the device, less than its next
    unit, goes to units of the host (on a CPU to any): so neither link ever carries more because either has more room.
    """
    on_device = _beginning(order, room)
    rest = [unit for unit in order if unit not in on_device]
    in_host = _fill(rest, _room_in_host(device, budget))
    left = room - sum(unit.nbytes for unit in on_device)
    promoted = _fill(rest if device == "cpu" else [unit for unit in rest if unit in in_host], left)
    return on_device | promoted, in_host - promoted


def _room_in_host(device: str, budget: Budget) -> int:
    if device == "cpu":
        return 0
    if budget.host_bytes is None:
        return _ENDLESS
    return budget.host_bytes - budget.host_staging_bytes


def _ring_bytes(streamed: Sequence[UnitSize]) -> tuple[int, int]:
    """The smallest ring that works, and the one that keeps the readers busy.

    Two of the largest units: one runs while the next arrives; and a quarter, as units of several sizes leave gaps (simulated:
    2% of the time idle at two, 0.3% at two and a quarter). More would hide the gap between two tokens, but a byte of the
    ring hides it once a pass, as much as a byte that stays saves. It depends on all units that may be streamed, not on
    those that will be: else more memory could mean a larger ring.
    """
    inside = [unit.nbytes for unit in streamed if not unit.encloses]
    around = max((unit.nbytes for unit in streamed if unit.encloses), default=0)
    largest = max(inside, default=0)
    smallest = (2 if len(inside) > 1 else 1) * largest + around
    total = sum(unit.nbytes for unit in streamed)
    busy = min(BUSY_BYTES, total // 8)
    wanted = max(smallest + (largest // 4 if len(set(inside)) > 1 else 0), busy)
    return smallest, wanted - wanted % PAGE if wanted > smallest + PAGE else smallest


def _too_small(device: str, weights: int, room_for: str, budget: Budget) -> BudgetError:
    given = budget.device_bytes if budget.given_bytes is None else budget.given_bytes
    beside = 0 if budget.given_bytes is None else budget.reserved_bytes
    for_tokens = f" and {format_bytes(beside)} for the tokens of max_seq_len" if beside else ""
    return BudgetError(
        f"{device} needs {format_bytes(weights)} for weights ({room_for} and what must stay){for_tokens}, "
        f"the budget is {format_bytes(given or 0)}: give max_memory={{{_place_name(device)}: {weights + beside}}} or more",
        weights + beside,
    )


def _place_name(device: str) -> str:
    return '"cpu"' if device == "cpu" else device.partition(":")[2] or "0"


def _spread(units: Sequence[UnitSize]) -> list[UnitSize]:
    """A fixed order of which every beginning is spread evenly over the depth: multiples of the golden ratio, modulo 1."""
    keys = {unit.name: (index + 1) * _GOLDEN % 1.0 for index, unit in enumerate(units)}
    return sorted(units, key=lambda unit: keys[unit.name])


def _beginning(order: Sequence[UnitSize], room: int) -> set[UnitSize]:
    """Take from the beginning as long as it fits. More room takes the same and more, so the host's share cannot suffer."""
    taken: set[UnitSize] = set()
    for unit in order:
        room -= unit.nbytes
        if room < 0:
            break
        taken.add(unit)
    return taken


def _fill(order: Sequence[UnitSize], room: int) -> set[UnitSize]:
    """Take each that still fits. In a fixed order, more room never takes fewer bytes: where two rooms first differ, the
    larger takes one that the smaller could not."""
    taken: set[UnitSize] = set()
    for unit in order:
        if unit.nbytes <= room:
            taken.add(unit)
            room -= unit.nbytes
    return taken
