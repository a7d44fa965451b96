"""Checks that a checkpoint's files are unchanged, by the names of the Hub cache's blobs or by recorded checksums.

A blob of the Hub cache is named after its contents: their SHA-256, or git's SHA-1 for a small file. For a plain folder,
`record_sums` writes xxh3 checksums into it, or into this library's cache if the folder is not writable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import xxhash
from huggingface_hub import constants

from rabbit_engine.checkpoints.formats import digest, find_weight_files
from rabbit_engine.checkpoints.hub import Repo
from rabbit_engine.errors import (
    CheckpointError,
    DamagedCheckpointError,
    DamagedFileError,
    MissingFileError,
    RabbitError,
    UnreadableFileError,
)
from rabbit_engine.storage.directio import as_bytes, claim_memory, damage_as, disk_errors, open_unchanged
from rabbit_engine.storage.jsonvalues import Fields, file_name, parse
from rabbit_engine.storage.tensorfiles import COPY_BYTES, read_header, written_whole

SUMS_NAME = "rabbit_sums.json"

OnBytes = Callable[[int], object]
"""Called with the number of bytes just read."""

_KINDS = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")
"""Name suffixes of files that affect an answer."""

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FileState:
    """One file: `whole` and `damaged` were compared, an `unrecorded` one has no checksum; `said` describes the difference."""

    path: Path
    state: Literal["whole", "damaged", "unrecorded"]
    said: str = ""


@dataclass(frozen=True, slots=True)
class Sum:
    """A recorded file: its name in the folder, its size and the xxh3 of its contents."""

    name: str
    bytes: int
    xxh3_128: str


def checked_files(repo: Repo) -> list[str]:
    """Names of the checkpoint's files on this machine that affect an answer."""
    names = {name for name in repo.names if name.endswith(_KINDS) and Path(name).name != SUMS_NAME}
    with contextlib.suppress(CheckpointError):  # an index may list files in subfolders
        names.update(find_weight_files(repo.names, repo.read_text, None, str(repo.folder)).names)
    return sorted(name for name in names if (repo.folder / name).is_file())


def compare_files(repo: Repo, on_bytes: OnBytes) -> Iterator[FileState]:
    """Read every file of the checkpoint in full and compare it with its blob's name or its recorded checksum.

    Raises DamagedCheckpointError for recorded checksums that cannot be read.
    """
    recorded = _read_sums(repo)
    for name in sorted({*checked_files(repo), *recorded}):
        path = repo.folder / name
        try:
            yield _compare(path, recorded.get(name), on_bytes)
        except (DamagedFileError, MissingFileError, UnreadableFileError) as error:
            yield FileState(path, "damaged", str(error))


def _compare(path: Path, recorded: Sum | None, on_bytes: OnBytes) -> FileState:
    if path.suffix == ".safetensors":
        read_header(path)
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        found, wanted = _sum(path, _blob_hash(blob), on_bytes), blob.name
        advice = "delete the blob that it links to and download it again"
    elif recorded is not None:
        found, wanted = _sum(path, xxhash.xxh3_128(), on_bytes), recorded.xxh3_128
        advice = "it is damaged or was changed: download it again, or --record it if the change is yours"
    else:
        return FileState(path, "unrecorded")
    if found == wanted:
        return FileState(path, "whole")
    return FileState(path, "damaged", f"{path} has changed (its sum is {found}, expected {wanted}): {advice}")


def _blob_hash(blob: Path) -> _Hash:
    if len(blob.name) == 64:
        return hashlib.sha256()
    found = hashlib.sha1(usedforsecurity=False)  # git's blob id
    with disk_errors(blob):
        found.update(b"blob %d\0" % blob.stat().st_size)
    return found


def _sum(path: Path, found: _Hash, on_bytes: OnBytes) -> str:
    memory = as_bytes(claim_memory(COPY_BYTES))
    with open_unchanged(path, None) as file, disk_errors(path):
        while count := file.readinto(memory):
            found.update(memory[:count])
            on_bytes(count)
    return found.hexdigest()


def record_sums(repo: Repo, on_bytes: OnBytes) -> Path:
    """Record the checksums of the checkpoint's files, replacing earlier ones, and return the file that holds them.

    Raises UnreadableFileError if neither the folder nor this library's cache is writable.
    """
    sums = [_recorded(repo.folder, name, on_bytes) for name in checked_files(repo)]
    text = json.dumps({"version": 1, "files": [asdict(row) for row in sums]}, indent=1).encode() + b"\n"
    refusal: OSError | None = None
    for path in _places(repo):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.write(text)
        except OSError as error:
            refusal = error
        else:
            return path
    raise UnreadableFileError(f"the sums can be written neither into {repo.folder} nor into {path.parent}: {refusal}")


@damage_as(DamagedCheckpointError)
def _recorded(folder: Path, name: str, on_bytes: OnBytes) -> Sum:
    path = folder / name
    if path.suffix == ".safetensors":
        read_header(path)
    found = _sum(path, xxhash.xxh3_128(), on_bytes)
    return Sum(name, path.stat().st_size, found)


def _places(repo: Repo) -> tuple[Path, Path]:
    """Possible places of the checksums: next to the weights, or in this library's cache under a hash of the folder's path."""
    own = Path(constants.HF_HOME).expanduser().absolute() / "rabbit_engine" / "sums"
    return repo.folder / SUMS_NAME, own / f"{digest({'folder': str(repo.folder)})}.json"


def _read_sums(repo: Repo) -> Mapping[str, Sum]:
    for path in _places(repo):
        try:
            with open_unchanged(path, None) as file:
                return {row.name: row for row in _parse_sums(file.read())}
        except MissingFileError:
            continue
        except (ValueError, RabbitError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read ({error}): delete it and --record again") from error
    return {}


def _parse_sums(raw: bytes) -> Sequence[Sum]:
    rows = Fields.of(parse(raw)).rows("files")
    return [Sum(file_name(row.take("name")), row.count("bytes"), row.text("xxh3_128")) for row in rows]
