"""Each machine reads its own copy of its layers: from the same folder or Hub cache as the driver, or fetched from it once.

The driver describes the files that it loads (`describe`, `extents_of`); a machine finds the same files, or fetches what it
needs of them into RABBIT_ENGINE_CACHE (`ensure`), and loads from there as from any folder.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rabbit_engine.checkpoints import Repo, find_repo
from rabbit_engine.checkpoints.formats import changed_files
from rabbit_engine.checkpoints.shards import read_manifest
from rabbit_engine.cluster.copies import copy_files
from rabbit_engine.cluster.description import (
    Area,
    FileExtent,
    FileRow,
    FilesDescription,
    describe,
    extents_of,
    row_matches,
    shards,
    sum_of,
)
from rabbit_engine.cluster.sending import Chunk, DriverFiles, ReadChunk, chunks_from, serve_files
from rabbit_engine.cluster.stored import copies_folder
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.errors import (
    CheckpointNotFoundError,
    ClusterError,
    DamagedFileError,
    HubUnreachableError,
    MachinesDifferError,
    MissingFileError,
)
from rabbit_engine.storage.cached import VARIABLE
from rabbit_engine.storage.tensorfiles import TensorEntry

__all__ = [
    "Chunk",
    "DriverFiles",
    "FileExtent",
    "FilesDescription",
    "LocalModel",
    "ReadChunk",
    "chunks_from",
    "describe",
    "ensure",
    "extents_of",
    "require_present",
    "serve_files",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """What loads a model on this machine: `resolve(name, source, split)`. `is_copy` if its files were fetched."""

    name: str
    source: SourceConfig
    split: SplitConfig
    is_copy: bool

    def keywords(self) -> dict[str, Any]:
        """The keywords of `AutoModel.from_pretrained` that load it, besides the name."""
        source, split = self.source, self.split
        folders = [path for path in (split.saving_path, *split.more_paths) if path is not None]
        return {
            "token": None,
            "hf_token": None,
            "local_files_only": True,
            "force_download": False,
            "revision": source.revision,
            "cache_dir": source.cache_dir,
            "subfolder": source.subfolder,
            "gguf_file": source.gguf_file,
            "split": split.mode,
            "dtype": split.dtype,
            "layer_shards_saving_path": folders or None,
            "delete_original": False,
        }


def ensure(
    description: FilesDescription,
    extents: Collection[FileExtent],
    read_chunk: ReadChunk,
    *,
    machine: str | None = None,
    folder: Path | None = None,
    later: Collection[FileExtent] = (),
) -> LocalModel:
    """Find the described files on this machine, or fetch the small ones and `extents` of the weights from the driver.

    Copies are in `folder`, by default in RABBIT_ENGINE_CACHE, whose disk must have room for `later` extents too. Raises
    MachinesDifferError if the model's place holds other files, NotEnoughDiskError before the first byte, ClusterError for what
    arrives damaged.
    """
    machine = machine or socket.gethostname()
    if _is_here(description, machine):
        return LocalModel(description.name, description.source, description.split, is_copy=False)
    folder = folder or _copies(machine)
    copy = folder / description.fingerprint
    copy_files(description, extents, read_chunk, copy, later=later)
    return _copied(description, copy)


def require_present(entries: Mapping[str, TensorEntry], names: Iterable[str]) -> None:
    """Raise MissingFileError if weights of these names are not on this machine: only parts of their files were fetched."""
    absent = next((name for name in names if name in entries and entries[name].is_absent), None)
    if absent is not None:
        raise MissingFileError(
            f"{absent} is not on {socket.gethostname()}: {entries[absent].path} holds only the layers that it was fetched for"
        )


def _copies(machine: str) -> Path:
    folder = copies_folder()
    if folder is None:
        raise ClusterError(f"{machine} has no place for the model's files: {VARIABLE} is empty there, name a folder")
    return folder


def _copied(description: FilesDescription, copy: Path) -> LocalModel:
    """How the files of a copy are loaded."""
    split = description.split_in(copy)
    if description.commit is None:
        return LocalModel(str(copy / description.place), description.source, split, is_copy=True)
    return LocalModel(description.name, replace(description.source, cache_dir=copy), split, is_copy=True)


def _is_here(description: FilesDescription, machine: str) -> bool:
    """Whether the model's place on this machine holds the same files. Raises MachinesDifferError if it holds others."""
    try:
        repo = find_repo(description.name, description.source)
    except (CheckpointNotFoundError, HubUnreachableError):
        return False
    folders = description.areas(repo, description.split)
    paths = {row: folders[row.area] / row.name for row in description.files}
    present = {row: path for row, path in paths.items() if path.is_file()}
    for row, path in present.items():
        _require_same(row, path, description, machine)
    lacking = [path for row, path in paths.items() if row.is_needed and row not in present]
    if lacking:
        logger.info("%s has no %s: the model's files are fetched from %s", machine, lacking[0], description.driver)
        return False
    return not _would_split(folders, repo)


def _require_same(row: FileRow, path: Path, description: FilesDescription, machine: str) -> None:
    try:
        if row_matches(row, path):
            return
        found = f"{path.stat().st_size} bytes, {sum_of(row, path)}"
    except DamagedFileError as error:
        found = str(error)
    raise MachinesDifferError(
        f"{path} on {machine} ({found}) is not that of {description.driver} ({row.nbytes} bytes, {row.xxh3}): copy the model "
        "anew to one of them, or delete its folder there and it is fetched"
    )


def _would_split(folders: Mapping[Area, Path], repo: Repo) -> bool:
    """Whether a split would be made again here: it was made from other files than those next to it."""
    manifest = read_manifest(folders[shards(0)])
    changed = [] if manifest is None else changed_files(repo.folder, manifest.source)
    if changed:
        logger.info("%s is not the file that the split here was made from", changed[0])
    return bool(changed)
