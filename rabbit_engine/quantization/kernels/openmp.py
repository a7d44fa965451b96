"""The threads that torch itself computes with on Linux: a team of OpenMP's.

After each operation they wait for the next one in a busy loop. Other threads would compete with them for the processors, and
would take longer to wake.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_SOFT_PAUSE = 1
"""`omp_pause_soft`: keep the settings."""

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def can_use_team() -> bool:
    """Whether torch's team can be used: found in its OpenMP, in a process that was not forked (OpenMP would wait forever)."""
    return not _forked and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """The OpenMP that torch is linked with, if it has the entry points of GNU OpenMP (that of LLVM has them on Linux)."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        start, end = library.GOMP_parallel_start, library.GOMP_parallel_end
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint), None
    end.argtypes, end.restype = (), None
    return library


def release_team() -> None:
    """End the threads of torch's team that belong to the calling thread; its next parallel operation starts new ones.

    Each thread that computes has a team of its own. Once teams have more threads than there are processors, GNU OpenMP lets all
    of them sleep between operations instead of wait in a busy loop. Does nothing with another OpenMP, or with one thread.
    """
    library = _library() if torch.get_num_threads() > 1 and not _forked else None
    pause = getattr(library, "omp_pause_resource_all", None)
    if pause is not None and not hasattr(library, "kmp_set_blocktime"):  # LLVM's would end the teams of all threads
        pause(_SOFT_PAUSE)


def compute_in_team(work: Callable[[], None], threads: int) -> None:
    """Call `work` in this thread and in up to `threads - 1` others; return when all have returned.

    Raises what it raises in this thread. In the others it must not raise.
    """
    library = _library()
    if library is None:
        raise RuntimeError("torch's threads cannot be used here")
    others_work = _CALLBACK(lambda _: work())
    try:
        library.GOMP_parallel_start(others_work, None, threads)
        work()
    finally:
        library.GOMP_parallel_end()
