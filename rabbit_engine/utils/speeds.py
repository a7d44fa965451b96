"""The speed of each link."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Bytes per second of the disk and of the copy to the device (0 on a CPU, which needs none), and the `source` of both."""

    disk: float = 2e9
    link: float = 0.0
    source: str = "assumed"


ASSUMED = Speeds()
