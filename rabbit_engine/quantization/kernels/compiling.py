"""Decorators that compile a function with numba when it is first called.

Compiled code is kept in `__pycache__` next to the kernels, or in the user's cache folder, where one of them can be written.
numba compiles again if a kernel's own file has changed; parts of it may stand in others, so its name there tells them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., object])

_SUMS = ("reassoc", "contract", "nsz")
"""What LLVM may do to sums: their order, fused multiplication and addition, and the sign of zero."""


def kernel(function: _Function) -> _Function:
    """Compile a kernel: it releases the GIL, and rounds every operation as written (no `fastmath`)."""
    return _compiled(function, fastmath=False)


def product_kernel(function: _Function) -> _Function:
    """Compile a kernel that may order its sums as is fastest. Infinite and NaN values keep their meaning."""
    return _compiled(function, fastmath=True)


def part(function: _Function) -> _Function:
    """Compile a function that kernels of the same file call."""
    return cast(_Function, numba.njit(function, nogil=True, error_model="numpy", forceinline=True))


def product_part(function: _Function) -> _Function:
    """Compile a function that product kernels of the same file call, and whose sums may be ordered as is fastest."""
    compiled = numba.njit(function, nogil=True, error_model="numpy", forceinline=True, fastmath=set(_SUMS))
    return cast(_Function, compiled)


def _compiled(function: _Function, *, fastmath: bool) -> _Function:
    flags: bool | set[str] = set(_SUMS) if fastmath else False
    sources = sorted(Path(function.__code__.co_filename).parent.glob("*.py"))
    stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sources)
    function.__qualname__ += f"-{_digest(stamps)}"
    try:
        compiled = numba.njit(function, nogil=True, error_model="numpy", fastmath=flags, cache=True)
    except RuntimeError:  # no folder for compiled code
        compiled = numba.njit(function, nogil=True, error_model="numpy", fastmath=flags)
    return cast(_Function, compiled)


@cache
def _digest(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Of the contents of files."""
    found = hashlib.sha256()
    for path, *_ in stamps:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]
