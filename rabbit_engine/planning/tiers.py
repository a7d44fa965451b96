"""The parts of a plan: units of weights, the tiers of memory that may keep them, and other users of that memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.planning.experts import Routing
from rabbit_engine.utils.speeds import Speeds

Role = Literal["streamed", "embedding", "resident", "experts"]
Runs = Literal["each pass", "once a text", "for images"]
ScratchUse = Literal["around", "inside", "expert"]
Holding = Literal["weights", "experts", "caches"]

HOST, DISK = "host", "disk"
"""Names of tiers; a device's tier has the device's name."""

TEXTS, DRAFT, RING, STAGING = "caches of texts", "draft", "ring", "staging"
SCRATCH, WORK = "scratch for decoding", "temporaries of decoding"
"""Names of tenants."""


@dataclass(frozen=True, slots=True)
class UnitSize:
    """The role of a unit of weights in the model, and the bytes of memory it takes.

    A `streamed` unit passes through the ring, and an `embedding` is read by row, unless there is room to keep them; a
    `resident` must stay. One that `encloses` is held while units inside it are in use. One that `runs` in few passes (of an
    encoder or a vision tower) is `rare`: the last to stay. The `experts` of a layer are read on demand, with `routing`, unless
    everything fits. One with encoded weights needs `scratch_bytes` of the device while in use, and `work_bytes` of temporaries
    while it is decoded; one that is `decoded` at load needs both then, and `nbytes` counts its decoded weights. An encoded
    embedding is `only_by_row`: it never stays.
    """

    name: str
    role: Role
    nbytes: int
    read_bytes: int | None = None
    encloses: bool = False
    runs: Runs = "each pass"
    routing: Routing | None = None
    scratch_bytes: int = 0
    work_bytes: int = 0
    decoded: bool = False
    only_by_row: bool = False

    @property
    def rare(self) -> bool:
        """Whether there are passes that do not run it."""
        return self.runs != "each pass"

    @property
    def disk_bytes(self) -> int:
        """Bytes read from disk for it."""
        return self.nbytes if self.read_bytes is None else self.read_bytes

    @property
    def scratch_use(self) -> ScratchUse:
        """The scratch it is decoded into: one for each kind of unit that may be in use while another is."""
        return "expert" if self.role == "experts" else "around" if self.encloses else "inside"


def scratch_shares(units: Iterable[UnitSize]) -> dict[ScratchUse, int]:
    """The most scratch in use at once: a unit inside another, or an expert of it, is decoded while the outer keeps its own."""
    shares: dict[ScratchUse, int] = {"around": 0, "inside": 0, "expert": 0}
    for unit in units:
        shares[unit.scratch_use] = max(shares[unit.scratch_use], unit.scratch_bytes)
    return shares


@dataclass(frozen=True, slots=True)
class Tier:
    """A memory of `nbytes` (None: unlimited) that `holds` weights, experts or caches, and its `rate` in bytes per second to the
    device that computes; a `rate` of None marks that device. If its bytes also pass through another tier's link, `via` names
    that tier."""

    name: str
    nbytes: int | None = None
    rate: float | None = None
    holds: frozenset[Holding] = frozenset({"weights", "experts"})
    via: str | None = None

    @property
    def computes(self) -> bool:
        """Whether weights are used where they are kept."""
        return self.rate is None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A use of `nbytes` of a tier other than weights that stay there; an `optional` one is left out if the caller gives the
    tier's size."""

    name: str
    tier: str
    nbytes: int
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes of the device and of host memory that may be used; `None` is unlimited. On a CPU both are one: `device_bytes`.

    `reserved_bytes` of the device are for the caches and activations of texts (`reserved_by_default` if the caller named no
    number of tokens), `draft_bytes` for a model that guesses, `host_staging_bytes` for the buffers that reads go through (on a
    CPU only those of misaligned weights). The ring has at least `least_ring_bytes` if weights move.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    host_staging_bytes: int = 0
    reserved_bytes: int = 0
    reserved_by_default: bool = False
    draft_bytes: int = 0
    least_ring_bytes: int = 0

    @property
    def weights_bytes(self) -> int | None:
        """Bytes of the device for weights and their buffers: all but those for texts and a draft."""
        return None if self.device_bytes is None else max(0, self.device_bytes - self.reserved_bytes - self.draft_bytes)


UNBOUNDED = Budget()


def tiers_of(device: str, budget: Budget, speeds: Speeds) -> tuple[Tier, ...]:
    """The device, host memory if the device has its own, and the disk, which holds every weight."""
    first = Tier(device, budget.device_bytes, None, frozenset({"weights", "experts", "caches"}))
    if device == "cpu":
        return first, Tier(DISK, None, speeds.disk)
    return first, Tier(HOST, budget.host_bytes, speeds.link or math.inf), Tier(DISK, None, speeds.disk, via=HOST)


def tenants_of(tiers: Sequence[Tier], budget: Budget) -> tuple[Tenant, ...]:
    """The caches of texts on the first tier that may hold them, a draft on the device, and the read buffers in host memory."""
    texts = next(tier.name for tier in tiers if "caches" in tier.holds)
    staging = next((tier.name for tier in tiers if tier.name == HOST), tiers[0].name)
    found = (
        Tenant(TEXTS, texts, budget.reserved_bytes, budget.reserved_by_default),
        Tenant(DRAFT, tiers[0].name, budget.draft_bytes),
        Tenant(STAGING, staging, budget.host_staging_bytes),
    )
    return tuple(tenant for tenant in found if tenant.nbytes)
