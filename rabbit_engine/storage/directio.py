"""Reads that bypass the page cache, into memory that is allocated once. Independent of tensors.

A model that is read again in every pass never finds its pages in the cache (a cyclic scan evicts what it needs next), and
filling the cache costs a copy and memory that other programs need. So files are read with O_DIRECT if the system has it,
with F_NOCACHE on macOS, else buffered, and the kernel is asked to drop the pages.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rabbit_engine.errors import BudgetError, DamagedFileError, MissingFileError, RabbitError, UnreadableFileError
from rabbit_engine.utils.sizes import format_bytes

PAGE = 4096
"""Alignment of direct reads (file offsets, memory and lengths): the largest logical block of today's disks."""

CHUNK_BYTES = 8 * 2**20
"""Bytes per read. Several reads are in flight at once, so that the disk always has a next one."""

HUGE_PAGE = 2 * 2**20

ABSENT = (-1, -1)
"""The stamp of bytes that are not on this machine: see `partial`."""

GROWS = -1
"""In place of the change time in the stamp of a file that others add to."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_O_BINARY = getattr(os, "O_BINARY", 0)
_O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def aligned_down(count: int) -> int:
    """The page boundary at or before `count`."""
    return count - count % PAGE


def aligned_up(count: int) -> int:
    """The page boundary at or after `count`."""
    return count + -count % PAGE


def claim_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] on the CPU, page-aligned, zeroed, returned to the system with its last view.

    In huge pages if the system has them: a direct read into 4 KiB pages is split into many small requests, and reached a
    third of the rate on our test disk (docs/benchmarks.md). The last part of a huge page is in small ones, so that it takes
    no more memory than requested. Private memory: shared memory rarely gets huge pages.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        return _claim(nbytes)
    except (OSError, MemoryError) as cause:
        raise BudgetError(
            f"the system refuses {format_bytes(nbytes)} of memory ({cause}): lower max_memory, or close other programs"
        ) from cause


def _claim(nbytes: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(mmap.mmap(-1, aligned_up(nbytes)), dtype=torch.uint8, count=nbytes)
    spare = HUGE_PAGE if nbytes >= HUGE_PAGE else 0
    memory = mmap.mmap(-1, aligned_up(nbytes) + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE if spare else 0
    if spare:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE_PAGE)
    return whole[start : start + nbytes]


def as_bytes(flat: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor [n] on the CPU, writable in place."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def buffered_reasons(paths: Iterable[Path]) -> set[str]:
    """Why reads of some of the files go through the page cache; empty if all bypass it.

    Probes each file system with a direct read, and `is_direct` follows the answer: the number of one that was unmounted may
    now be another's.
    """
    if sys.platform == "darwin":
        return set()
    samples = {_file_system(path): path for path in paths}
    reasons = {device: _ask(path) for device, path in samples.items()}
    _is_direct.update({device: reason is None for device, reason in reasons.items()})
    return {reason for reason in reasons.values() if reason is not None}


def is_direct(path: Path) -> bool:
    """Whether reads of `path` bypass the page cache; its file system is probed if it was not before."""
    if sys.platform == "darwin":
        return True
    device = _file_system(path)
    if device not in _is_direct:
        _is_direct[device] = _ask(path) is None
    return _is_direct[device]


_is_direct: dict[int, bool] = {}
"""By the file system's device, as it was last probed."""


def _file_system(path: Path) -> int:
    with disk_errors(path):
        return path.stat().st_dev


def _ask(path: Path) -> str | None:
    """Try a direct read; the reason if the file system refuses it, else None."""
    if not _O_DIRECT:
        return f"{sys.platform} has no O_DIRECT"
    memory = claim_memory(PAGE)
    try:
        with io.FileIO(os.open(path, os.O_RDONLY | _O_DIRECT), "rb") as file:
            file.readinto(as_bytes(memory))
    except OSError as error:
        return f"the file system refuses direct reads ({errno.errorcode.get(error.errno or 0, error)})"
    return None


