"""A block as a safetensors file: page-aligned tensors of any names, each with a checksum, under a header that is sealed.

The metadata holds the tokens, the names of the space and of the parent, the xxh3 of each tensor up to its page's end, and the
seal: the xxh3 of all that and of the names, dtypes and shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from rabbit_engine.errors import DamagedFileError
from rabbit_engine.prefixes.keys import FORMAT, BlockKey
from rabbit_engine.storage.directio import aligned_up, as_bytes, claim_memory, is_direct, read_pages
from rabbit_engine.storage.jsonvalues import Fields, parse
from rabbit_engine.storage.tensorfiles import (
    DTYPE_NAMES,
    PAD_PREFIX,
    TensorEntry,
    read_header,
    render_header,
    write_padded,
    written_whole,
)

_SUMS, _SEAL = "xxh3_128", "seal_xxh3_128"
_NO_SUM = "0" * 32
PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """A block's file: its tensors and their checksums by name; `inode` tells whether it was replaced."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    sums: Mapping[str, str]
    inode: int


def block_file_bytes(key: BlockKey, tensors: Mapping[str, torch.Tensor]) -> int:
    """The size of the block's file."""
    header = _render(key, tensors, dict.fromkeys(tensors, _NO_SUM))
    return len(header) + sum(aligned_up(tensor.numel() * tensor.itemsize) for tensor in tensors.values())


def write_block(path: Path, scratch: Path, key: BlockKey, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the file, whole or not at all, through `scratch`. Raises OSError."""
    start = len(_render(key, tensors, dict.fromkeys(tensors, _NO_SUM)))
    with written_whole(path, scratch=scratch, mode=PRIVATE) as file:
        file.seek(start)
        sums = {name: _write_tensor(file, tensor) for name, tensor in tensors.items()}
        file.seek(0)
        file.write(_render(key, tensors, sums))
        _drop_pages(file)


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_128()
    write_padded(file, digest, tensor)
    return digest.hexdigest()


def _drop_pages(file: BinaryIO) -> None:
    """Leave the page cache to others: blocks are read past it."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _render(key: BlockKey, tensors: Mapping[str, torch.Tensor], sums: Mapping[str, str]) -> bytes:
    """The header, sealed."""
    metadata = {
        "format": FORMAT,
        "space": key.space,
        "index": str(key.index),
        "parent": key.parent,
        "tokens": key.words,
        _SUMS: json.dumps(sums),
        _SEAL: _NO_SUM,
    }
    header, _ = render_header(tensors, metadata)
    table = json.loads(header[8:])
    del table["__metadata__"]
    metadata[_SEAL] = _seal(metadata, [[name, row["dtype"], row["shape"]] for name, row in table.items()])
    return render_header(tensors, metadata)[0]


def _seal(metadata: Mapping[str, str], rows: list[list[Any]]) -> str:
    sealed = sorted(item for item in metadata.items() if item[0] != _SEAL)
    return xxhash.xxh3_128_hexdigest(json.dumps([sealed, rows]).encode())


def read_block_header(path: Path, key: BlockKey) -> BlockHeader:
    """The header of the file at `path`, which must be that of `key`, with the same tokens.

    Raises MissingFileError, UnreadableFileError or DamagedFileError.
    """
    header = read_header(path, "it is no whole block")
    rows = [[entry.name, DTYPE_NAMES[entry.dtype], list(entry.shape)] for entry in header.tensors]
    if header.metadata.get(_SEAL) != _seal(header.metadata, rows):
        raise DamagedFileError(f"{path} has a damaged header")
    found = [header.metadata.get(name) for name in ("format", "space", "index", "parent", "tokens")]
    if found != [FORMAT, key.space, str(key.index), key.parent, key.words]:
        raise DamagedFileError(f"{path} is another block's file")
    tensors = {entry.name: entry for entry in header.tensors if not entry.name.startswith(PAD_PREFIX)}
    try:
        sums = Fields.of({"sums": parse(header.metadata[_SUMS])}).texts("sums")
        (stamp,) = {entry.stamp for entry in tensors.values()}
    except (KeyError, ValueError) as cause:
        raise DamagedFileError(f"{path} has no tensors, or no checksums") from cause
    return BlockHeader(path, tensors, sums, stamp[0] if stamp else 0)


def read_tensors(header: BlockHeader, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of these names, compared with their checksums; neighbours in the file are one read and one memory.

    Raises MissingFileError, UnreadableFileError or DamagedFileError; BudgetError if the system has no memory.
    """
    wanted = sorted((header.tensors[name] for name in names), key=lambda entry: (entry.offset, entry.nbytes))
    return {name: tensor for run in _runs(wanted) for name, tensor in _read_run(header, run)}


def _runs(entries: Iterable[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Entries that follow each other in the file, together."""
    run: list[TensorEntry] = []
    for entry in entries:
        if run and aligned_up(run[-1].offset + run[-1].nbytes) != entry.offset:
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _read_run(header: BlockHeader, run: list[TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    start = run[0].offset
    memory = claim_memory(aligned_up(run[-1].offset + run[-1].nbytes) - start)
    raw = as_bytes(memory)
    read_pages(header.path, None, start, len(raw), raw, direct=is_direct(header.path))
    for entry in run:
        begin = entry.offset - start
        if xxhash.xxh3_128_hexdigest(raw[begin : begin + aligned_up(entry.nbytes)]) != header.sums.get(entry.name):
            raise DamagedFileError(f"{header.path} is damaged: the checksum of {entry.name} differs")
        yield entry.name, memory[begin : begin + entry.nbytes].view(entry.dtype).reshape(entry.shape)
