"""The C library's heap: what was freed goes back to the system only when it is told to."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_free_memory_back() -> None:
    """Return freed memory to the system, where the C library is glibc: it keeps what lies between blocks in use."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another library, or Windows
        return lambda _: None
    return trim
