"""Measures a folder's disk with reads like the readers': chunks in file order, several at once.

Reads a large file in the folder, as weights would be read; if there is none, a scratch file is written first.
`fio --rw=read --direct=1 --ioengine=libaio --bs=8m --iodepth=6 --iomem_align=2m` reads the same way if its buffers are in huge
pages like ours (GLIBC_TUNABLES=glibc.malloc.hugetlb=1); with small pages it may reach half.
"""

from __future__ import annotations

import os
import shutil
import stat
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import torch

from rabbit_engine.errors import NotEnoughDiskError
from rabbit_engine.storage.directio import CHUNK_BYTES, PAGE, aligned_down, as_bytes, buffered_reasons
from rabbit_engine.streaming.transfer.measure import direct_reads
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.utils.sizes import format_bytes

SAMPLE_BYTES = 2**30
ROUNDS = 5

_LEAST_BYTES = 2**26
"""A smaller sample says nothing about a fast disk: it is read in a few milliseconds."""

_LEAST_ROUNDS = 3
_MOST_S = 30.0
"""After this many seconds a slow disk has been measured enough."""

_MOST_ENTRIES = 20_000
"""The most files examined in search of a large one."""

OWN_FILES = Path("/proc/self/fd")
"""Open files by number, on systems that list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """Bytes per second of each round, which reads `sample_bytes` of `file` (None: of a scratch file). `buffered` is why reads
    went through the page cache, None if they bypassed it."""

    rounds: tuple[float, ...]
    sample_bytes: int
    file: Path | None
    buffered: str | None

    @property
    def median(self) -> float:
        """Bytes per second of the median round."""
        return statistics.median(self.rounds)


def measure_disk_rate(folder: Path, sample_bytes: int = SAMPLE_BYTES, rounds: int = ROUNDS) -> DiskRate:
    """Time `rounds` rounds (three on a slow disk) after one untimed, in the folder's largest file or a scratch file.

    Raises NotEnoughDiskError, or OSError if nothing can be written or read.
    """
    sample_bytes = max(PAGE, aligned_down(sample_bytes))
    found = find_large_file(folder, sample_bytes)
    if found is not None:
        return _time_rounds(found, found, sample_bytes, rounds)
    sample_bytes = room_for(folder, sample_bytes)
    with scratch_file(folder, sample_bytes) as path:
        return _time_rounds(path, None, sample_bytes, rounds)


def find_large_file(folder: Path, least_bytes: int) -> Path | None:
    """The first file of `least_bytes` or more, in or below `folder` and on its disk; None if a short search finds none.

    Files with holes, and those compressed by the file system, would read faster than the disk.
    """
    device = folder.stat().st_dev
    paths = (Path(parent) / name for parent, _, names in os.walk(folder) for name in sorted(names))
    for path in islice(paths, _MOST_ENTRIES):
        try:
            status = path.lstat()
        except OSError:  # deleted in the meantime
            continue
        stored = getattr(status, "st_blocks", status.st_size // 512 + 1) * 512
        whole = stat.S_ISREG(status.st_mode) and status.st_dev == device and stored >= status.st_size >= least_bytes
        if whole and os.access(path, os.R_OK):
            return path
    return None


@contextmanager
def scratch_file(folder: Path, nbytes: int, own_files: Path = OWN_FILES) -> Iterator[Path]:
    """A file of `nbytes` random bytes on the disk of `folder`, deleted afterwards. Raises OSError if it cannot be written.

    On Linux the file never has a name: it disappears with the process, however that ends.
    """
    if own_files.is_dir():
        with tempfile.TemporaryFile(dir=folder) as nameless:
            _write_random(nameless, nbytes)
            yield own_files / str(nameless.fileno())
        return
    number, name = tempfile.mkstemp(dir=folder, prefix="rabbit-scratch-")
    try:
        with os.fdopen(number, "wb") as file:
            _write_random(file, nbytes)
        yield Path(name)
    finally:
        Path(name).unlink()


def _write_random(file: IO[bytes], nbytes: int) -> None:
    """Write random bytes, which no file system can compress, and wait until they are on disk."""
    generator = torch.Generator().manual_seed(time.time_ns())
    block = torch.empty(2**21, dtype=torch.int64)
    for start in range(0, nbytes, block.nbytes):
        block.random_(generator=generator)
        file.write(as_bytes(block.view(torch.uint8))[: nbytes - start])
    file.flush()
    os.fsync(file.fileno())


def room_for(folder: Path, nbytes: int) -> int:
    """`nbytes`, or half of the free space if that is less."""
    free = shutil.disk_usage(folder).free
    room = min(nbytes, aligned_down(free // 2))
    if room < min(nbytes, _LEAST_BYTES):
        raise NotEnoughDiskError(f"{folder} has {format_bytes(free)} free, too little for a sample of {format_bytes(nbytes)}")
    return room


def _time_rounds(path: Path, found: Path | None, sample_bytes: int, rounds: int) -> DiskRate:
    """Time rounds that each read the next `sample_bytes` of the file, wrapping around at its end."""
    _drop_cache(path)
    buffered = next(iter(buffered_reasons([path])), None)
    starts = range(0, path.stat().st_size - sample_bytes + 1, sample_bytes)
    rates: list[float] = []
    begin = time.perf_counter()
    for index in range(rounds + 1):
        read = direct_reads(sample_chunks(path, starts[index % len(starts)], sample_bytes))
        start = time.perf_counter()
        read()
        rates.append(sample_bytes / (time.perf_counter() - start))
        if index >= _LEAST_ROUNDS and time.perf_counter() - begin > _MOST_S:
            break
    return DiskRate(rounds=tuple(rates[1:]), sample_bytes=sample_bytes, file=found, buffered=buffered)


def sample_chunks(path: Path, first: int, nbytes: int) -> Sequence[Extent]:
    """`nbytes` from `first`, in reads of the size used for weights."""
    return [Extent(path, first + start, min(CHUNK_BYTES, nbytes - start), 0) for start in range(0, nbytes, CHUNK_BYTES)]


def _drop_cache(path: Path) -> None:
    """Make reads through the page cache reach the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
