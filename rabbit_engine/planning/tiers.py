"""What a plan is made of: units of weights, the tiers of memory they may be kept in, and what else takes memory there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.planning.experts import Routing
from rabbit_engine.utils.speeds import Speeds

Role = Literal["streamed", "embedding", "resident", "experts"]
ScratchUse = Literal["around", "inside", "expert"]
Holding = Literal["weights", "experts", "caches"]

HOST, DISK = "host", "disk"
"""Names of tiers; a device's tier has the device's name."""

TEXTS, RING, SCRATCH, STAGING = "caches of texts", "ring", "scratch for decoding", "staging"
"""Names of tenants."""


@dataclass(frozen=True, slots=True)
class UnitSize:
    """What a unit of weights is to the model, and how many bytes of memory it takes.

    A `streamed` one passes through the ring unless there is room for it to stay; an `embedding` is read by row unless
    there is room for everything; a `resident` must stay. One that `encloses` is held while units inside of it are asked
    for. A `rare` one runs in few passes (a vision tower, when an image comes): it is the last to stay. The `experts` of a
    layer are read as they are routed to, with `routing`, unless there is room for everything. One whose weights are stored
    encoded takes `scratch_bytes` of the device while it is used; one that is `decoded` when it is loaded takes them then, and
    `nbytes` are those of its decoded weights.
    """

    name: str
    role: Role
    nbytes: int
    read_bytes: int | None = None
    encloses: bool = False
    rare: bool = False
    routing: Routing | None = None
    scratch_bytes: int = 0
    decoded: bool = False

    @property
    def disk_bytes(self) -> int:
        """What a read of it asks the disk for."""
        return self.nbytes if self.read_bytes is None else self.read_bytes

    @property
    def scratch_use(self) -> ScratchUse:
        """Which scratch it is decoded into: one for each kind of unit that may be in use while another is."""
        return "expert" if self.role == "experts" else "around" if self.encloses else "inside"


def scratch_shares(units: Iterable[UnitSize]) -> dict[ScratchUse, int]:
    """The most scratch in use at once: a unit inside of another, or an expert of it, is decoded while that one keeps its own."""
    shares: dict[ScratchUse, int] = {"around": 0, "inside": 0, "expert": 0}
    for unit in units:
        shares[unit.scratch_use] = max(shares[unit.scratch_use], unit.scratch_bytes)
    return shares


@dataclass(frozen=True, slots=True)
class Tier:
    """A memory of `nbytes` (None: not bounded) that `holds` weights, experts or caches, and its `rate` in bytes a second to
    the device that computes. A `rate` of None: this is such a device. Where its bytes come through another tier's link as
    well, `via` names that tier."""

    name: str
    nbytes: int | None = None
    rate: float | None = None
    holds: frozenset[Holding] = frozenset({"weights", "experts"})
    via: str | None = None

    @property
    def computes(self) -> bool:
        """Whether weights are used where they lie."""
        return self.rate is None


@dataclass(frozen=True, slots=True)
class Tenant:
    """What takes `nbytes` of a tier besides weights that stay there."""

    name: str
    tier: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that weights and the buffers they pass through may take on the device and in host memory; `None` is no bound. On a
    CPU both are one: `device_bytes`.

    `host_staging_bytes` are the buffers that reads go through (on a CPU only those of misaligned weights). The caches and
    activations of texts take `reserved_bytes` of the device on top, out of `given_bytes` where the caller gave those.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    host_staging_bytes: int = 0
    reserved_bytes: int = 0
    given_bytes: int | None = None


UNBOUNDED = Budget()


def tiers_of(device: str, budget: Budget, speeds: Speeds) -> tuple[Tier, ...]:
    """The device, host memory where that is not the device's own, and the disk, which holds every weight."""
    own = None if budget.device_bytes is None else budget.device_bytes + budget.reserved_bytes
    first = Tier(device, own, None, frozenset({"weights", "experts", "caches"}))
    if device == "cpu":
        return first, Tier(DISK, None, speeds.disk)
    return first, Tier(HOST, budget.host_bytes, speeds.link or math.inf), Tier(DISK, None, speeds.disk, via=HOST)


def tenants_of(tiers: Sequence[Tier], budget: Budget) -> tuple[Tenant, ...]:
    """The caches of texts on the first tier that holds any, and the buffers that reads go through in host memory."""
    texts = next(tier.name for tier in tiers if "caches" in tier.holds)
    staging = next((tier.name for tier in tiers if tier.name == HOST), tiers[0].name)
    found = (Tenant(TEXTS, texts, budget.reserved_bytes), Tenant(STAGING, staging, budget.host_staging_bytes))
    return tuple(tenant for tenant in found if tenant.nbytes)


def tenant_bytes(tenants: Iterable[Tenant], tier: str) -> int:
    """What tenants take of a tier."""
    return sum(tenant.nbytes for tenant in tenants if tenant.tier == tier)
