"""Sizes, rates and durations as text, and text as sizes."""

from __future__ import annotations

_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_bytes(count: float) -> str:
    """`format_bytes(23_900_000_000) -> "23.90 GB"`: decimal units, as disks and links are sold."""
    for step, unit in _STEPS:
        if abs(count) >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count:.0f} B"


def format_rate(count: float, seconds: float) -> str:
    """`format_rate(4_360_000_000, 2.5) -> "1.74 GB/s"`; "-" when no time has passed."""
    return f"{format_bytes(count / seconds)}/s" if seconds > 0 else "-"


def format_seconds(seconds: float) -> str:
    """`format_seconds(4.83) -> "4.83 s"`; minutes and hours where there are many."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"


def parse_bytes(text: str | int) -> int:
    """`parse_bytes("8GiB") -> 8589934592`: accelerate's own grammar (`"8GiB"`, `"8GB"`, an int), as in `max_memory`; plain
    digits are bytes.

    Raises ValueError for text that is not a size.
    """
    from accelerate.utils import convert_file_size_to_int

    if isinstance(text, str) and text.isdecimal():
        return int(text)
    return int(convert_file_size_to_int(text))
