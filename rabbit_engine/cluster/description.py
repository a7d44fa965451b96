"""What the files of a model are, said by the driver: enough for another machine to tell its own copy from another model's,
and to load the parts of it that are fetched."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from rabbit_engine.checkpoints import Repo, Shards, Streamable, checked_files
from rabbit_engine.checkpoints.request import shards_root, split_name
from rabbit_engine.checkpoints.shards import MANIFEST_NAME
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.storage.directio import disk_errors, open_unchanged
from rabbit_engine.storage.tensorfiles import PAD_PREFIX, read_header

Area = str
"""MODEL, the checkpoint's own folder, or `shards(n)`, a folder of its split."""

MODEL: Area = "model"


def shards(number: int) -> Area:
    """A folder of a split."""
    return f"shards{number}"


ALWAYS_BYTES = 4096
"""Tensors up to this size go to every machine: some of them say how others are stored, and are read as a model is opened."""

_SAMPLES = 16
_SAMPLE_BYTES = 4096
_HEAD_BYTES = 2**20
"""What counts as the head of a file that is not of safetensors."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file: `name` in its area, the driver's `path`, and what is compared.

    `xxh3` is that of a small file's contents; of weights, that of the `head` (the first bytes, whose own checksum is
    `head_xxh3`) and of samples of the rest: a model that was trained further has equal sizes and headers.
    """

    area: Area
    name: str
    path: str
    nbytes: int
    xxh3: str
    is_weights: bool = False
    head_bytes: int = 0
    head_xxh3: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether a part of it is enough: it is of safetensors, whose header says where tensors are."""
        return self.is_weights and self.name.endswith(".safetensors")

    @property
    def is_needed(self) -> bool:
        """Whether no model loads without it."""
        return self.is_weights or self.name == MANIFEST_NAME or Path(self.name).name == "config.json"


@dataclass(frozen=True, slots=True)
class FileExtent:
    """`nbytes` from `offset` on of the file `name` in an area."""

    area: Area
    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FilesDescription:
    """The files that a model is loaded from, on the machine `driver`; it may be pickled.

    `name` is a repo id, or the folder on the driver. `place` is where the model's folder is below that of a copy, and
    `split_folder` the name of its split's. `always` are extents that every machine needs. `source` and `split` load the model
    where its files are at the driver's places.
    """

    driver: str
    name: str
    commit: str | None
    source: SourceConfig = field(repr=False)
    split: SplitConfig = field(repr=False)
    place: str
    split_folder: str
    files: tuple[FileRow, ...] = field(repr=False)
    always: tuple[FileExtent, ...] = field(repr=False)
    ties: Mapping[str, str] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The same for the same files."""
        rows = sorted((row.area, row.name, row.nbytes, row.xxh3) for row in self.files)
        return xxhash.xxh3_128_hexdigest(json.dumps([self.place, self.split_folder, rows]).encode())

    @property
    def weights(self) -> tuple[FileRow, ...]:
        """The files of weights."""
        return tuple(row for row in self.files if row.is_weights)

    def areas(self, repo: Repo, split: SplitConfig) -> dict[Area, Path]:
        """Where the areas are for this checkpoint and split on a machine."""
        places = [shards_root(repo, path) / self.split_folder for path in split.saving_paths or (None,)]
        return {MODEL: repo.folder} | {shards(number): place for number, place in enumerate(places)}

    def split_in(self, copy: Path) -> SplitConfig:
        """The split where the files are in the folder `copy`: next to the model's, or each part in a folder of its own."""
        more = tuple(copy / f"disk{number + 1}" for number in range(len(self.split.more_paths)))
        return replace(self.split, saving_path=copy / "disk0" if more else None, more_paths=more)

    def areas_in(self, copy: Path) -> dict[Area, Path]:
        """Where the areas are in the folder `copy`."""
        folder = (copy / self.place).resolve()
        return self.areas(Repo(self.name, folder, (), self.commit, subfolder=self.source.subfolder), self.split_in(copy))


def describe(source: Streamable) -> FilesDescription:
    """Describe the files that a model is streamed from. Reads headers, small files and samples of weights."""
    repo, request = source.repo, source.request
    weights, small = _weight_paths(source), {name: repo.folder / name for name in checked_files(repo)}
    originals = {name for name in small if name.endswith((".safetensors", ".bin", ".gguf"))}
    rows = [_small(MODEL, name, path) for name, path in small.items() if name not in originals]
    if isinstance(source, Shards):
        rows += [_small(shards(n), MANIFEST_NAME, place / MANIFEST_NAME) for n, place in enumerate(request.folders)]
    rows += [_weights(area, name, path) for (area, name), path in weights.items()]
    return FilesDescription(
        driver=socket.gethostname(),
        name=repo.name if repo.commit else str(repo.folder),
        commit=repo.commit,
        source=_source_elsewhere(request.source, repo),
        split=_split_elsewhere(source),
        place=_place(repo),
        split_folder=_split_folder(source, [row.name for row in rows if row.area == MODEL]),
        files=tuple(rows),
        always=tuple(extent for row in rows if row.is_weights for extent in _always(row)),
        ties=dict(source.ties),
    )


