"""The C library's allocator: what it keeps of the memory that Python and torch have freed."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 2**18
"""Tensors from this size on are given back to the system when they are freed. glibc raises its own threshold to 32 MiB as
tensors come and go, and keeps what caches of growing texts leave behind (docs/budget.md)."""

_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def _glibc() -> Any:
    """glibc, or None where another C library runs."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


@functools.cache
def give_back_large() -> bool:
    """Have large blocks given back when they are freed, from now on; False where that is not glibc's to do, or the
    environment says otherwise."""
    library = _glibc()
    if library is None or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES))


def give_back_free() -> None:
    """Give what is free within the heap back to the system, where glibc runs: a few milliseconds."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
