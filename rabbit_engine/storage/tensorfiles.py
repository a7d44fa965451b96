"""Safetensors files, byte by byte: check a header, read a tensor, write an aligned file. Independent of models.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header, then the data.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from rabbit_engine.errors import DamagedCheckpointError, DamagedFileError, first_line
from rabbit_engine.storage.directio import ABSENT, PAGE, as_bytes, disk_errors, open_unchanged, read_into
from rabbit_engine.storage.encoding import Encoding
from rabbit_engine.storage.jsonvalues import Fields, counts, parse, shown
from rabbit_engine.storage.partial import read_present

ALIGNMENT = PAGE
"""Every written tensor starts on a multiple of this, as direct reads require."""

PAD_PREFIX = "__pad__."
CHECKSUM_KEY = "data_xxh3_128"
COPY_BYTES = 16 * 2**20
_COMPARED_BYTES = 2**20
"""Bytes of each tensor read at a time while a model loads: the smallest budget may be 3 MB."""

_LFS_POINTER = b"version https://git-lfs"
_HEADER_LIMIT = 100_000_000

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The location of one tensor: `nbytes` at `offset` from the start of `path`, with `dtype` and `shape`.

    `stamp` is the file's inode and change time when its header was read; None skips the check, and ABSENT is that of bytes that
    are not on this machine. A tensor stored in several
    `parts` is their concatenation, and `path` and `offset` are those of the first. With an `encoding`, the `components` are
    what is stored, `nbytes` is their size, and `dtype` and `shape` are those of the decoded tensor.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stamp: tuple[int, int] | None = None
    parts: tuple[TensorEntry, ...] = ()
    encoding: Encoding | None = None
    components: tuple[TensorEntry, ...] = ()

    @property
    def places(self) -> tuple[TensorEntry, ...]:
        """The entries that its bytes are stored as, in order: its parts and components, or itself."""
        inside = self.parts or self.components
        return tuple(place for part in inside for place in part.places) if inside else (self,)

    @property
    def is_absent(self) -> bool:
        """Whether some of its bytes are not on this machine."""
        return any(place.stamp == ABSENT for place in self.places)

    @property
    def is_encoded(self) -> bool:
        """Whether it, or a part of it, is decoded before use."""
        return self.encoding is not None or any(part.is_encoded for part in self.parts)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors to read: the arguments of `decode` in order, or itself."""
        if not self.is_encoded:
            return (self,)
        return tuple(tensor for part in self.parts or self.components for tensor in part.stored)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded tensor; equal to `nbytes` unless it is encoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    def work_bytes(self, device: torch.device) -> int:
        """Bytes of temporaries while it is decoded on `device`, a part at a time."""
        if self.encoding is not None:
            return self.encoding.work_bytes(self.components, self, device)
        return max((part.work_bytes(device) for part in self.parts), default=0)

    @property
    def rows_together(self) -> int:
        """The number of rows (along dimension 0) that can only be cut from others together: 1 for a plain tensor, a row of
        blocks for scales by block; all rows of an encoding that mixes them."""
        count = self.shape[0]
        if not self.is_encoded:
            return 1
        if self.encoding is None or not self.encoding.by_rows:
            return count
        stored = [component.shape[0] if component.shape else 1 for component in self.components]
        if any(max(rows, count) % min(rows, count) for rows in stored):
            return count
        return max(1, *(count // rows for rows in stored))

    def rows(self, first: int, stop: int) -> TensorEntry:
        """Rows `first` to `stop` (along dimension 0) as an entry. Raises ValueError if that would cut `rows_together`."""
        together, name, shape = self.rows_together, f"{self.name}[{first}:{stop}]", (stop - first, *self.shape[1:])
        if first % together or stop % together:
            raise ValueError(f"{self.name} is stored encoded, {together} rows together: rows {first} to {stop} cut them")
        if self.is_encoded:
            return self if shape == self.shape else self._encoded_rows(name, first, stop)
        row_bytes = self.nbytes // self.shape[0]
        begin, end, position, found = first * row_bytes, stop * row_bytes, 0, []
        for place in self.places:
            low, high = max(begin - position, 0), min(end - position, place.nbytes)
            if low < high:
                found.append(replace(place, offset=place.offset + low, nbytes=high - low))
            position += place.nbytes
        return gathered(name, self.dtype, shape, found)

    def _encoded_rows(self, name: str, first: int, stop: int) -> TensorEntry:
        """Rows in proportion of every component."""
        assert self.encoding is not None  # noqa: S101 - parts are not cut: see rows_together
        count = self.shape[0]
        parts = [part.rows(part.shape[0] * first // count, part.shape[0] * stop // count) for part in self.components]
        return encoded(name, self.dtype, (stop - first, *self.shape[1:]), self.encoding, parts)


def each_row(entry: TensorEntry) -> list[TensorEntry]:
    """Every row of a tensor (along dimension 0) as an entry; a row may consist of several parts."""
    count = entry.shape[0]
    if entry.encoding is not None:
        rows = zip(*(each_row(component) for component in entry.components), strict=True)
        return [
            encoded(f"{entry.name}[{index}:{index + 1}]", entry.dtype, (1, *entry.shape[1:]), entry.encoding, row)
            for index, row in enumerate(rows)
        ]
    step = len(entry.parts) // count
    groups = [entry.parts[step * index : step * (index + 1)] for index in range(count)]
    if not step or any(sum(part.decoded_bytes for part in group) * count != entry.decoded_bytes for group in groups):
        return [entry.rows(index, index + 1) for index in range(count)]
    shape = (1, *entry.shape[1:])
    return [gathered(f"{entry.name}[{index}:{index + 1}]", entry.dtype, shape, group) for index, group in enumerate(groups)]


def gathered(name: str, dtype: torch.dtype, shape: tuple[int, ...], places: Sequence[TensorEntry]) -> TensorEntry:
    """The entry of the concatenation of `places`."""
    nbytes = sum(place.nbytes for place in places)
    first, parts = places[0], tuple(places) if len(places) > 1 else ()
    if first.is_encoded and not parts:
        return replace(first, name=name, shape=shape)
    return TensorEntry(name, first.path, first.offset, nbytes, dtype, shape, first.stamp, parts)


def encoded(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], encoding: Encoding, components: Sequence[TensorEntry]
) -> TensorEntry:
    """The entry of the tensor that `components` decode to."""
    first, nbytes = components[0], sum(component.nbytes for component in components)
    return TensorEntry(
        name, first.path, first.offset, nbytes, dtype, shape, first.stamp, encoding=encoding, components=tuple(components)
    )


def decoded_as(entry: TensorEntry, dtype: torch.dtype) -> TensorEntry:
    """An encoded entry, decoded to `dtype`; so are its parts."""
    return replace(entry, dtype=dtype, parts=tuple(decoded_as(part, dtype) for part in entry.parts))


def decode(entry: TensorEntry, stored: Iterator[torch.Tensor], out: torch.Tensor) -> None:
    """Decode an encoded entry to `out`; `stored` yields the tensors of `entry.stored`, in order.

    Raises DamagedCheckpointError, with the file and the weight, for values that cannot be decoded.
    """
    if entry.encoding is not None:
        try:
            entry.encoding.decode([next(stored) for _ in entry.components], out)
        except DamagedCheckpointError as error:
            files = ", ".join(sorted({str(component.path) for component in entry.components}))
            raise DamagedCheckpointError(f"{files}: {entry.name} cannot be decoded: {error}") from error
    elif entry.parts and entry.is_encoded:
        flat, position = out.view(-1), 0
        for part in entry.parts:
            count = math.prod(part.shape)
            decode(part, stored, flat[position : position + count].view(part.shape))
            position += count
    else:
        out.copy_(next(stored).view(out.shape))


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors file's header: its tensors in file order, its metadata, and where its data starts and ends."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int
    checksum: str


def read_header(path: Path, advice: str = "") -> Header:
    """Read a safetensors header and check that names, dtypes, shapes, offsets and the file's length agree.

    Raises DamagedFileError, which names the file and the difference; MissingFileError or UnreadableFileError.
    """
    with open_unchanged(path, None) as file, disk_errors(path):
        status = os.fstat(file.fileno())
        prefix = _read_up_to(file, 8)
        size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size > min(_HEADER_LIMIT, status.st_size - 8):
            wanted = f"{status.st_size} bytes, its header would need {8 + size}"
            raise DamagedFileError(f"{path} is not a complete safetensors file ({wanted}): {advice or advice_for(path)}")
        raw = _read_up_to(file, size)
    start, present = 8 + size, read_present(path)
    try:
        metadata, tensors = _parse_header(path, raw, start, (status.st_ino, status.st_mtime_ns))
        _require_contiguous(tensors, start)
    except (ValueError, KeyError, TypeError) as cause:
        raise DamagedFileError(
            f"{path} has a damaged safetensors header: {first_line(cause)}; {advice or 'download it again'}"
        ) from cause
    problem = _wrong_length(tensors, start, status.st_size)
    if problem is not None:
        raise DamagedFileError(f"{path} {problem}; {advice or 'download it again'}")
    if present is not None:
        tensors = tuple(replace(t, stamp=present.stamp(t.offset, t.nbytes, status.st_ino)) for t in tensors)
    return Header(path, tensors, metadata, start, status.st_size, xxhash.xxh3_128_hexdigest(prefix + raw))


def _read_up_to(file: io.FileIO, count: int) -> bytes:
    found = b""
    while len(found) < count and (more := file.read(count - len(found))):
        found += more
    return found


def advice_for(path: Path) -> str:
    """What to do about a file that is not of its format, judged by its first bytes."""
    with open_unchanged(path, None) as file, disk_errors(path):
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return "it is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    return "it looks like a web page, download it again" if start.lstrip()[:1] == b"<" else "download it again"


def _parse_header(
    path: Path, raw: bytes, start: int, stamp: tuple[int, int]
) -> tuple[Mapping[str, str], tuple[TensorEntry, ...]]:
    table = Fields.of(parse(raw), "the header")
    metadata = table.texts("__metadata__") if table.values.get("__metadata__") is not None else {}
    rows = ((name, row) for name, row in table.values.items() if name != "__metadata__")
    entries = (_entry(path, name, Fields.of(row, name), start, stamp) for name, row in rows)
    return metadata, tuple(sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)))


def _entry(path: Path, name: str, row: Fields, data_start: int, stamp: tuple[int, int]) -> TensorEntry:
    begin, end = counts(row.take("data_offsets"), f"{name}.data_offsets")
    shape, kind = counts(row.take("shape"), f"{name}.shape"), row.text("dtype")
    if kind not in TORCH_DTYPES:
        raise ValueError(f"{name} has dtype {shown(kind)}, supported are {', '.join(TORCH_DTYPES)}")
    dtype = TORCH_DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is {list(shape)} {kind} in {end - begin} bytes")
    if math.prod(filter(None, shape)) >= 2**63:
        raise ValueError(f"{name} is {list(shape)}, too many elements")
    return TensorEntry(name, path, data_start + begin, end - begin, dtype, shape, stamp)


def _require_contiguous(tensors: Sequence[TensorEntry], start: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            raise ValueError(f"{tensor.name} starts at {tensor.offset}, expected {position}")
        position += tensor.nbytes


def _wrong_length(tensors: Sequence[TensorEntry], start: int, file_bytes: int) -> str | None:
    position = start + sum(tensor.nbytes for tensor in tensors)
    if position == file_bytes:
        return None
    return f"is {'truncated' if file_bytes < position else 'too long'}: {file_bytes} bytes, its header requires {position}"


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor, decoded, in its own memory: the file is not mapped. Raises DamagedFileError."""
    if entry.is_encoded:
        out = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        decode(entry, (read_tensor(tensor) for tensor in entry.stored), out)
        return out
    flat = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    position = 0
    for place in entry.places:
        with open_unchanged(place.path, place.stamp) as file:
            file.seek(place.offset)
            read_into(file, as_bytes(flat[position : position + place.nbytes]), place.path)
        position += place.nbytes
    return flat.view(entry.dtype).reshape(entry.shape)


def same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two stored tensors are bit-equal; reads in pieces, up to the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if len(first.places) > 1 or len(second.places) > 1:
        return torch.equal(read_tensor(first).view(torch.uint8), read_tensor(second).view(torch.uint8))
    pieces = [bytearray(_COMPARED_BYTES), bytearray(_COMPARED_BYTES)]
    with open_unchanged(first.path, first.stamp) as one, open_unchanged(second.path, second.stamp) as other:
        for position in range(0, first.nbytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, first.nbytes - position)
            views = [memoryview(piece)[:size] for piece in pieces]
            for file, entry, view in zip((one, other), (first, second), views, strict=True):
                file.seek(entry.offset + position)
                read_into(file, view, entry.path)
            if views[0] != views[1]:
                return False
    return True


def is_tied(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two weights that are not both here were equal where they came from, by the record of the first's file."""
    present = read_present(first.path)
    return present is not None and present.ties.get(first.name) == second.name


def holds(entry: TensorEntry, values: torch.Tensor) -> bool:
    """Whether a stored tensor has the shape of `values` and is bit-equal to them in its dtype."""
    if tuple(values.shape) != entry.shape:
        return False
    flat = values.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8)
    if len(entry.places) > 1:
        return torch.equal(read_tensor(entry).reshape(-1).view(torch.uint8), flat)
    raw, piece = as_bytes(flat), memoryview(bytearray(min(_COMPARED_BYTES, entry.nbytes)))
    with open_unchanged(entry.path, entry.stamp) as file:
        file.seek(entry.offset)
        for position in range(0, entry.nbytes, _COMPARED_BYTES):
            read = piece[: entry.nbytes - position]
            read_into(file, read, entry.path)
            if raw[position : position + len(read)] != read:
                return False
    return True


@contextmanager
def written_whole(path: Path, *, scratch: Path | None = None, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: scratch file, fsync, rename, fsync of the folder.

    `scratch`, on the same file system, is next to `path` if it is None; `mode` is subject to the umask.
    """
    scratch = scratch or path.with_name(f".{path.name}.scratch")
    scratch.unlink(missing_ok=True)
    try:  # a new file: never follows an existing link
        with open(scratch, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and commits a rename without it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_aligned(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose header holds `metadata` and the xxh3 of all data after the header.

    The header is padded with spaces and each tensor with a small named pad tensor (the format allows no holes), so
    that every tensor starts on a 4,096-byte boundary: reads need no copy and kernels see aligned weights.
    """
    _, data_start = render_header(tensors, {**metadata, CHECKSUM_KEY: "0" * 32})
    digest = xxhash.xxh3_128()
    with written_whole(path) as file:
        file.seek(data_start)
        for tensor in tensors.values():
            write_padded(file, digest, tensor)
        header, _ = render_header(tensors, {**metadata, CHECKSUM_KEY: digest.hexdigest()})
        file.seek(0)
        file.write(header)


def write_padded(file: BinaryIO, digest: xxhash.xxh3_128, tensor: torch.Tensor) -> None:
    """Write a tensor up to the next page boundary, and add what is written to `digest`."""
    raw = as_bytes(tensor.contiguous().reshape(-1).view(torch.uint8))
    for start in range(0, len(raw), COPY_BYTES):
        digest.update(raw[start : start + COPY_BYTES])
        file.write(raw[start : start + COPY_BYTES])
    padding = bytes(_padding(len(raw)))
    digest.update(padding)
    file.write(padding)


def aligned_bytes(sizes: Sequence[int]) -> int:
    """The approximate size of an aligned file with tensors of these sizes: padded, plus a header."""
    header = 8 + 160 * (2 * len(sizes) + 4)
    return header + _padding(header) + sum(size + _padding(size) for size in sizes)


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def render_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The header of an aligned file, and where its data starts."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for index, (name, tensor) in enumerate(tensors.items()):
        position = _add_row(
            table, name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), position, tensor.numel() * tensor.itemsize
        )
        if pad := _padding(position):
            position = _add_row(table, f"{PAD_PREFIX}{index}", "U8", [pad], position, pad)
    body = json.dumps(table, separators=(",", ":")).encode()
    body += b" " * _padding(8 + len(body))
    return len(body).to_bytes(8, "little") + body, 8 + len(body)


def _add_row(table: dict[str, Any], name: str, dtype: str, shape: list[int], begin: int, nbytes: int) -> int:
    table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}
    return begin + nbytes
