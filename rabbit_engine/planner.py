"""Byte counts and budgets into a `Plan`. Pure: no torch, no I/O; a test needs no device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.errors import BudgetError
from rabbit_engine.expertsplan import BUSY_BYTES, NO_EXPERTS, ExpertsPlan, Routing, slots_for
from rabbit_engine.units import format_bytes, format_rate, format_seconds

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
    layer are read as they are routed to, with `routing`, unless there is room for everything.
    """

    name: str
    role: Role
    nbytes: int
    read_bytes: int | None = None
    encloses: bool = False
    rare: bool = False
    routing: Routing | None = None

    @property
    def disk_bytes(self) -> int:
        """What a read of it asks the disk for."""
        return self.nbytes if self.read_bytes is None else self.read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that weights may take on the device and in host memory; `None` is no bound. On a CPU both are one: `device_bytes`.

    `host_staging_bytes` are the buffers that reads go through (on a CPU only those of misaligned weights),
    `reserved_bytes` what was set aside for the cache and activations before this budget was made, out of `given_bytes`
    where the caller gave those.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    host_staging_bytes: int = 0
    reserved_bytes: int = 0
    given_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Bytes a second of each link: the disk, the copy to the device (0 on a CPU: there is none). `source` says how known."""

    disk: float = 2e9
    link: float = 0.0
    source: str = "assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What stays on the device and in host memory, what comes from disk, and what a pass costs. All bytes are of memory,
    but for `pass_bytes`, `link_bytes`, `rare_bytes` and `load_bytes`, which move; `rare_bytes` come from disk on top of a
    pass's where an image runs.

    Where experts are read as they are routed to, `pass_bytes` and `link_bytes` are a token's with none of its experts
    cached, and `least_pass_bytes` with as many as can be.
    """

    device: str
    resident: tuple[str, ...]
    host: tuple[str, ...]
    streamed: tuple[str, ...]
    by_row: tuple[str, ...]
    resident_bytes: int
    host_bytes: int
    staging_bytes: int
    ring_bytes: int
    pass_bytes: int
    link_bytes: int
    load_bytes: int
    weights_bytes: int
    budget: Budget
    speeds: Speeds
    notes: tuple[str, ...] = ()
    rare_bytes: int = 0
    experts: ExpertsPlan = NO_EXPERTS

    @property
    def device_bytes(self) -> int:
        """The weight memory claimed on the device, once, at load."""
        return self.resident_bytes + self.ring_bytes + self.experts.device_bytes

    @property
    def least_pass_bytes(self) -> int:
        """Bytes from disk a token at best; `pass_bytes` where no experts are cached."""
        return self.pass_bytes - self.experts.most_bytes + self.experts.least_bytes

    @property
    def least_link_bytes(self) -> int:
        """Bytes to the device a token at best."""
        return max(0, self.link_bytes - self.experts.link_bytes + self.experts.least_link_bytes)

    @property
    def disk_s(self) -> float:
        """Seconds a pass that the disk needs at its own rate."""
        return self.pass_bytes / self.speeds.disk

    @property
    def link_s(self) -> float:
        """Seconds a pass that the copies to the device need; 0 on a CPU."""
        return self.link_bytes / self.speeds.link if self.speeds.link else 0.0

    @property
    def pass_s(self) -> float:
        """Seconds that the slowest link needs for a pass, with no expert cached."""
        return max(self.disk_s, self.link_s)

    @property
    def bound(self) -> Literal["disk", "link", "compute"]:
        """What a pass waits for."""
        if not self.pass_bytes and not self.link_bytes:
            return "compute"
        return "disk" if self.disk_s >= self.link_s else "link"

    @property
    def least_pass_s(self) -> float:
        """Seconds a pass at best, with as many of its experts cached as can be."""
        link_s = self.least_link_bytes / self.speeds.link if self.speeds.link else 0.0
        return max(self.least_pass_bytes / self.speeds.disk, link_s)

    @property
    def least_bound(self) -> Literal["disk", "link", "compute"]:
        """What a pass waits for at best."""
        if not self.least_pass_bytes and not self.least_link_bytes:
            return "compute"
        on_disk = self.least_pass_bytes / self.speeds.disk >= self.least_pass_s
        return "disk" if on_disk else "link"

    @property
    def prompt_bytes(self) -> int:
        """Bytes from disk for a prompt at most: each expert once."""
        return self.pass_bytes - self.experts.most_bytes + self.experts.all_bytes

    @property
    def first_token_s(self) -> float:
        """Seconds until the first token: read what stays, then a pass, of a prompt that needs every expert."""
        return (self.load_bytes + self.prompt_bytes - self.pass_bytes) / self.speeds.disk + self.pass_s

    @property
    def reason(self) -> str:
        """One line: what a pass costs, and why."""
        if self.bound == "compute":
            return "everything fits: no weight moves after loading, a token takes what its computation takes"
        rate = format_rate(self.speeds.disk if self.bound == "disk" else self.speeds.link, 1)
        link = "the disk" if self.bound == "disk" else f"the link to {self.device}"
        moved = format_bytes(self.pass_bytes if self.bound == "disk" else self.link_bytes)
        beside = "" if self.pass_bytes else ", no disk in the loop"
        certain = "at least" if self.speeds.source == "given" else "about"  # a short sample may err either way
        seconds = format_seconds(self.pass_s)
        if self.least_pass_s < self.pass_s:
            least = self.least_pass_bytes if self.bound == "disk" else self.least_link_bytes
            moved = f"{format_bytes(least)} (every expert cached that can be) to {moved} (none)"
            other = self.least_bound != self.bound and self.least_bound != "compute"
            seconds = f"{format_seconds(self.least_pass_s)}{f' (bound by the {self.least_bound})' if other else ''} to {seconds}"
        return (
            f"{moved} a pass over {link} at {rate} ({self.speeds.source}){beside}: "
            f"{certain} {seconds} a token, the first after {format_seconds(self.first_token_s)}"
        )

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table: what, and how much of it."""
        budget = self.budget.device_bytes
        given = "not bounded" if budget is None else format_bytes(budget)
        reserved = f", {format_bytes(self.budget.reserved_bytes)} set aside before" if self.budget.reserved_bytes else ""
        in_host = format_bytes(self.host_bytes - self.experts.host_bytes)
        host = [("in host memory", f"{_units(self.host)}, {in_host}")] if self.host else []
        staging = [("staging", format_bytes(self.staging_bytes))] if self.staging_bytes else []
        link = [("over the link", f"{format_bytes(self.link_bytes)} a pass")] if self.link_bytes else []
        dense = self.pass_bytes - self.experts.most_bytes
        experts = [("experts", self.experts.text)] if self.experts.layers else []
        prompt = [("a prompt", f"{format_bytes(self.prompt_bytes)} at most: each expert once")] if experts else []
        return [
            ("weights", format_bytes(self.weights_bytes)),
            ("budget", f"{given} on {self.device} for weights{reserved}"),
            ("resident", f"{_units(self.resident)}, {format_bytes(self.resident_bytes)} on {self.device}"),
            *host,
            ("by row", ", ".join(self.by_row) or "nothing"),
            ("streamed", f"{len(self.streamed)} units, {format_bytes(dense)} a pass from disk"),
            *experts,
            *link,
            *([("for images", f"{format_bytes(self.rare_bytes)} more from disk")] if self.rare_bytes else []),
            ("ring", f"{format_bytes(self.ring_bytes)} on {self.device}"),
            *staging,
            *[("note", note) for note in self.notes],
            *prompt,
            ("a pass", self.reason),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<15}{value}" for name, value in self.rows())


def _units(names: Sequence[str]) -> str:
    return f"{len(names)} unit" + ("" if len(names) == 1 else "s")


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
    units: Sequence[UnitSize], device: str, budget: Budget = Budget(), speeds: Speeds = Speeds(), notes: Iterable[str] = ()
) -> Plan:
    """Decide what is resident, in the order of a pass.

    The ring is as small as hides the longest gap; every other byte of the budget is a resident, spread evenly over the
    depth of the model, the device's memory first and the host's next. Who stays is chosen in one fixed order, so more
    memory never means more bytes a pass. What every pass needs stays before any expert does: a byte of it saves a byte
    a pass, a byte of an expert saves one in the passes that are routed to it. Raises BudgetError, with the smallest budget
    that works.
    """
    _check_host(device, budget)
    staging = budget.host_staging_bytes if device == "cpu" else 0
    placed = _place_all(units, budget, staging) or _place_some(units, device, budget, staging)
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


def _place_all(units: Sequence[UnitSize], budget: Budget, staging: int) -> _Placed | None:
    """Everything on the device, if it fits: then nothing needs a ring. The embedding stays too where it fits as well."""
    streamed = [unit for unit in units if unit.role in ("streamed", "experts")]
    without = staging + sum(unit.nbytes for unit in units if unit.role != "embedding")
    if budget.device_bytes is not None and without > budget.device_bytes:
        return None
    whole = staging + sum(unit.nbytes for unit in units)
    return _Placed(streamed, [], [], 0, budget.device_bytes is None or whole <= budget.device_bytes)


def _place_some(units: Sequence[UnitSize], device: str, budget: Budget, staging: int) -> _Placed:
    assert budget.device_bytes is not None  # noqa: S101 - without a bound everything fits
    dense, layers = ([unit for unit in units if unit.role == role] for role in ("streamed", "experts"))
    slots = slots_for([(unit.name, unit.routing) for unit in _spread(layers) if unit.routing is not None])
    fixed = sum(unit.nbytes for unit in units if unit.role == "resident") + staging
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
