"""Reads the headers of GGUF files, and checks them before a parser sees them: every count, length and offset fits the file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Parsers trust the header, and a flipped bit may make
them loop or allocate without end.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from rabbit_engine.architectures import GgufConfigFile
from rabbit_engine.errors import DamagedCheckpointError, MissingExtraError, first_line
from rabbit_engine.storage.directio import damage_as, disk_errors, open_unchanged, stamp_of
from rabbit_engine.storage.jsonvalues import shown
from rabbit_engine.storage.tensorfiles import advice_for

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_MOST = {"tensors": 2**20, "values": 2**16, "items": 2**24, "strings": 2**22, "dimensions": 4}
"""Far above any model's; a damaged count exceeds these, or the end of the file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: its type as ggml names it, its shape in torch's order, and where its bytes lie."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a checked file says: its numbers and strings by key, and its tensors. `stamp` tells the file from one that replaces
    it; `checksum` is that of the header."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    stamp: tuple[int, int]
    checksum: str

    @property
    def config(self) -> GgufConfigFile:
        """What is kept of it as a config."""
        return GgufConfigFile(self.path, self.checksum)


@damage_as(DamagedCheckpointError)
def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file that is safe to read. Raises DamagedCheckpointError, with the problem, for another.

    Also refuses a part of a split file, which transformers cannot read. Raises MissingExtraError without the package gguf.
    """
    with open_unchanged(path, None) as file, disk_errors(path):
        stamp = stamp_of(file)
        start = file.read(4)
        if start != b"GGUF":
            raise DamagedCheckpointError(f"{path} is not a GGUF file, it begins with {shown(start)}: {advice_for(path)}")
        with closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as raw:
            cursor = _Cursor(raw, 4)
            try:
                values, tensors = _check(cursor, _block_types(path))
            except (ValueError, OverflowError, struct.error) as error:
                problem = "it ends in its header" if isinstance(error, struct.error) else first_line(error)
                raise DamagedCheckpointError(f"{path} has a damaged GGUF header: {problem}; download it again") from error
            checksum = xxhash.xxh3_128_hexdigest(raw[: cursor.position])
    named = re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name)
    parts = max(int(values.get("split.count", 0)), int(named[1]) if named else 0)
    if parts > 1:
        raise DamagedCheckpointError(
            f"{path} is one of {parts} parts of a model: join them with `llama-gguf-split --merge FIRST_PART OUT` and load that"
        )
    return GgufHeader(path, values, {tensor.name: tensor for tensor in tensors}, stamp, checksum)


def _block_types(path: Path) -> Mapping[int, _BlockType]:
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingExtraError(f"{path} needs the package gguf: pip install gguf") from error
    return {int(kind): _BlockType(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class _BlockType(NamedTuple):
    """A type of ggml: the values in a block, and its bytes."""

    name: str
    values: int
    nbytes: int


class _Cursor:
    """A position in the mapped file. Raises struct.error at its end."""

    def __init__(self, raw: mmap.mmap, position: int) -> None:
        self.raw, self.position = raw, position

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.raw, self.position)
        self.position += struct.calcsize(form)
        return value

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.raw) - self.position:
            raise struct.error
        self.position += nbytes

    def text(self) -> str:
        start, length = self.position + 8, self.number("<Q")
        self.skip(length)
        return self.raw[start : self.position].decode()

    def count(self, form: str, what: str) -> int:
        found = int(self.number(form))
        if found > _MOST[what]:
            raise ValueError(f"it has a count of {found} {what}")
        return found


def _check(cursor: _Cursor, types: Mapping[int, _BlockType]) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The header's numbers and strings by key, and its tensors. Raises ValueError, struct.error."""
    version = cursor.number("<I")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        raise ValueError("it is big-endian" if swapped else f"version {version}, supported are 2 and 3")
    tensors, count = cursor.count("<Q", "tensors"), cursor.count("<Q", "values")
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in values:
            raise ValueError(f"{shown(key)} appears twice")
        values[key] = _value(cursor, cursor.number("<I"), key)
    if not isinstance(values.get("split.count", 0), int):
        raise ValueError(f"split.count is {shown(values['split.count'])}")
    _check_blocks(values, tensors)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}, not a power of two")
    found = [_tensor(cursor, types) for _ in range(tensors)]
    start = -(-cursor.position // alignment) * alignment
    found = [replace(tensor, offset=start + tensor.offset) for tensor in found]
    _check_tensors(found, start, len(cursor.raw), alignment)
    return values, found


def _check_blocks(values: Mapping[str, Any], tensors: int) -> None:
    """Raise ValueError for an implausible block count: the class is built with as many layers, or with its default."""
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("general.architecture is missing")
    blocks = values.get(f"{architecture}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks <= tensors:
        raise ValueError(f"{shown(architecture + '.block_count')} is {shown(blocks)}, and it has {tensors} tensors")


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    """Read past a value; an integer or a string is returned, of an array its length."""
    if kind in _SCALARS:
        value = cursor.number(_SCALARS[kind])
        if kind == _BOOL and value > 1:
            raise ValueError(f"{shown(key)} is {value}, neither true nor false")
        return value
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise ValueError(f"{shown(key)} has the unknown type {kind}")
    return _array(cursor, cursor.number("<I"), key)


def _array(cursor: _Cursor, kind: int, key: str) -> list[None]:
    if kind in _SCALARS:
        cursor.skip(cursor.count("<Q", "items") * struct.calcsize(_SCALARS[kind]))
    elif kind == _STRING:
        for _ in range(cursor.count("<Q", "strings")):
            cursor.text()
    else:
        raise ValueError(f"{shown(key)} is an array of the unknown type {kind}")
    return []


def _tensor(cursor: _Cursor, types: Mapping[int, _BlockType]) -> StoredTensor:
    """One row of the table; its offset counts from the start of the data."""
    name = cursor.text()
    shape = tuple(reversed([cursor.number("<Q") for _ in range(cursor.count("<I", "dimensions"))]))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if kind not in types:
        raise ValueError(f"{shown(name)} has the unknown type {kind}")
    block = types[kind]
    if not math.prod(shape) or (shape and shape[-1] % block.values):
        raise ValueError(f"{shown(name)} is {list(shape)}, in blocks of {block.values}")
    return StoredTensor(name, block.name, shape, offset, math.prod(shape) // block.values * block.nbytes)


def _check_tensors(tensors: Sequence[StoredTensor], start: int, file_bytes: int, alignment: int) -> None:
    """Raise ValueError unless names are unique and tensors are aligned, within the file and do not overlap."""
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    end = start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset % alignment != start % alignment or tensor.offset < end:
            place = tensor.offset - start
            raise ValueError(f"{shown(tensor.name)} starts at {place}, in another tensor or not at a multiple of {alignment}")
        end = tensor.offset + tensor.nbytes
        if end > file_bytes:
            raise ValueError(f"it is truncated: {file_bytes} bytes, {shown(tensor.name)} ends at {end}")
