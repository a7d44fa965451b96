"""What an earlier run left in the shards folder: a complete split of this source, an interrupted one, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rabbit_engine.checkpoints.compression import compression_fingerprint, equally_compressed
from rabbit_engine.checkpoints.formats import (
    LazyTensor,
    SafetensorsTensor,
    TensorSource,
    WeightFiles,
    changed_files,
    digest,
    fingerprint,
)
from rabbit_engine.checkpoints.reading import Reading
from rabbit_engine.checkpoints.request import ModelRequest
from rabbit_engine.checkpoints.shards import Journal, Manifest, read_journal
from rabbit_engine.checkpoints.striping import read_set
from rabbit_engine.errors import CheckpointNotFoundError, DamagedShardError, HubUnreachableError, ShardError
from rabbit_engine.storage.tensorfiles import TORCH_DTYPES, TensorEntry


@dataclass(frozen=True, slots=True)
class Existing:
    """`manifest` and its `entries` if there is a complete split of this source, else the `journal` of one to resume.

    `problem` is why an existing split cannot be used; `interrupted` is true if any split, of any source, was interrupted.
    """

    manifest: Manifest | None = None
    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    journal: Journal | None = None
    interrupted: bool = False
    problem: str = ""


def find_existing(request: ModelRequest, *, repair: bool) -> Existing:
    """The contents of the shards folder; reads only headers.

    Raises DamagedShardError for a damaged split (with `repair` it becomes a `problem` if the originals are there), and
    ShardError for a split of another source whose originals are deleted.
    """
    problem, manifest = "", None
    try:
        split = read_set(request.folders)
        manifest = None if split is None else split.manifest
        changed = "" if manifest is None else _difference(request, manifest)
        if split is not None and not changed:
            return Existing(manifest, split.entries())
        if changed:
            problem = f"the source of {request.folder} has changed ({changed}): splitting again"
    except DamagedShardError as error:
        if not repair or (manifest is not None and manifest.source["deleted"] and request.lacks_weights()):
            raise
        problem = str(error)
    journal = read_journal(request.folder)
    usable = journal if journal is not None and _is_of_source(request, journal) else None
    return Existing(journal=usable, interrupted=journal is not None, problem=problem)


def open_remaining(request: ModelRequest, files: WeightFiles, journal: Journal | None, reading: Reading) -> TensorSource:
    """The tensors of safetensors files or pickles; only the shapes for files that an interrupted split has deleted."""
    if journal is None:
        return reading.open(request.repo, files, request.source)
    found = reading.open(request.repo, remaining_files(files, journal), request.source)
    return replace(found, tensors={**found.tensors, **_deleted_tensors(journal, request.repo.folder)})


def remaining_files(files: WeightFiles, journal: Journal | None) -> WeightFiles:
    """The files that an interrupted split has not deleted."""
    deleted = journal.deleted if journal is not None else ()
    return replace(files, names=tuple(name for name in files.names if name not in deleted))


def _deleted_tensors(journal: Journal, originals: Path) -> dict[str, LazyTensor]:
    """The tensors of deleted originals: shapes to plan with; every shard made from them is complete."""
    return {
        key: SafetensorsTensor(TensorEntry(key, originals / file, 0, 0, TORCH_DTYPES[dtype], tuple(shape)))
        for key, file, dtype, shape in journal.tensors
        if file in journal.deleted
    }


def source_fingerprint(request: ModelRequest, files: WeightFiles) -> dict[str, Any]:
    """The source's fingerprint, with its conversion and compression if there are any."""
    found = fingerprint(request.repo.folder, files, request.repo.commit)
    changes = {"conversion": _conversion(request), "compression": _compression(request)}
    return {**found, **{name: value for name, value in changes.items() if value is not None}}


def _compression(request: ModelRequest) -> dict[str, Any] | None:
    compression = request.split.compression
    return None if compression is None else compression_fingerprint(compression)


def _conversion(request: ModelRequest) -> str | None:
    conversion = request.architecture.conversion()
    return None if conversion is None else digest({"conversion": conversion})


def _is_converted_so(request: ModelRequest, source: Mapping[str, Any]) -> bool:
    """Whether weights of `source` were converted and compressed as this request would."""
    same = equally_compressed(source.get("compression"), _compression(request))
    return same and source.get("conversion") == _conversion(request)


def _difference(request: ModelRequest, manifest: Manifest) -> str:
    """How this source differs from the one that the split was made from; empty if they are the same."""
    changed = changed_files(request.repo.folder, manifest.source)
    others = _other_names(request, manifest.source)
    converted_so = _is_converted_so(request, manifest.source)
    if not changed and not others and converted_so and manifest.source["commit"] == request.repo.commit:
        return ""
    what = ", ".join(changed or others) or (f"commit {request.repo.commit}" if converted_so else "how it is converted")
    if manifest.source["deleted"]:
        raise ShardError(
            f"{request.folder} was made from another source ({what} differs) whose originals were deleted: "
            "it may be the only copy; pass another layer_shards_saving_path, or delete it yourself"
        )
    return what


def _other_names(request: ModelRequest, source: Mapping[str, Any]) -> list[str]:
    """Weight files that were not part of the split; files next to deleted originals do not count."""
    if source.get("deleted"):
        return []
    try:
        names = request.weight_files().names
    except (CheckpointNotFoundError, HubUnreachableError):  # all originals are deleted: only the split is left
        return []
    known = {row["name"] for row in source["files"]}
    return [name for name in names if name not in known]


def _is_of_source(request: ModelRequest, journal: Journal) -> bool:
    """Whether an interrupted split is of this very source."""
    changed = (
        changed_files(request.repo.folder, journal.source)
        or (not journal.deleted and _other_names(request, journal.source))
        or journal.source["commit"] != request.repo.commit
        or not _is_converted_so(request, journal.source)
    )
    if changed and journal.deleted:
        raise ShardError(
            f"{request.folder} is half a split of another source whose originals are deleted: "
            "pass another layer_shards_saving_path, or delete it yourself"
        )
    return not changed