def is_file(path: Path) -> bool:
    """Whether the file exists. Raises UnreadableFileError without the permission to find out."""
    with disk_errors(path):
        return path.is_file()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise an OSError about `path` within as UnreadableFileError or MissingFileError, which name the file."""
    try:
        yield
    except RabbitError:
        raise
    except OSError as cause:
        raise unreadable(path, cause) from cause


@contextmanager
def damage_as(error: type[RabbitError]) -> Iterator[None]:
    """Raise a DamagedFileError within as `error`. Also a decorator."""
    try:
        yield
    except DamagedFileError as found:
        if type(found) is not DamagedFileError:
            raise
        raise error(str(found)) from found.__cause__


def unreadable(path: Path, cause: OSError) -> RabbitError:
    """The error for an OSError about `path`."""
    if isinstance(cause, FileNotFoundError | NotADirectoryError):
        return MissingFileError(f"{path} is missing: put it back or download it again, then load the model again")
    return UnreadableFileError(f"{path} cannot be read ({_answer(cause)}){_ADVICE.get(cause.errno or 0, '')}")


_ADVICE = {
    errno.EIO: ": the disk is failing, copy the file to another one or download it again",
    errno.ENOMEM: ": the system is out of memory, lower max_memory or close other programs",
    errno.EACCES: ": give this user read permission",
    errno.EPERM: ": give this user read permission",
    errno.EISDIR: ": replace the folder with the file",
    errno.EMFILE: ": too many files are open, raise `ulimit -n`",
}


def _answer(cause: OSError) -> str:
    """`EIO, Input/output error`."""
    name = errno.errorcode.get(cause.errno or 0)
    return f"{name}, {cause.strerror}" if name else str(cause) or type(cause).__name__


def open_unchanged(path: Path, stamp: tuple[int, int] | None, *, direct: bool = False) -> io.FileIO:
    """The file, unbuffered. Raises DamagedFileError if it was replaced after its header was read, or is not a regular file, and
    MissingFileError for bytes that are not on this machine."""
    if stamp == ABSENT:
        raise MissingFileError(f"{path} holds only some layers on this machine, and these bytes were not fetched: load it again")
    flags = os.O_RDONLY | _O_BINARY | _O_NONBLOCK | (_O_DIRECT if direct else 0)  # a pipe in its place must not block
    with disk_errors(path):
        file = io.FileIO(os.open(path, flags), "rb")
        try:
            _require_unchanged(file, path, stamp)
        except BaseException:
            file.close()
            raise
    return file


def _require_unchanged(file: io.FileIO, path: Path, stamp: tuple[int, int] | None) -> None:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFileError(f"{path} is not a regular file: replace it with the model's file")
    if stamp is not None and stamp != (status.st_ino, stamp[1] if stamp[1] == GROWS else status.st_mtime_ns):
        raise DamagedFileError(f"{path} was replaced while in use: load the model again")


def stamp_of(file: io.FileIO) -> tuple[int, int]:
    """The inode and change time of an open file, which identify it and its version."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_mtime_ns


def read_into(file: io.RawIOBase, buffer: memoryview, path: Path, needed: int | None = None) -> None:
    """Fill `buffer` from the file's position, or at least its first `needed` bytes if the file ends there.

    Raises DamagedFileError if the file ends earlier, UnreadableFileError if the disk fails.
    """
    needed = len(buffer) if needed is None else needed
    done = 0
    with disk_errors(path):
        while done < needed:
            count = _read_some(file, buffer[done:])
            if not count:
                raise DamagedFileError(f"{path} is truncated: {needed - done} bytes missing; run `rabbit verify` on its folder")
            done += count


def _read_some(file: io.RawIOBase, buffer: memoryview) -> int | None:
    """One read; an interrupted one counts as empty and is retried."""
    while True:
        with contextlib.suppress(InterruptedError):
            return file.readinto(buffer)


def read_pages(
    path: Path,
    stamp: tuple[int, int] | None,
    offset: int,
    nbytes: int,
    memory: memoryview,
    *,
    direct: bool,
) -> None:
    """Read `nbytes` at `offset` of `path`, with the rest of their pages, into `memory`.

    `memory[0]` becomes the byte at `aligned_down(offset)`; it must be page-aligned and hold whole pages. With
    `direct=False` the read is buffered and its pages are dropped from the cache afterwards.
    """
    start, end = aligned_down(offset), offset + nbytes
    last = aligned_up(end) if direct else end
    with open_unchanged(path, stamp, direct=direct) as file, disk_errors(path):
        if direct and sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
        file.seek(start)
        read_into(file, memory[: last - start], path, end - start)
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
