"""The split of a checkpoint: shard files and the manifest that names them. Knows bytes, never models."""

from __future__ import annotations

import errno
import json
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from rabbit_engine.checkpoints.shard_encodings import Weight, flattened, weights_in
from rabbit_engine.errors import (
    DamagedFileError,
    DamagedShardError,
    MissingFileError,
    NotEnoughDiskError,
    ShardsNotFoundError,
    ShardsNotWritableError,
    UnreadableFileError,
)
from rabbit_engine.storage.directio import damage_as, disk_errors, open_unchanged
from rabbit_engine.storage.jsonvalues import Fields, counts, different, file_name, parse, shown
from rabbit_engine.storage.tensorfiles import (
    CHECKSUM_KEY,
    COPY_BYTES,
    TORCH_DTYPES,
    Header,
    TensorEntry,
    read_header,
    write_aligned,
    written_whole,
)

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "journal.json"
ORIGIN_KEY = "origin"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One line of the manifest: a shard, its file next to the manifest, and what `verify` compares."""

    name: str
    file: str
    file_bytes: int
    header_xxh3_128: str
    data_xxh3_128: str


@dataclass(frozen=True, slots=True)
class Stripe:
    """Which of the folders of a split one is: its number from 0, and how many there are."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a split folder. Written last, so its presence means that every shard is complete.

    `source` is the fingerprint of the checkpoint the shards were made from; `ties` maps a parameter to the one it shares. A
    split over several folders has a manifest in each, with a `stripe`.
    """

    dtype: str
    source: Mapping[str, Any]
    ties: Mapping[str, str]
    shards: tuple[ShardRecord, ...]
    version: int = FORMAT_VERSION
    stripe: Stripe | None = None

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Names of the checkpoint's weights without a place in the model; empty if an older version made the split."""
        return tuple(self.source.get("unused_weights", ()))

    def advice(self, folder: Path) -> str:
        """How to replace a damaged shard of the split in `folder`. Deleted originals of a Hub repo are downloaded again; for
        other new files the split would be of another source."""
        if not self.source["deleted"] or self.source["commit"] is not None:
            return _REBUILD
        return f"its originals were deleted: put them back, delete {folder}, then run `rabbit split` with the same options"


