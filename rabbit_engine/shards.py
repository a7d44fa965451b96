"""The split of a checkpoint: shard files and the manifest that names them. Knows bytes, never models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from rabbit_engine.errors import DamagedShardError, ShardsNotFoundError, ShardsNotWritableError
from rabbit_engine.tensorfiles import (
    CHECKSUM_KEY,
    COPY_BYTES,
    PAD_PREFIX,
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
    """One line of the manifest: a shard, its file beside the manifest, and what `verify` compares."""

    name: str
    file: str
    file_bytes: int
    header_xxh3_128: str
    data_xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a split folder holds. Written last, so its presence means that every shard in it is whole.

    `source` is the fingerprint of the checkpoint the shards were made from; `ties` maps a parameter to the one it shares.
    """

    dtype: str
    source: Mapping[str, Any]
    ties: Mapping[str, str]
    shards: tuple[ShardRecord, ...]
    version: int = FORMAT_VERSION


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> ShardRecord:
    """Write one shard, whole or not at all, and return the manifest's line of it."""
    write_aligned(path, tensors, metadata)
    return shard_record(path)


def shard_record(path: Path) -> ShardRecord:
    """The manifest's line of a finished shard, from its header alone. Raises DamagedShardError."""
    header = read_header(path, DamagedShardError)
    if CHECKSUM_KEY not in header.metadata:
        raise DamagedShardError(f"{path} carries no checksum: it was not written here")
    return ShardRecord(path.stem, path.name, header.file_bytes, header.checksum, header.metadata[CHECKSUM_KEY])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Name the shards: from here on the split exists."""
    with written_whole(folder / MANIFEST_NAME) as file:
        file.write(json.dumps(asdict(manifest), indent=1, sort_keys=True).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none. Raises DamagedShardError for one that cannot be read."""
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_bytes())
        records = tuple(ShardRecord(**row) for row in raw.pop("shards"))
        manifest = Manifest(shards=records, **raw)
        _ = [row["name"] for row in manifest.source["files"]], manifest.source["commit"], manifest.source["deleted"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise DamagedShardError(
            f"{path} cannot be read: {cause}; run `rabbit split` to make it again (finished shards are kept)"
        ) from cause
    if manifest.version != FORMAT_VERSION:
        raise DamagedShardError(
            f"{path} is of format {manifest.version}, this version reads {FORMAT_VERSION}: split into another folder"
        )
    return manifest


def read_entries(folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    """Every tensor of a split, from the shards' headers, each checked against the manifest (sizes and header checksum)."""
    entries: dict[str, TensorEntry] = {}
    for record in manifest.shards:
        header = _checked_header(folder, record)
        entries.update({t.name: t for t in header.tensors if not t.name.startswith(PAD_PREFIX)})
    return entries


def _checked_header(folder: Path, record: ShardRecord) -> Header:
    path = folder / record.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedShardError(f"{path} is gone, the manifest names it; run `rabbit split` to make it again") from None
    if size != record.file_bytes:
        raise DamagedShardError(
            f"{path} is {size} bytes, the manifest says {record.file_bytes}; run `rabbit split` to make it again"
        )
    header = read_header(path, DamagedShardError)
    if header.checksum != record.header_xxh3_128:
        raise DamagedShardError(f"{path} has a damaged header (checksum); run `rabbit split` to make it again")
    return header


def verify_shard(folder: Path, record: ShardRecord) -> None:
    """Read a shard from end to end. Raises DamagedShardError where size, header or data differ from the manifest."""
    header = _checked_header(folder, record)
    digest = xxhash.xxh3_128()
    with header.path.open("rb") as file:
        file.seek(header.data_start)
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != record.data_xxh3_128:
        raise DamagedShardError(
            f"{header.path} has damaged data (xxh3 {digest.hexdigest()}, the manifest says {record.data_xxh3_128}): "
            "delete it, then run `rabbit split` to make it again"
        )


def find_splits(root: Path) -> list[Path]:
    """Every folder at or below `root` that holds a manifest. Raises ShardsNotFoundError where there is none."""
    found = sorted(path.parent for path in root.rglob(MANIFEST_NAME)) if root.is_dir() else []
    if not found:
        raise ShardsNotFoundError(f"no split under {root}: run `rabbit split MODEL` first")
    return found


def make_folder(folder: Path) -> None:
    """Create the folder for shards and prove that it can be written. Raises ShardsNotWritableError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ShardsNotWritableError(
            f"{folder} cannot be written ({error.strerror}): give layer_shards_saving_path=DIR (--saving-path DIR)"
        ) from error


def without_scratch(folder: Path) -> None:
    """Remove what a killed writer left: scratch files are never part of a split."""
    for path in folder.glob(".*.scratch"):
        path.unlink(missing_ok=True)


@dataclass(slots=True)
class Journal:
    """What an unfinished split needs to go on without the originals it has deleted already.

    `tensors` rows are (key, file, safetensors dtype, shape); `deleted` names originals that may be gone.
    """

    source: Mapping[str, Any]
    shared: dict[str, str]
    dropped: list[str]
    tensors: list[tuple[str, str, str, list[int]]]
    deleted: list[str]

    def write(self, folder: Path) -> None:
        """Replace the folder's journal."""
        with written_whole(folder / JOURNAL_NAME) as file:
            file.write(json.dumps(asdict(self)).encode())


def read_journal(folder: Path) -> Journal | None:
    """The journal of an interrupted split, or None. Raises DamagedShardError for one that cannot be read."""
    path = folder / JOURNAL_NAME
    try:
        return Journal(**json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as cause:
        raise DamagedShardError(f"{path} cannot be read: {cause}; delete {folder} and split again") from cause


def remove_journal(folder: Path) -> None:
    """The split is finished: the manifest says it all."""
    (folder / JOURNAL_NAME).unlink(missing_ok=True)


def finished_shard(path: Path, origin: str) -> ShardRecord | None:
    """The manifest's line of a whole shard that was made from `origin`, or None: absent, damaged, or of another source."""
    try:
        header = read_header(path, DamagedShardError)
    except (FileNotFoundError, DamagedShardError):
        return None
    return shard_record(path) if header.metadata.get(ORIGIN_KEY) == origin else None
