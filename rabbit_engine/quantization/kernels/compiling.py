"""Decorators that compile a function with numba when it is first called.

Compiled code is kept in `__pycache__` next to the kernels, or in the user's cache folder, where one of them can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., object])


def kernel(function: _Function) -> _Function:
    """Compile a kernel: it releases the GIL, and rounds every operation as written (no `fastmath`)."""
    return _compiled(function, fastmath=False)


def product_kernel(function: _Function) -> _Function:
    """Compile a kernel that may order its sums as is fastest. Infinite and NaN values keep their meaning."""
    return _compiled(function, fastmath=True)


def part(function: _Function) -> _Function:
    """Compile a function that kernels of the same file call."""
    return cast(_Function, numba.njit(function, nogil=True, error_model="numpy", forceinline=True))


def _compiled(function: _Function, *, fastmath: bool) -> _Function:
    flags: bool | set[str] = {"reassoc", "contract", "nsz"} if fastmath else False
    try:
        compiled = numba.njit(function, nogil=True, error_model="numpy", fastmath=flags, cache=True)
    except RuntimeError:  # no folder for compiled code
        compiled = numba.njit(function, nogil=True, error_model="numpy", fastmath=flags)
    return cast(_Function, compiled)