def write_shard(path: Path, weights: Mapping[str, Weight], metadata: Mapping[str, str]) -> ShardRecord:
    """Write one shard atomically, and return its manifest line."""
    tensors, encodings = flattened(weights)
    with _write_errors(path):
        write_aligned(path, tensors, {**metadata, **encodings})
    return shard_record(path)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of writing within as NotEnoughDiskError or ShardsNotWritableError."""
    try:
        yield
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDiskError(f"No space left for {path}: free some and run it again, finished shards are kept") from cause
        raise ShardsNotWritableError(
            f"{path} cannot be written ({cause.strerror or cause}): fix that and run it again, finished shards are kept"
        ) from cause


@damage_as(DamagedShardError)
def shard_record(path: Path) -> ShardRecord:
    """The manifest line of a finished shard, from its header. Raises DamagedShardError."""
    header = read_header(path)
    if CHECKSUM_KEY not in header.metadata:
        raise DamagedShardError(f"{path} has no checksum: it was not written by this library")
    return ShardRecord(path.stem, path.name, header.file_bytes, header.checksum, header.metadata[CHECKSUM_KEY])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes the split."""
    path = folder / MANIFEST_NAME
    values = {name: value for name, value in asdict(manifest).items() if value is not None}
    with _write_errors(path), written_whole(path) as file:
        file.write(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest with all values checked, or None if there is none. Raises DamagedShardError."""
    path = folder / MANIFEST_NAME
    fields = _read_fields(path, _AGAIN)
    if fields is None:
        return None
    try:
        shards = tuple(_shard_row(row) for row in fields.rows("shards"))
        different([record.name for record in shards], "shards")
        source = fields.fields("source")
        _check_source(source)
        if not set(source.names("used")) <= {row.values["name"] for row in source.rows("files")}:
            raise ValueError("source.used names files that source.files does not")
        source.flag("deleted")
        if "unused_weights" in source.values and not all(isinstance(name, str) for name in source.items("unused_weights")):
            raise ValueError(f"source.unused_weights is {shown(source.values['unused_weights'])}, not a list of names")
        stripe = _stripe(fields.fields("stripe")) if "stripe" in fields.values else None
        return Manifest(_dtype(fields), source.values, fields.texts("ties"), shards, stripe=stripe)
    except ValueError as cause:
        raise DamagedShardError(f"{path} cannot be read: {cause}; {_AGAIN}") from cause


_REBUILD = "run `rabbit split` with the same options to rebuild it"
_AGAIN = f"{_REBUILD} (finished shards are kept)"


def _read_fields(path: Path, advice: str) -> Fields | None:
    """The fields of a JSON file of this format version, or None if the file is missing. Raises DamagedShardError."""
    try:
        with open_unchanged(path, None) as file:
            fields = Fields.of(parse(file.read()))
            version = fields.count("version") if "version" in fields.values else 1  # older journals have none
    except MissingFileError:
        return None
    except (ValueError, UnreadableFileError, DamagedFileError) as cause:
        raise DamagedShardError(f"{path} cannot be read: {cause}; {advice}") from cause
    if version != FORMAT_VERSION:
        raise DamagedShardError(f"{path} has format {version}, this version reads {FORMAT_VERSION}: split into another folder")
    return fields


def _shard_row(row: Fields) -> ShardRecord:
    name, file = row.text("name"), file_name(row.take("file"))
    if file != f"{name}.safetensors" or Path(file).name != file:
        raise ValueError(f"{row.where}.file is {shown(file)}, expected {shown(name)} and .safetensors")
    return ShardRecord(name, file, row.count("file_bytes"), row.text("header_xxh3_128"), row.text("data_xxh3_128"))


def _stripe(row: Fields) -> Stripe:
    stripe = Stripe(row.count("index"), row.count("count"))
    if not stripe.index < stripe.count or stripe.count < 2:
        raise ValueError(f"{row.where} is {shown(row.values)}, not one of several folders")
    return stripe


def _check_source(source: Fields) -> None:
    """Raise ValueError for an invalid fingerprint."""
    if source.text("format") not in ("safetensors", "bin", "gguf"):
        raise ValueError(f"source.format is {shown(source.values['format'])}")
    source.take("commit")
    commit = source.optional_text("commit")
    source.optional_text("conversion")
    if "compression" in source.values:
        source.fields("compression").text("method")
    different([_check_file_row(row, commit) for row in source.rows("files")], "source.files")


def _check_file_row(row: Fields, commit: str | None) -> str:
    row.count("bytes")
    row.optional_text("header_xxh3_128")
    if commit is None and type(row.take("mtime_ns")) is not int:
        raise ValueError(f"{row.where}.mtime_ns is {shown(row.values['mtime_ns'])}, not a whole number")
    return file_name(row.take("name"))


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {shown(name)}, not one that a model runs in")
    return name


def read_entries(folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    """Every weight of a split in one folder, from the shards' headers, which are checked against the manifest (sizes and
    checksums). Raises DamagedShardError, also for one folder of several."""
    if manifest.stripe is not None:
        raise DamagedShardError(f"{folder} is one of {manifest.stripe.count} folders of a split: name all of them")
    advice = manifest.advice(folder)
    found = [(folder / record.file, _weights_of(folder, record, advice)) for record in manifest.shards]
    return join_entries(found, folder, manifest)


def join_entries(found: Iterable[tuple[Path, Sequence[TensorEntry]]], folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    """The weights of all shards by name, each of which came from a file. Raises DamagedShardError unless they fit the ties."""
    entries: dict[str, TensorEntry] = {}
    advice = manifest.advice(folder)
    for path, some in found:
        for entry in some:
            if entry.name in entries:
                raise DamagedShardError(f"{path} and another shard both hold {entry.name}; {advice}")
            entries[entry.name] = entry
    for target, stored in manifest.ties.items():
        if stored not in entries or target in entries:
            problem = f"{target} shares {stored}, {'which no shard holds' if stored not in entries else 'but is stored itself'}"
            raise DamagedShardError(f"{folder / MANIFEST_NAME} is damaged: {problem}; {advice}")
    return entries


def _weights_of(folder: Path, record: ShardRecord, advice: str) -> list[TensorEntry]:
    try:
        return list(weights_in(checked_header(folder, record, advice)))
    except ValueError as cause:
        raise DamagedShardError(f"{folder / record.file} cannot be read: {cause}; {advice}") from cause


@damage_as(DamagedShardError)
def checked_header(folder: Path, record: ShardRecord, advice: str) -> Header:
    """The header of a shard that has the size and checksum of its record. Raises DamagedShardError."""
    path = folder / record.file
    try:
        header = read_header(path, advice)
    except MissingFileError:
        raise DamagedShardError(f"{path} is missing, the manifest lists it; {advice}") from None
    if header.file_bytes != record.file_bytes:
        raise DamagedShardError(f"{path} is {header.file_bytes} bytes, the manifest has {record.file_bytes}; {advice}")
    if header.checksum != record.header_xxh3_128:
        raise DamagedShardError(f"{path} has a damaged header (checksum); {advice}")
    return header


@damage_as(DamagedShardError)
def verify_shard(folder: Path, record: ShardRecord, manifest: Manifest | None = None) -> None:
    """Read a shard in full. Raises DamagedShardError if its size, header or data differ from the record.

    The `manifest` of a finished split tells whether it can be rebuilt.
    """
    advice = _REBUILD if manifest is None else manifest.advice(folder)
    header = checked_header(folder, record, advice)
    digest = xxhash.xxh3_128()
    with open_unchanged(header.path, None) as file, disk_errors(header.path):
        file.seek(header.data_start)
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != record.data_xxh3_128:
        sums = f"xxh3 {digest.hexdigest()}, the manifest has {record.data_xxh3_128}"
        first = "delete it, then " if advice == _REBUILD else ""  # else a split keeps it: it reads only headers
        raise DamagedShardError(f"{header.path} has damaged data ({sums}): {first}{advice}")


def find_splits(root: Path) -> list[Path]:
    """Every folder at or below `root` that holds a manifest. Raises ShardsNotFoundError if there is none."""
    found = sorted(path.parent for path in root.rglob(MANIFEST_NAME)) if root.is_dir() else []
    if not found:
        raise ShardsNotFoundError(f"no split under {root}: run `rabbit split MODEL` first")
    return found


def make_folder(folder: Path) -> None:
    """Create the folder for shards and check that it is writable. Raises ShardsNotWritableError."""
    require_no_link(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ShardsNotWritableError(
            f"{folder} cannot be written ({error.strerror}): pass layer_shards_saving_path=DIR"
        ) from error


def require_no_link(folder: Path) -> None:
    """Raise ShardsNotWritableError if the folder, or a folder of this library above it, is a link."""
    link = next((place for place in (folder, folder.parent, folder.parent.parent) if place.is_symlink()), None)
    if link is not None:
        raise ShardsNotWritableError(
            f"{link} is a link to {link.resolve()}, and nothing is written or deleted through it: "
            "pass the folder itself as layer_shards_saving_path=DIR (--saving-path DIR)"
        )


def without_scratch(folder: Path) -> None:
    """Remove what a killed writer left: scratch files are never part of a split."""
    for path in folder.glob(".*.scratch"):
        path.unlink(missing_ok=True)


@dataclass(slots=True)
class Journal:
    """What an unfinished split needs to resume without the originals that it has already deleted.

    `tensors` rows are (key, file, safetensors dtype, shape); `deleted` lists originals that may no longer exist.
    """

    source: Mapping[str, Any]
    shared: dict[str, str]
    dropped: list[str]
    tensors: list[tuple[str, str, str, list[int]]]
    deleted: list[str]
    version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Replace the folder's journal."""
        path = folder / JOURNAL_NAME
        with _write_errors(path), written_whole(path) as file:
            file.write(json.dumps(asdict(self)).encode())


