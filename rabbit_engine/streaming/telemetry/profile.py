"""Counters since a model was loaded, by unit and in total: bytes over each link, and where the time went."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from rabbit_engine.streaming.telemetry.speculation import SpeculationProfile
from rabbit_engine.utils.report import Report
from rabbit_engine.utils.sizes import format_bytes, format_rate, format_seconds


@dataclass(slots=True)
class Moved:
    """Counts under one name. Seconds are summed over its reads (which overlap), copies, waits and runs."""

    name: str
    bytes_read: int = 0
    bytes_copied: int = 0
    read_s: float = 0.0
    copy_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0


@dataclass(slots=True)
class UnitProfile(Moved):
    """One unit's counts. If the rest of a layer is a unit, its runs include those of the modules in the layer."""

    loads: int = 0


@dataclass(slots=True)
class ExpertsProfile(Moved):
    """The `count` experts of one layer: its `runs` used `used` experts, of which `read` came from disk and the others were
    cached, on the device or in host memory."""

    count: int = 0
    runs: int = 0
    used: int = 0
    read: int = 0

    @property
    def hit_rate(self) -> float:
        """The fraction of used experts that did not come from disk; 0 before the first."""
        return 1 - self.read / self.used if self.used else 0.0


@dataclass(slots=True, repr=False)
class Profile(Report):
    """Counts since the model was loaded.

    `read_s` are the seconds in which at least one read was under way, `wait_s` those in which the model waited for a
    unit, `pass_s` those of whole passes. `disk_rate` and `link_rate` are the links' own rates in bytes per second, as
    measured or given when the model was loaded; 0 if unknown. `speculation` counts generations that guess tokens ahead.
    """

    units: dict[str, UnitProfile] = field(default_factory=dict)
    experts: dict[str, ExpertsProfile] = field(default_factory=dict)
    passes: int = 0
    loads: int = 0
    bytes_read: int = 0
    bytes_copied: int = 0
    read_s: float = 0.0
    wait_s: float = 0.0
    pass_s: float = 0.0
    disk_rate: float = 0.0
    link_rate: float = 0.0
    speculation: SpeculationProfile = field(default_factory=SpeculationProfile)
    _under_way: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)

    def begin_read(self, now: float) -> None:
        """Count the beginning of a chunk's read."""
        self._tick(now)
        self._under_way += 1

    def end_read(self, now: float) -> None:
        """Count its end."""
        self._tick(now)
        self._under_way -= 1

    def _tick(self, now: float) -> None:
        """Count seconds shared by several reads once."""
        if self._under_way:
            self.read_s += now - self._since
        self._since = now

    def of(self, name: str) -> Moved:
        """The counts of a unit, or of the experts of a layer."""
        return self.units.get(name) or self.experts[name]

    def count_read(self, name: str, nbytes: int, seconds: float) -> None:
        """Count a chunk that has arrived."""
        unit = self.of(name)
        unit.bytes_read += nbytes
        unit.read_s += seconds
        self.bytes_read += nbytes

    def count_copy(self, name: str, nbytes: int, seconds: float) -> None:
        """Count a copy that was launched from host memory."""
        unit = self.of(name)
        unit.bytes_copied += nbytes
        unit.copy_s += seconds
        self.bytes_copied += nbytes

    def count_wait(self, name: str, seconds: float) -> None:
        """Count the time the model waited for a unit."""
        unit = self.units[name]
        unit.loads += 1
        unit.wait_s += seconds
        self.loads += 1
        self.wait_s += seconds

    def count_expert(self, name: str, *, is_read: bool) -> None:
        """Count a use of an expert, which was read or cached."""
        layer = self.experts[name]
        layer.used += 1
        layer.read += is_read

    def count_expert_wait(self, name: str, seconds: float) -> None:
        """Count the time the model waited for the next expert."""
        self.experts[name].wait_s += seconds
        self.wait_s += seconds

    @property
    def hit_rate(self) -> float:
        """The fraction of all used experts that did not come from disk; 0 if there are none."""
        used = sum(layer.used for layer in self.experts.values())
        return 1 - sum(layer.read for layer in self.experts.values()) / used if used else 0.0

    def joined(self, others: Sequence[Profile]) -> Profile:
        """A snapshot with what others count of their own units in the same passes. Seconds of reads and waits are sums."""
        found = self.copy()
        for other in others:
            found.units |= other.units
            found.experts |= other.experts
            found.loads += other.loads
            found.bytes_read += other.bytes_read
            found.bytes_copied += other.bytes_copied
            found.read_s += other.read_s
            found.wait_s += other.wait_s
        return found

    def copy(self) -> Profile:
        """A snapshot."""
        return copy.deepcopy(self)

    def rows(self) -> list[tuple[str, str]]:
        """The sums as (name, value) rows."""
        own = f" (the disk's own: {format_rate(self.disk_rate, 1)})" if self.disk_rate else ""
        copied = [("copied", f"{format_bytes(self.bytes_copied)} from host memory")] if self.bytes_copied else []
        return [
            ("passes", f"{self.passes}, {format_seconds(self.pass_s / self.passes) if self.passes else '-'} each"),
            ("read", f"{self._read_text()}{own}"),
            *copied,
            ("waited", self._waited_text()),
            *([("experts", self._experts_text())] if self.experts else []),
            *self.speculation.rows(),
        ]

    def __repr__(self) -> str:
        return f"<Profile: {self.passes} passes, read {self._read_text()}, waited {self._waited_text()}>"

    def _read_text(self) -> str:
        return f"{format_bytes(self.bytes_read)} at {format_rate(self.bytes_read, self.read_s)}"

    def _waited_text(self) -> str:
        return f"{format_seconds(self.wait_s)} of {format_seconds(self.pass_s)}"

    def _experts_text(self) -> str:
        layers = [layer for layer in self.experts.values() if layer.runs]
        if not layers:
            return "none used yet"
        used, runs = sum(layer.used for layer in layers), sum(layer.runs for layer in layers)
        rates = [layer.hit_rate for layer in layers]
        read = format_bytes(sum(layer.bytes_read for layer in layers))
        return (
            f"{used / runs:.1f} a layer and pass, {self.hit_rate:.0%} of them cached "
            f"({min(rates):.0%} to {max(rates):.0%} by layer), {read} read"
        )
