"""What was decided: the budget it was decided for, the plan, and how a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.planning.experts import NO_EXPERTS, ExpertsPlan
from rabbit_engine.utils.report import Report
from rabbit_engine.utils.sizes import format_bytes, format_rate, format_seconds
from rabbit_engine.utils.speeds import Speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that weights and the buffers they pass through may take on the device and in host memory; `None` is no bound. On a
    CPU both are one: `device_bytes`.

    `host_staging_bytes` are the buffers that reads go through (on a CPU only those of misaligned weights),
    `reserved_bytes` what was set aside for the cache and activations before this budget was made, out of `given_bytes`
    where the caller gave those.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    host_staging_bytes: int = 0
    reserved_bytes: int = 0
    given_bytes: int | None = None


UNBOUNDED = Budget()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan(Report):
    """What stays on the device and in host memory, what comes from disk, and what a pass costs. All bytes are of memory,
    but for `pass_bytes`, `link_bytes`, `rare_bytes` and `load_bytes`, which move; `rare_bytes` come from disk on top of a
    pass's where an image runs. Into `scratch_bytes` units whose weights are stored encoded are decoded.

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
    scratch_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """The weight memory claimed on the device, once, at load: residents, slots, the ring, and scratch behind it."""
        return self.resident_bytes + self.experts.device_bytes + self.ring_bytes + self.scratch_bytes

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
        scratch = [("scratch for decoding", f"{format_bytes(self.scratch_bytes)} on {self.device}")] if self.scratch_bytes else []
        staging = [("staging", format_bytes(self.staging_bytes))] if self.staging_bytes else []
        link = [("over the link", f"{format_bytes(self.link_bytes)} a pass")] if self.link_bytes else []
        dense = self.pass_bytes - self.experts.most_bytes
        experts = [("experts", self.experts.text)] if self.experts.layers else []
        prompt = [("a prompt", f"{format_bytes(self.prompt_bytes)} at most: each expert once")] if experts else []
        return [
            ("weights", format_bytes(self.weights_bytes)),
            ("budget", f"{given} on {self.device} for weights and what they pass through{reserved}"),
            ("resident", f"{_units(self.resident)}, {format_bytes(self.resident_bytes)} on {self.device}"),
            *host,
            ("by row", ", ".join(self.by_row) or "nothing"),
            ("streamed", f"{len(self.streamed)} units, {format_bytes(dense)} a pass from disk"),
            *experts,
            *link,
            *([("for images", f"{format_bytes(self.rare_bytes)} more from disk")] if self.rare_bytes else []),
            ("ring", f"{format_bytes(self.ring_bytes)} on {self.device}"),
            *scratch,
            *staging,
            *[("note", note) for note in self.notes],
            *prompt,
            ("a pass", self.reason),
        ]

    def __repr__(self) -> str:
        held, moved = format_bytes(self.device_bytes), format_bytes(self.pass_bytes)
        return f"<Plan on {self.device}: {format_bytes(self.weights_bytes)} of weights, {held} held, {moved} a pass from disk>"


def _units(names: Sequence[str]) -> str:
    return f"{len(names)} unit" + ("" if len(names) == 1 else "s")
