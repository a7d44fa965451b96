"""How fast bytes come over each link."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Bytes a second of each link: the disk, the copy to the device (0 on a CPU: there is none). `source` says how known."""

    disk: float = 2e9
    link: float = 0.0
    source: str = "assumed"


ASSUMED = Speeds()
