"""Limits the cache of compiled kernels in oneDNN, which torch uses for bf16 products on x86."""

from __future__ import annotations

import os

_KEPT_KERNELS = 32
"""A pass runs products of few shapes. torch caches 1,024 kernels of 0.7 MB each: 200 prompt lengths grew a process by 138 MB
for one matrix, and by 33 MB with this limit. Compiling one took 0.7 ms."""

_SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_kernels() -> None:
    """Limit each cache of compiled kernels to 32 shapes, unless the environment sets a limit. torch reads the limit once, at
    the first product of the process."""
    for name in _SETTINGS:
        os.environ.setdefault(name, str(_KEPT_KERNELS))
