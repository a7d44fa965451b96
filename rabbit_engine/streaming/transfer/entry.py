"""A unit on its way to the device: where it comes from, where it goes, and how far it has come. Knows no policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.streaming.transfer.ring import Mark, Ring
from rabbit_engine.streaming.transfer.unit import Extent, Unit

State = Literal["waiting", "reading", "here", "failed", "dropped"]


@dataclass(slots=True, eq=False)
class HostPlace:
    """Room for a unit in host memory, from `start` on in `ring`: whether it is `filled`, and the mark behind the last copy."""

    ring: Ring
    start: int
    filled: bool = False
    copied: Mark = None


@dataclass(slots=True, eq=False)
class Entry:
    """One unit, once: waiting (for a place) -> reading -> here. `failed` where a read failed; `dropped` where nobody wants it
    any more and bytes of it are still being read: its place is not free before they have arrived.

    It comes in `chunks` of its files, which pass through `host` where it has a place there, or whole from `host` where it has
    no chunks. What was brought is counted under `counted_as`. `give_back` takes back the place of one that failed or was
    dropped; whoever made the entry takes back that of one that is here.
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
        """In how many jobs it comes."""
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
        """It goes to `place` in the device's ring, whose last use lies before `after`."""
        self.place, self.after, self.state = place, after, "reading"