def read_journal(folder: Path) -> Journal | None:
    """The journal of an interrupted split with all values checked, or None. Raises DamagedShardError."""
    path = folder / JOURNAL_NAME
    advice = f"delete {folder} and split again"
    fields = _read_fields(path, advice)
    if fields is None:
        return None
    try:
        source = fields.fields("source")
        _check_source(source)
        files = {row.values["name"] for row in source.rows("files")}
        dropped = [str(name) for name in fields.items("dropped")]
        tensors = [_tensor_row(row, files) for row in fields.items("tensors")]
        different([key for key, *_ in tensors], "tensors")
        deleted = list(fields.names("deleted"))
        if not set(deleted) <= files:
            raise ValueError("deleted names files that source.files does not")
        return Journal(source.values, fields.texts("shared"), dropped, tensors, deleted)
    except ValueError as cause:
        raise DamagedShardError(f"{path} cannot be read: {cause}; {advice}") from cause


def _tensor_row(row: object, files: Collection[str]) -> tuple[str, str, str, list[int]]:
    """(key, file, dtype, shape). Raises ValueError."""
    if not isinstance(row, list) or len(row) != 4 or not all(isinstance(item, str) for item in row[:3]):
        raise ValueError(f"tensors has {shown(row)}, expected a key, a file, a dtype and a shape")
    key, file, dtype, shape = row
    if file_name(file) not in files or dtype not in TORCH_DTYPES or math.prod(counts(shape, key)) >= 2**63:
        raise ValueError(f"tensors has {shown(row)}: no such file, dtype or shape")
    return key, file, dtype, shape


def remove_journal(folder: Path) -> None:
    """Remove the journal of a finished split."""
    (folder / JOURNAL_NAME).unlink(missing_ok=True)


def finished_shard(path: Path, origin: str) -> ShardRecord | None:
    """The manifest line of a complete shard made from `origin`; None if it is missing, damaged, or of another source."""
    metadata = _shard_metadata(path)
    return shard_record(path) if metadata is not None and metadata[ORIGIN_KEY] == origin else None


def is_shard(path: Path) -> bool:
    """Whether it is a complete shard that this library wrote, and not a link."""
    return not path.is_symlink() and _shard_metadata(path) is not None


def _shard_metadata(path: Path) -> Mapping[str, str] | None:
    try:
        metadata = read_header(path).metadata
    except (MissingFileError, DamagedFileError):
        return None
    return metadata if {CHECKSUM_KEY, ORIGIN_KEY} <= set(metadata) else None
