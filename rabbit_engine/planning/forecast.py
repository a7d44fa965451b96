"""The plan of a model before anything is downloaded or split: from its config, and its files' headers where they can be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rabbit_engine.checkpoints.formats import SafetensorsTensor, TensorSource, WeightFiles, check_present, open_tensors
from rabbit_engine.checkpoints.hub import Repo, read_remote_headers
from rabbit_engine.checkpoints.in_place import NotInPlaceError, original_entries, require_plain, stored_shapes
from rabbit_engine.checkpoints.prepare import Request, open_request, usable, weight_files
from rabbit_engine.checkpoints.shards import read_entries
from rabbit_engine.checkpoints.splitter import build_for
from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.planning.partition import partition_model, unread_entries
from rabbit_engine.planning.plan import Plan
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.utils.sizes import format_bytes


def forecast(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> Plan:
    """What `AutoModel.from_pretrained` would decide on this machine now, and from which files it would stream.

    Reads the config and headers only, those of a Hub repo by range; but a repo that is one GGUF file is fetched, as its
    config is inside. Raises what loading would raise up to the first byte of a weight.
    """
    request = open_request(name, source, split, open_headers=_headers)
    shapes, found, note = _entries(request)
    model = build_for(request.architecture, request.dtype, shapes)
    entries, ties = found or unread_entries(model)
    plan = plan_for(partition_model(model, entries, ties, stream.cut, stream.device.type), stream)
    return replace(plan, notes=(*plan.notes, note))


def _headers(repo: Repo, files: WeightFiles, source: SourceConfig) -> TensorSource:
    """The headers of safetensors files, here or on the Hub; of local pickles what they hold."""
    if all((repo.folder / name).is_file() for name in files.names):
        return open_tensors(repo.folder, files)
    if repo.commit is None:
        check_present(repo.folder, files)
    if files.format != "safetensors":
        raise ConfigurationError(f"{repo.name} holds pickles and its config names no dtype: say dtype=")
    entries = read_remote_headers(repo, files.names, source)
    return TensorSource({entry.name: SafetensorsTensor(entry) for entry in entries})


_Found = tuple[Mapping[str, TensorEntry], Mapping[str, str]]


def _entries(request: Request) -> tuple[Mapping[str, tuple[int, ...]], _Found | None, str]:
    """Stored shapes, the entries and ties if they are known, and where the weights would come from."""
    manifest = None if request.split.mode == "never" else usable(request, False)
    if manifest is not None:
        entries = read_entries(request.folder, manifest)
        shapes = {name: entry.shape for name, entry in entries.items()}
        return shapes, (entries, manifest.ties), f"streamed from the shards in {request.folder}"
    files = weight_files(request.repo, request.gguf_file, request.source)
    try:
        require_plain(files)
    except NotInPlaceError as reason:
        return {}, None, _split_note(request, str(reason))
    tensors = _headers(request.repo, files, request.source).tensors
    shapes = stored_shapes(request.architecture, request.dtype, tensors)
    try:
        found = original_entries(request.architecture, request.dtype, tensors, request.repo.folder, equal=_taken_as_equal)
    except NotInPlaceError as reason:
        return shapes, None, _split_note(request, str(reason))
    if request.split.mode == "always" or request.split.saving_path is not None:
        return shapes, None, _split_note(request, "as asked")
    here = all((request.repo.folder / name).is_file() for name in files.names)
    nbytes = sum(entry.nbytes for entry in found[0].values())
    download = "" if here else f", after a download of {format_bytes(nbytes)}"
    return shapes, found, f"streamed from the original files{download}"


def _taken_as_equal(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether stored copies of a tied weight differ is known when they are read; hardly any checkpoint's do."""
    return first.shape == second.shape


def _split_note(request: Request, reason: str) -> str:
    if request.split.mode == "never":
        raise ConfigurationError(f'split="never", but {request.repo.name} must be split: {reason}')
    return f"split first, into {request.folder} ({reason})"
