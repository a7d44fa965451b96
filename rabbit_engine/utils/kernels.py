"""What oneDNN, torch's kernels for bf16 on x86, keeps between products."""

from __future__ import annotations

import os

_KEPT_KERNELS = 32
"""A pass runs a few shapes of product. torch keeps 1,024, and each takes 0.7 MB: 200 lengths of a prompt grew a process by
138 MB for one matrix, and by 33 MB so. Compiling one took 0.7 ms."""

_SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_kernels() -> None:
    """Have the caches of compiled kernels hold 32 shapes each, unless the environment says how many. They read it once, at
    the first product of the process."""
    for name in _SETTINGS:
        os.environ.setdefault(name, str(_KEPT_KERNELS))
