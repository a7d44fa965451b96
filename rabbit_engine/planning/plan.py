"""The plan: which tier keeps each unit, and the cost of a pass that follows. `report` renders it as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rabbit_engine.planning import report, stages_report
from rabbit_engine.planning.experts import NO_EXPERTS, ExpertsPlan
from rabbit_engine.planning.tiers import DRAFT, HOST, RING, SCRATCH, STAGING, TEXTS, Budget, Tenant, Tier, UnitSize
from rabbit_engine.utils.report import Report
from rabbit_engine.utils.speeds import Speeds

if TYPE_CHECKING:
    from rabbit_engine.planning.stages_plan import StagesPlan

Bound = Literal["disk", "link", "decoding", "compute"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a pass with one token decodes: bytes of decoded weights, and the seconds that takes the device."""

    nbytes: int = 0
    seconds: float = 0.0


NO_DECODING = Decoding()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan(Report):
    """`tier_of` maps each unit to the tier that keeps it. `tiers` go from the fastest to the one that holds every weight.

    The first tier is the device that computes. `units` are in the order of a pass. Other users of a tier's memory are
    `tenants` (caches of texts, the ring, scratch and temporaries for decoding, staging) and slots of `experts` that are read on
    demand.
    All bytes are of memory, except `pass_bytes`, `link_bytes`, `encoder_bytes`, `rare_bytes` and `load_bytes`, which are moved.
    With such experts, `pass_bytes` and `link_bytes` are for a token with none of them cached, `least_pass_bytes` with as many
    as possible. `source` is the origin of the rates. Of a model in stages this is the plan of the first device, and `row` that of
    all, which it prints.
    """

    tiers: tuple[Tier, ...]
    units: tuple[UnitSize, ...]
    tier_of: Mapping[str, str]
    tenants: tuple[Tenant, ...]
    experts: ExpertsPlan = NO_EXPERTS
    source: str = "assumed"
    notes: tuple[str, ...] = ()
    decoding: Decoding = NO_DECODING
    row: StagesPlan | None = None

    @property
    def device(self) -> str:
        """The device that computes."""
        return self.tiers[0].name

    @property
    def _disk(self) -> Tier:
        return self.tiers[-1]

    @property
    def budget(self) -> Budget:
        """The memory that the plan was made for, on the device and in the host."""
        first, host = self.tiers[0], next((tier for tier in self.tiers if tier.name == HOST), None)
        return Budget(
            device_bytes=first.nbytes,
            host_bytes=host.nbytes if host else None,
            host_staging_bytes=self.staging_bytes,
            reserved_bytes=self.reserved_bytes,
            reserved_by_default=any(tenant.optional for tenant in self.tenants),
            draft_bytes=self.draft_bytes,
        )

    @property
    def speeds(self) -> Speeds:
        """The rates that the plan was made for."""
        link = next((tier.rate for tier in self.tiers if tier.name == HOST), None)
        return Speeds(disk=self._disk.rate or 0.0, link=link if link and link < math.inf else 0.0, source=self.source)

    def kept(self, tier: str) -> tuple[UnitSize, ...]:
        """The units that `tier` keeps, in the order of a pass."""
        return tuple(unit for unit in self.units if self.tier_of[unit.name] == tier)

    def held_bytes(self, tier: str) -> int:
        """Bytes of a tier used by units, tenants and slots; 0 for the last tier, which is the files."""
        index = [tier.name for tier in self.tiers].index(tier)
        if index == len(self.tiers) - 1:
            return 0
        tenants = sum(tenant.nbytes for tenant in self.tenants if tenant.tier == tier)
        return _nbytes(self.kept(tier)) + tenants + self.experts.tier_bytes(index)

    def tenant_bytes(self, name: str) -> int:
        """Bytes of the tenants with that name."""
        return sum(tenant.nbytes for tenant in self.tenants if tenant.name == name)

    @property
    def resident(self) -> tuple[str, ...]:
        """The units that stay on the device."""
        return _names(self.kept(self.device))

    @property
    def host(self) -> tuple[str, ...]:
        """The units kept in host memory."""
        return _names(self.kept(HOST))

    @property
    def streamed(self) -> tuple[str, ...]:
        """The units that are streamed whole from disk."""
        return _names(self._from_disk)

    @property
    def by_row(self) -> tuple[str, ...]:
        """The embeddings that are read by row."""
        return tuple(unit.name for unit in self.kept(self._disk.name) if unit.role == "embedding")

    @property
    def _from_disk(self) -> list[UnitSize]:
        return [unit for unit in self.kept(self._disk.name) if unit.role == "streamed"]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights of the model."""
        return _nbytes(self.units)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay on the device, without cached experts."""
        return _nbytes(self.kept(self.device))

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights in host memory, with cached experts."""
        index = next((index for index, tier in enumerate(self.tiers) if tier.name == HOST), None)
        return 0 if index is None else _nbytes(self.kept(HOST)) + self.experts.tier_bytes(index)

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring on the device, through which streamed units pass."""
        return self.tenant_bytes(RING)

    @property
    def scratch_bytes(self) -> int:
        """Bytes on the device into which encoded units are decoded."""
        return self.tenant_bytes(SCRATCH)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffers in host memory that reads go through."""
        return self.tenant_bytes(STAGING)

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for the caches and activations of texts."""
        return self.tenant_bytes(TEXTS)

    @property
    def draft_bytes(self) -> int:
        """Bytes on the device that a draft takes."""
        return self.tenant_bytes(DRAFT)

    @property
    def slots_start(self) -> int:
        """The offset of the slots for experts in the memory claimed on the device: behind what stays."""
        return self.resident_bytes

    @property
    def scratch_start(self) -> int:
        """The offset of the scratch in it: behind the slots."""
        return self.slots_start + self.experts.device_bytes

    @property
    def ring_start(self) -> int:
        """The offset of the ring in it: behind the scratch, up to the end."""
        return self.scratch_start + self.scratch_bytes

    @property
    def device_bytes(self) -> int:
        """The weight memory claimed on the device, once, at load: residents, slots, scratch and the ring, in this order."""
        return self.ring_start + self.ring_bytes

    @property
    def load_bytes(self) -> int:
        """Bytes read from disk once, at load."""
        return sum(unit.disk_bytes for unit in self.units if self.tier_of[unit.name] != self._disk.name)

    def moved_bytes(self, tier: Tier, *, cached: bool = False) -> int:
        """Bytes moved over the link of `tier` in a pass, including those that come through it: with no expert cached, or with as
        many `cached` as possible."""
        if tier.computes:
            return 0
        sources = {other.name: index for index, other in enumerate(self.tiers) if tier.name in self._path(other)}
        moving = [unit for unit in self.units if self.tier_of[unit.name] in sources and unit.role == "streamed" and not unit.rare]
        experts = self.experts
        if tier == self._disk:
            return sum(unit.disk_bytes for unit in moving) + (experts.least_bytes if cached else experts.most_bytes)
        uncached = experts.link_bytes if self._disk.name in sources else 0
        return _nbytes(moving) + (experts.least_moved_bytes(sources.values()) if cached else uncached)

    def _path(self, tier: Tier) -> list[str]:
        """The tier and those that its bytes pass through."""
        found = [tier.name]
        while tier.via is not None:
            tier = next(other for other in self.tiers if other.name == tier.via)
            found.append(tier.name)
        return found

    def link_seconds(self, tier: Tier, *, cached: bool = False) -> float:
        """Seconds per pass on the link of `tier` at its own rate."""
        return self.moved_bytes(tier, cached=cached) / tier.rate if tier.rate is not None else 0.0

    def slowest(self, *, cached: bool = False) -> Tier | None:
        """The tier whose link limits a pass, the last of equals; None if nothing moves."""
        if not any(self.moved_bytes(tier, cached=cached) for tier in self.tiers):
            return None
        return max(reversed(self.tiers), key=lambda tier: self.link_seconds(tier, cached=cached))

    @property
    def pass_bytes(self) -> int:
        """Bytes read from disk per pass."""
        return self.moved_bytes(self._disk)

    @property
    def least_pass_bytes(self) -> int:
        """Bytes read from disk per token at best; `pass_bytes` if no experts are cached."""
        return self.moved_bytes(self._disk, cached=True)

    @property
    def link_bytes(self) -> int:
        """Bytes copied from host memory to the device per pass; 0 on a CPU."""
        return sum(self.moved_bytes(tier) for tier in self.tiers if tier.name == HOST)

    @property
    def encoder_bytes(self) -> int:
        """Additional bytes from disk in the first pass of a text, which runs an encoder."""
        return sum(unit.disk_bytes for unit in self._from_disk if unit.runs == "once a text")

    @property
    def rare_bytes(self) -> int:
        """Additional bytes from disk in a pass that runs an image."""
        return sum(unit.disk_bytes for unit in self._from_disk if unit.runs == "for images")

    @property
    def pass_s(self) -> float:
        """Seconds per pass on the slowest link, with no expert cached, or of decoding if that takes longer: weights are decoded
        while others move."""
        return max(self.decoding.seconds, *map(self.link_seconds, self.tiers))

    @property
    def least_pass_s(self) -> float:
        """Seconds per pass at best, with as many experts cached as possible."""
        return max(self.decoding.seconds, *(self.link_seconds(tier, cached=True) for tier in self.tiers))

    @property
    def bound(self) -> Bound:
        """What limits a pass: a link, or decoding."""
        return self._bound(self.slowest(), self.pass_s)

    @property
    def least_bound(self) -> Bound:
        """What limits a pass at best."""
        return self._bound(self.slowest(cached=True), self.least_pass_s)

    def _bound(self, slowest: Tier | None, seconds: float) -> Bound:
        if 0 < seconds == self.decoding.seconds:
            return "decoding"
        if slowest is None:
            return "compute"
        return "disk" if slowest == self._disk else "link"

    @property
    def prompt_bytes(self) -> int:
        """The most bytes from disk for a prompt: its encoder, and each expert once."""
        return self.pass_bytes + self.encoder_bytes - self.experts.most_bytes + self.experts.all_bytes

    @property
    def first_token_s(self) -> float:
        """Seconds until the first token: read what stays, then run a pass over a prompt that needs every expert."""
        return (self.load_bytes + self.prompt_bytes - self.pass_bytes) / self.speeds.disk + self.pass_s

    @property
    def reason(self) -> str:
        """One line: the cost of a pass and its reason."""
        return report.reason(self) if self.row is None else stages_report.reason(self.row)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (name, value) rows."""
        return report.rows(self) if self.row is None else [*self.row.rows(), *(("note", note) for note in self.notes)]

    def __repr__(self) -> str:
        return report.line(self) if self.row is None else repr(self.row)


def _names(units: Iterable[UnitSize]) -> tuple[str, ...]:
    return tuple(unit.name for unit in units)


def _nbytes(units: Iterable[UnitSize]) -> int:
    return sum(unit.nbytes for unit in units)