def extents_of(source: Streamable, names: Collection[str]) -> tuple[FileExtent, ...]:
    """Where the weights of these names are stored; a tied one is where the one that it shares is. Names without a stored weight
    have no extents."""
    places = {path: place for place, path in _weight_paths(source).items()}
    found = [source.entries.get(source.ties.get(name, name)) for name in names]
    parts = {(part.path, part.offset, part.nbytes) for entry in found if entry is not None for part in entry.places}
    return tuple(FileExtent(*places[path], offset, nbytes) for path, offset, nbytes in sorted(parts))


def row_matches(row: FileRow, path: Path) -> bool:
    """Whether the file at `path` is the one that the row describes."""
    return path.stat().st_size == row.nbytes and sum_of(row, path) == row.xxh3


def sum_of(row: FileRow, path: Path) -> str:
    """The sum of the file at `path`, as the row's `xxh3` was made. Raises DamagedFileError if it is not of its format."""
    return _weights(row.area, row.name, path).xxh3 if row.is_weights else _small(row.area, row.name, path).xxh3


def _weight_paths(source: Streamable) -> dict[tuple[Area, str], Path]:
    """The files that hold the model's weights, by area and name; and the GGUF file that a split takes its config from."""
    found: dict[tuple[Area, str], Path] = {}
    if isinstance(source, Shards):
        files = [record.file for record in source.manifest.shards]
        found = {(shards(n), file): place / file for n, place in enumerate(source.request.folders) for file in files}
    else:
        found = {(MODEL, name): source.folder / name for name in source.request.weight_files().names}
    if source.request.source.gguf_file is not None:
        name = Path(source.request.source.gguf_file).as_posix()
        found[MODEL, name] = source.repo.folder / name
    return found


def _small(area: Area, name: str, path: Path) -> FileRow:
    with disk_errors(path):
        raw = path.read_bytes()
    return FileRow(area, name, str(path), len(raw), xxhash.xxh3_128_hexdigest(raw))


def _weights(area: Area, name: str, path: Path) -> FileRow:
    with disk_errors(path):
        nbytes = path.stat().st_size
    head_bytes = read_header(path).data_start if name.endswith(".safetensors") else min(nbytes, _HEAD_BYTES)
    with open_unchanged(path, None) as file, disk_errors(path):
        head = _sum_at(file.fileno(), [(0, head_bytes)])
        step = max(0, nbytes - head_bytes - _SAMPLE_BYTES) // (_SAMPLES - 1)
        samples = _sum_at(file.fileno(), [(head_bytes + index * step, _SAMPLE_BYTES) for index in range(_SAMPLES)])
    return FileRow(area, name, str(path), nbytes, f"{head}{samples}", True, head_bytes, head)


def _sum_at(number: int, parts: list[tuple[int, int]]) -> str:
    digest = xxhash.xxh3_64()
    with os.fdopen(os.dup(number), "rb") as file:
        for offset, nbytes in parts:
            file.seek(offset)
            digest.update(file.read(nbytes))
    return digest.hexdigest()


def _always(row: FileRow) -> Iterator[FileExtent]:
    """The extents of a file that every machine needs."""
    if not row.is_sparse:
        yield FileExtent(row.area, row.name, 0, row.nbytes)
        return
    yield FileExtent(row.area, row.name, 0, row.head_bytes)
    for entry in read_header(Path(row.path)).tensors:
        if entry.nbytes <= ALWAYS_BYTES and not entry.name.startswith(PAD_PREFIX):
            yield FileExtent(row.area, row.name, entry.offset, entry.nbytes)


def _source_elsewhere(source: SourceConfig, repo: Repo) -> SourceConfig:
    """The source for another machine: nothing is downloaded, and no token leaves the driver."""
    here = replace(source, token=None, local_files_only=True, force_download=False, revision=repo.commit)
    return here if repo.commit else replace(here, subfolder="", cache_dir=None)


def _split_elsewhere(source: Streamable) -> SplitConfig:
    """The split for another machine: it makes none, and loads weights in the driver's dtype."""
    mode = source.request.split.mode if isinstance(source, Shards) else "never"
    return replace(source.request.split, dtype=source.dtype, delete_original=False, mode=mode)


def _place(repo: Repo) -> str:
    """Where a copy of the model's folder is, as in the Hub cache, or under its own name."""
    if repo.commit is None:
        return repo.folder.name or "model"
    return Path(f"models--{repo.name.replace('/', '--')}", "snapshots", repo.commit, repo.subfolder).as_posix()


def _split_folder(source: Streamable, names: list[str]) -> str:
    split = source.request.split
    return split_name(source.dtype, source.request.source, names, split.compression, len(source.request.folders))
