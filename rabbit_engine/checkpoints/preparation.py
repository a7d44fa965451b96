"""Executes a resolution: makes or resumes a split if needed, and deletes originals if requested."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rabbit_engine.architectures import Conversion, open_gguf_conversion, warn_of_unused
from rabbit_engine.checkpoints.compression import encodings_of
from rabbit_engine.checkpoints.existing import find_existing, open_remaining, source_fingerprint
from rabbit_engine.checkpoints.formats import GgufTensor, TensorSource, WeightFiles
from rabbit_engine.checkpoints.gguf_entries import map_gguf
from rabbit_engine.checkpoints.hub import delete_original
from rabbit_engine.checkpoints.in_place import NotInPlaceError
from rabbit_engine.checkpoints.reading import WHOLE_FILES
from rabbit_engine.checkpoints.request import ModelRequest
from rabbit_engine.checkpoints.resolution import InPlace, MustSplit, Resolution, Shards, Streamable, resolve, with_model
from rabbit_engine.checkpoints.shards import (
    Journal,
    make_folder,
    require_no_link,
    verify_shard,
    write_manifest,
)
from rabbit_engine.checkpoints.skeleton import Build, build_plain, map_names
from rabbit_engine.checkpoints.splitter import Split, only_one_process
from rabbit_engine.checkpoints.striping import read_set
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.errors import DamagedShardError
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.storage.directio import is_file

logger = logging.getLogger(__name__)


def prepare(
    name: str | Path, source: SourceConfig, split: SplitConfig, *, progress: bool = True, repair: bool = False
) -> Streamable:
    """Find or make the files that `name` (a folder, a GGUF file or a repo id) is streamed from.

    `repair` rebuilds shards with a wrong size or header instead of raising an error. Raises CheckpointError and ShardError.
    """
    return execute(resolve(name, source, split, repair=repair), progress=progress)[0]


def execute(resolution: Resolution, *, progress: bool = True) -> tuple[Streamable, PreTrainedModel]:
    """Execute a resolution of whole files; returns the source to stream from, and its model on the meta device.

    Raises CheckpointError and ShardError.
    """
    source, model = resolution.source, resolution.model
    if isinstance(source, MustSplit):
        source, model = _split(source, resolution, progress), None
    if isinstance(source, Shards) and source.request.split.delete_original and _originals(source):
        source = _delete_all(source)
    if isinstance(source, InPlace):
        logger.info("%s is streamed from its original files", source.repo.name)
    warn_of_unused(source.unused, source.architecture.cls)
    if model is None:  # a split converts with a model of its own
        assert isinstance(source, Shards)  # noqa: S101 - what is streamed in place has a model
        return with_model(source, resolution.build)
    return source, model


def _split(source: MustSplit, resolution: Resolution, progress: bool) -> Shards:
    """Make the shards, or use those that another process has made in the meantime."""
    request = source.request
    if not request.asks_for_split and not source.resumes:
        logger.info("%s cannot be streamed as it is: %s", request.repo.name, source.reason)
    for folder in request.folders:
        make_folder(folder)
    with only_one_process(*request.folders):
        now = find_existing(request, repair=True)
        if now.manifest is not None and now.manifest != source.replaces:
            return Shards(request, now.manifest, now.entries)
        logger.info("converting %s once, into %s", request.repo.name, request.folder)
        mapped = resolution.conversion if now.journal == source.journal else None
        split = _open_split(request, now.journal, mapped, resolution.build)
        replace(split, progress=progress).run()
        made = read_set(request.folders)
        assert made is not None  # noqa: S101 - it was just written
    return Shards(request, made.manifest, made.entries())


def _open_split(request: ModelRequest, journal: Journal | None, mapped: Conversion | None, build: Build) -> Split:
    files = request.weight_files()
    if mapped is not None:
        conversion, tensors = mapped, TensorSource(mapped.tensors)
    elif files.format == "gguf":
        conversion, tensors = _open_gguf(request, files, build)
    else:
        tensors = open_remaining(request, files, journal, WHOLE_FILES)
        conversion = map_names(request.architecture, request.dtype, tensors.tensors, build)
        tensors = replace(tensors, tensors=conversion.tensors)
    return Split(
        folders=request.folders,
        originals=request.repo.folder,
        source=journal.source if journal else source_fingerprint(request, files),
        tensors=tensors,
        conversion=conversion,
        dtype=request.dtype,
        encodings=_encodings(request, conversion),
        journal=journal,
        delete=(lambda path: delete_original(path, request.repo)) if request.split.delete_original else None,
    )


def _encodings(request: ModelRequest, conversion: Conversion) -> Mapping[str, Storable]:
    compression = request.split.compression
    return {} if compression is None else encodings_of(conversion.skeleton, conversion.dtype_of, compression)


def _open_gguf(request: ModelRequest, files: WeightFiles, build: Build) -> tuple[Conversion, TensorSource]:
    """The file's weights, decoded one by one, or else as transformers loads them."""
    try:
        conversion = map_gguf(request, build)
        return conversion, TensorSource(conversion.tensors)
    except NotInPlaceError:
        pass
    path = request.repo.folder / files.names[0]
    conversion = open_gguf_conversion(build(request.architecture, request.dtype), path, request.dtype)
    return conversion, TensorSource({key: GgufTensor(tensor, path) for key, tensor in conversion.tensors.items()})


def loading_info(source: Streamable) -> dict[str, Any]:
    """transformers' loading info, under its keys: missing and mismatched weights are errors here."""
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return {**info, "unexpected_keys": set(source.unused or _unused_then(source))}


def _unused_then(source: Streamable) -> Sequence[str]:
    """The unused weights of a split made by a version that did not record them, read from its originals."""
    request = source.request
    if source.manifest is None or request.source.gguf_file is not None:
        return ()
    made_from = source.manifest.source
    if "unused_weights" in made_from or made_from["deleted"]:
        return ()
    tensors = open_remaining(request, request.weight_files(), None, WHOLE_FILES).tensors
    return map_names(source.architecture, source.dtype, tensors, build_plain).unused()


def _originals(source: Shards) -> list[Path]:
    """The existing originals that the shards were made from."""
    paths = (source.repo.folder / name for name in source.manifest.source["used"])
    return [path for path in paths if is_file(path)]


def _delete_all(source: Shards) -> Shards:
    """Delete the originals of a split that existed already: verify all of it, record the deletion, then delete."""
    for folder in source.request.folders:
        require_no_link(folder)
    with only_one_process(*source.request.folders):
        split = read_set(source.request.folders)
        if split is None:
            raise DamagedShardError(f"{source.folder} was deleted while it was used: split again")
        parts = list(zip(split.folders, split.manifests, strict=True))
        for folder, manifest in parts:
            for record in manifest.shards:
                verify_shard(folder, record, manifest)
        for folder, manifest in parts:
            write_manifest(folder, replace(manifest, source={**manifest.source, "deleted": True}))
    for path in _originals(source):
        delete_original(path, source.repo)
    return replace(source, manifest=replace(source.manifest, source={**source.manifest.source, "deleted": True}))
