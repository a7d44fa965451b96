"""Compiled kernels for encoded weights on a CPU: whether they can run here, and how their rows are divided among threads.

The kernels stand in modules of this package that import numba; import those only where `can_run` holds: importing numba takes
half a second. Each has torch operations behind it that give the same bits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module, metadata

import torch

from rabbit_engine.errors import first_line
from rabbit_engine.quantization.kernels.openmp import can_use_team, compute_in_team
from rabbit_engine.quantization.kernels.pool import compute_in_pool

logger = logging.getLogger(__name__)

TORCH_OPERATIONS = "torch operations"

_PIECES = 4
"""Ranges of rows for each thread: other work on a core delays one range, not a whole share."""

THREAD_VALUES = 2**17
"""Decoded values that are worth a thread of their own."""

BITS = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""How kernels tell the dtype of their output, whose bits they write."""

_torch_only: ContextVar[bool] = ContextVar("_torch_only", default=False)


def can_run(device: torch.device) -> bool:
    """Whether compiled kernels run on tensors of `device`: on a CPU where numba can be imported."""
    return device.type == "cpu" and not _torch_only.get() and _numba_version() is not None


def can_write(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a compiled kernel can decode to `dtype` on `device`."""
    return dtype in BITS and can_run(device)


def kernels_in_use() -> str:
    """What computes on encoded weights on a CPU, such as "numba 0.65.0" or "torch operations". Imports numba."""
    version = None if _torch_only.get() else _numba_version()
    return TORCH_OPERATIONS if version is None else f"numba {version}"


@contextmanager
def torch_operations() -> Iterator[None]:
    """Within the block, this thread decodes with torch operations in place of compiled kernels."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


@cache
def _numba_version() -> str | None:
    """The version of numba; None without it, or if its compiler is turned off (NUMBA_DISABLE_JIT)."""
    try:
        numba = import_module("numba")
    except ModuleNotFoundError:
        return None
    except ImportError as error:  # such as a numba that is older than numpy
        logger.warning("numba cannot be imported (%s): weights are decoded with slower torch operations", first_line(error))
        return None
    return None if numba.config.DISABLE_JIT else metadata.version("numba")


def run_rows(kernel: Callable[..., None], count: int, *args: object, least: int = 1) -> None:
    """Call `kernel(first, stop, *args)` for ranges that cover rows 0 to `count`, and return when all are computed.

    Up to `torch.get_num_threads()` threads compute, this one among them; a thread is worth `least` rows. `kernel` should
    release the GIL. Raises what the kernel raises.
    """
    threads = min(torch.get_num_threads(), count // least)
    if threads <= 1:
        if count:
            kernel(0, count, *args)
        return
    step = -(-count // (threads * _PIECES))
    left = deque((first, min(first + step, count)) for first in range(0, count, step))
    problems: list[BaseException] = []

    def compute() -> None:
        try:
            while (rows := _next(left)) is not None:
                kernel(*rows, *args)
        except BaseException as problem:  # noqa: BLE001 - raised again below
            left.clear()
            problems.append(problem)

    (compute_in_team if can_use_team() else compute_in_pool)(compute, threads)
    if problems:
        raise problems[0]


def _next(left: deque[tuple[int, int]]) -> tuple[int, int] | None:
    """Take the first range, unless another thread took the last one."""
    try:
        return left.popleft()
    except IndexError:
        return None
