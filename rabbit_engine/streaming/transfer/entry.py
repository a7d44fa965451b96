"""A unit in transit to the device: its source, its place and its progress. Independent of policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.streaming.transfer.ring import Mark, Ring
from rabbit_engine.streaming.transfer.unit import Extent, Unit

State = Literal["waiting", "reading", "here", "failed", "dropped"]


@dataclass(slots=True, eq=False)
class HostPlace:
    """A unit's place in host memory, from `start` on in `ring`: whether it is `filled`, and the mark after the last copy."""

    ring: Ring
    start: int
    filled: bool = False
    copied: Mark = None


@dataclass(slots=True, eq=False)
class Entry:
    """One transfer of a unit: waiting (for a place) -> reading -> here. `failed` if a read failed; `dropped` if it is no longer
    wanted but still being read: its place is free only when those bytes have arrived.

    It comes in `chunks` of its files, which pass through `host` if it has a place there, or whole from `host` without
    chunks. Its bytes are counted under `counted_as`. `give_back` frees the place of a failed or dropped entry; its creator
    frees that of one that is here.
    """

    unit: Unit
    counted_as: str
    chunks: tuple[Extent, ...]
    host: HostPlace | None
    give_back: Callable[[Entry], None]
    wanted: bool = False
    state: State = "waiting"
    place: int = -1
    after: Mark = None
    arrived: Mark = None
    issued: int = 0
    under_way: int = 0
    error: BaseException | None = None

    @property
    def parts(self) -> int:
        """The number of jobs it takes."""
        return len(self.chunks) or 1

    @property
    def has_parts_left(self) -> bool:
        """Whether a part of it can be read now."""
        return self.state == "reading" and self.issued < self.parts

    @property
    def on_its_way(self) -> bool:
        """Whether it may still arrive."""
        return self.state in ("waiting", "reading")

    def begin(self, place: int, after: Mark) -> None:
        """Assign it `place` in the device's ring, whose last use ends before `after`."""
        self.place, self.after, self.state = place, after, "reading"
