"""A machine's own copy of a model's files: small ones whole, weights as files of their full size that hold only the extents
which this machine needs.

Each file of weights has a record of its extents, written after them, so that an interrupted copy is continued and never
believed. One process at a time adds to a copy; others may read what is there.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import xxhash

from rabbit_engine.cluster.description import FileExtent, FileRow, FilesDescription, row_matches
from rabbit_engine.cluster.sending import IN_FLIGHT, ReadChunk, checksum
from rabbit_engine.cluster.stored import changing, make_room, use
from rabbit_engine.errors import ClusterError, DamagedFileError, NotEnoughDiskError
from rabbit_engine.storage.directio import disk_errors
from rabbit_engine.storage.partial import PresentExtents, Span, merged, read_present, record_path, total_bytes, without
from rabbit_engine.storage.tensorfiles import written_whole
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)

CHUNK_BYTES = 32 * 2**20
_RECORDED_CHUNKS = 32
"""So many chunks are fetched before the record is written: what an interruption loses."""

_GAP = 64 * 2**10
"""Extents at most this far apart are fetched as one."""

_ATTEMPTS = 2


def copy_files(
    description: FilesDescription,
    extents: Collection[FileExtent],
    read_chunk: ReadChunk,
    folder: Path,
    *,
    later: Collection[FileExtent] = (),
) -> None:
    """Make the copy in `folder` hold the small files and at least `extents` of the weights, with room for those of `later`.

    Raises NotEnoughDiskError before the first byte, ClusterError for chunks that arrive damaged, and what `read_chunk` raises.
    """
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _writing(folder):
            stack.enter_context(changing(folder))
            folder.mkdir(exist_ok=True)
        missing = {row: _missing(description, row, extents, folder) for row in description.files}
        needed = sum(total_bytes(_missing(description, row, (*extents, *later), folder)) for row in description.files)
        if needed:
            make_room(folder, needed, f"fetching {description.name} from {description.driver}")
            logger.info("fetching %s of %s from %s into %s", format_bytes(needed), description.name, description.driver, folder)
        for row, spans in missing.items():
            if spans and row.is_weights:
                _add(_path(description, row, folder), row, spans, description, read_chunk)
            elif spans:
                _write_small(_path(description, row, folder), row, read_chunk)
        with _writing(folder):
            use(folder, description.name, description.driver)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise an OSError of writing within as NotEnoughDiskError or ClusterError."""
    try:
        yield
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDiskError(f"no space left for {path}: free some and load again, what was fetched is kept") from cause
        raise ClusterError(
            f"{path} cannot be written on {socket.gethostname()} ({cause.strerror or cause}): fix that, or name another folder "
            "with RABBIT_ENGINE_CACHE on this machine"
        ) from cause


def _path(description: FilesDescription, row: FileRow, folder: Path) -> Path:
    return description.areas_in(folder)[row.area] / row.name


def _missing(description: FilesDescription, row: FileRow, extents: Collection[FileExtent], folder: Path) -> tuple[Span, ...]:
    """What of a file is to be fetched."""
    path = _path(description, row, folder)
    if not row.is_weights:
        here = path.is_file() and row_matches(row, path)
        return () if here else ((0, row.nbytes),)
    asked = (*description.always, *extents)
    wanted = merged(((e.offset, e.offset + e.nbytes) for e in asked if (e.area, e.name) == (row.area, row.name)), _GAP)
    return without(wanted, _believed(path, row).spans)


def _believed(path: Path, row: FileRow) -> PresentExtents:
    """What is here of a file of weights: nothing, unless its record, its size and its head are those of the driver's."""
    try:
        present = read_present(path)
        if present is None or not path.is_file() or path.stat().st_size != row.nbytes:
            return PresentExtents()
        head = _head(path, row)
    except DamagedFileError as error:
        logger.warning("%s: it is fetched again", error)
        return PresentExtents()
    return present if head == row.head_xxh3 else PresentExtents()


def _write_small(path: Path, row: FileRow, read_chunk: ReadChunk) -> None:
    data = b"".join(_fetch(row, span, read_chunk) for span in _chunks([(0, row.nbytes)]))
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(data)
    if not row_matches(row, path):
        path.unlink()
        raise ClusterError(f"{row.path} changed while it was sent: load the model again")


def _add(path: Path, row: FileRow, spans: Sequence[Span], description: FilesDescription, read_chunk: ReadChunk) -> None:
    """Fetch `spans` of a file, some chunks at a time; the record names those that are on the disk."""
    present = _believed(path, row)
    if not present.spans:
        _begin(path, row, present)
    for some in _batches(list(_chunks(spans))):
        _write_chunks(path, row, some, read_chunk)
        present = PresentExtents(merged((*present.spans, *some)), description.ties)
        _record(path, present)
    if _head(path, row) != row.head_xxh3:
        record_path(path).unlink()
        path.unlink()
        raise ClusterError(f"{row.path} changed while it was sent: load the model again")


def _begin(path: Path, row: FileRow, present: PresentExtents) -> None:
    """An empty file of full size, after the record that nothing of it is here."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _record(path, present)
        with path.open("xb") as file:
            file.truncate(row.nbytes)


def _record(path: Path, present: PresentExtents) -> None:
    with _writing(path), written_whole(record_path(path)) as file:
        file.write(present.text())


def _batches(chunks: Sequence[Span]) -> Iterator[Sequence[Span]]:
    for start in range(0, len(chunks), _RECORDED_CHUNKS):
        yield chunks[start : start + _RECORDED_CHUNKS]


def _chunks(spans: Sequence[Span]) -> Iterator[Span]:
    for first, stop in spans:
        for begin in range(first, stop, CHUNK_BYTES):
            yield begin, min(stop, begin + CHUNK_BYTES)


def _write_chunks(path: Path, row: FileRow, chunks: Sequence[Span], read_chunk: ReadChunk) -> None:
    """Fetch chunks, several at once, and return when they are on the disk."""
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="rabbit-fetch")
    try:
        for written in [pool.submit(_write_chunk, path, row, span, read_chunk) for span in chunks]:
            written.result()
    finally:
        pool.shutdown(cancel_futures=True)
    with _writing(path), path.open("r+b") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # they are read past the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_chunk(path: Path, row: FileRow, span: Span, read_chunk: ReadChunk) -> None:
    data = _fetch(row, span, read_chunk)
    with _writing(path), path.open("r+b") as file:
        file.seek(span[0])
        file.write(data)


def _fetch(row: FileRow, span: Span, read_chunk: ReadChunk) -> bytes:
    """A chunk, as the driver read it. Raises ClusterError if it arrives damaged twice."""
    for _ in range(_ATTEMPTS):
        chunk = read_chunk(row.area, row.name, span[0], span[1] - span[0])
        if len(chunk.data) == span[1] - span[0] and checksum(chunk.data) == chunk.xxh3:
            return chunk.data
        logger.warning("%s: %d bytes at %d arrived damaged", row.path, span[1] - span[0], span[0])
    raise ClusterError(
        f"{row.path}: {span[1] - span[0]} bytes at {span[0]} arrived damaged {_ATTEMPTS} times: check the network, "
        "or copy the model to this machine yourself"
    )


def _head(path: Path, row: FileRow) -> str:
    with disk_errors(path), path.open("rb") as file:
        return xxhash.xxh3_64_hexdigest(file.read(row.head_bytes))
