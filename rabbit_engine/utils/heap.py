"""The C library's heap: what it keeps of the memory that Python and torch have freed. Only glibc is told anything."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 2**18
"""glibc raises its own threshold to 32 MiB as tensors come and go, and keeps what growing caches leave behind: of 24 MB of
cache (SmolLM2-135M, 1,000 tokens) 18 MB stayed when it was freed, and 3 MB so."""

_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def give_free_memory_back() -> None:
    """Return freed memory to the system: glibc keeps what lies between blocks in use."""
    library = glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def give_large_blocks_back() -> bool:
    """From now on, return blocks of 256 KiB and more as soon as they are freed. False where that is not glibc's to do, or
    the environment has settings of its own."""
    library = glibc()
    if library is None or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))


@functools.cache
def glibc() -> Any:
    """The C library, None where it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
