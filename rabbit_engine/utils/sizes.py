"""Sizes, rates and durations as text, and text as sizes."""

from __future__ import annotations

import numbers
import re
from decimal import Decimal

_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_bytes(count: float) -> str:
    """`format_bytes(23_900_000_000) -> "23.90 GB"`, in decimal units, as for disks and links."""
    for step, unit in _STEPS:
        if abs(count) >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count:.0f} B"


def format_rate(count: float, seconds: float) -> str:
    """`format_rate(4_360_000_000, 2.5) -> "1.74 GB/s"`; "-" for zero seconds."""
    return f"{format_bytes(count / seconds)}/s" if seconds > 0 else "-"


def format_seconds(seconds: float) -> str:
    """`format_seconds(4.83) -> "4.83 s"`; long durations in minutes or hours."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"


_SIZE = re.compile(r"(\d+\.?\d*(?:e[+-]?\d{1,3})?|\.\d+)\s*(?:([kmgtp])(i?))?(?:b|bytes?)?", re.IGNORECASE | re.ASCII)
_EXPECTED = "write 8GiB, 8GB or a number of bytes"


def parse_bytes(size: str | float) -> int:
    """`parse_bytes("8GiB") -> 8589934592`, `parse_bytes("8GB") -> 8000000000`: always bytes, in upper or lower case.

    `"8G"` is `"8GB"`, `"8Gi"` is `"8GiB"`; a number, or a string of digits, is bytes. Raises ValueError for an invalid size.
    """
    if isinstance(size, bool) or not isinstance(size, str | numbers.Real):
        raise ValueError(f"{size!r} is not a size: {_EXPECTED}")
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise ValueError(f"{size!r} is not a size: {_EXPECTED}")
    number, unit, binary = match.groups()
    count = Decimal(number) * (1024 if binary else 1000) ** " kmgtp".index((unit or " ").lower())
    if count >= 2**63:
        raise ValueError(f"{size!r} is more bytes than a machine has: {_EXPECTED}")
    return int(count)


def parse_rate(rate: str) -> int:
    """`parse_rate("2.34 GB/s") -> 2340000000`: a size, with or without "/s". Raises ValueError for an invalid rate."""
    return parse_bytes(re.sub(r"/s\s*$", "", rate, flags=re.IGNORECASE))
