"""From the name of a model to a split that can be streamed: found where it is whole, made where it is not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures import (
    Conversion,
    config_for,
    find_class,
    find_config,
    gguf_dtype,
    open_conversion,
    open_gguf_conversion,
)
from rabbit_engine.checkpoints import (
    GgufTensor,
    LazyTensor,
    TensorSource,
    WeightFiles,
    changed_files,
    check_present,
    digest,
    find_weight_files,
    fingerprint,
    first_floating_dtype,
    only_gguf,
    open_tensors,
)
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.errors import CheckpointNotFoundError, ConfigurationError, DamagedShardError, ShardError
from rabbit_engine.hub import Repo, delete_original, fetch_weights, find_repo
from rabbit_engine.shards import (
    Journal,
    Manifest,
    make_folder,
    read_entries,
    read_journal,
    read_manifest,
    verify_shard,
    write_manifest,
)
from rabbit_engine.splitter import Split, build_for, journal_tensors, only_one_process

logger = logging.getLogger(__name__)

SHARDS_FOLDER = "rabbit_shards"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model ready to stream: its config and class, and the folder its shards lie in."""

    repo: Repo
    config: PretrainedConfig
    cls: type[PreTrainedModel]
    dtype: torch.dtype
    folder: Path
    manifest: Manifest
    gguf_file: str | None = None


def prepare(
    name: str | Path, source: SourceConfig, split: SplitConfig, *, progress: bool = True, repair: bool = False
) -> Prepared:
    """Find or make the split of `name` (a folder, a GGUF file or a repo id).

    `repair` makes shards anew whose size or header is wrong, where an error would name them. Raises CheckpointError and
    ShardError.
    """
    name, source = _gguf_by_path(name, source)
    repo = find_repo(name, source)
    root = shards_root(repo, split.saving_path)
    gguf_file = source.gguf_file or (None if _deleted_dtype(root) else only_gguf(repo.names))
    if gguf_file is not None:
        if split.delete_original:
            raise ConfigurationError(
                f"delete_original: {gguf_file} also holds the config and the tokenizer; delete it yourself if you must"
            )
        fetch_weights(repo, [gguf_file], source)
    config = find_config(repo.folder, gguf_file=gguf_file, trust_remote_code=source.trust_remote_code)
    cls = find_class(config, repo.folder, trust_remote_code=source.trust_remote_code)
    config = config_for(cls, config)
    dtype = split.dtype or _own_dtype(repo, config, gguf_file, source, root)
    folder = root / variant(dtype, gguf_file)
    request = _Request(repo, source, config, cls, dtype, folder, gguf_file, split.delete_original, progress)
    manifest = _usable(request, repair) or _make(request, repair)
    if split.delete_original and _originals(request, manifest):
        manifest = _delete_all(request, manifest)
    return Prepared(repo, config, cls, dtype, folder, manifest, gguf_file)


@dataclass(frozen=True, slots=True)
class _Request:
    repo: Repo
    source: SourceConfig
    config: PretrainedConfig
    cls: type[PreTrainedModel]
    dtype: torch.dtype
    folder: Path
    gguf_file: str | None
    delete_original: bool
    progress: bool


def _gguf_by_path(name: str | Path, source: SourceConfig) -> tuple[str | Path, SourceConfig]:
    """`folder/model.gguf` is the folder, and the file in it."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, replace(source, gguf_file=path.name)
    return name, source


def shards_root(repo: Repo, saving_path: Path | None) -> Path:
    """Where the splits of `repo` lie: below `saving_path`, else beside the checkpoint (in the repo's cache).

    Below `saving_path` each repo at a commit, and each folder on this machine, has a place of its own.
    """
    if saving_path is not None:
        place = digest({"folder": str(repo.folder)})[:8]
        name = f"{repo.name.replace('/', '--')}-{repo.commit[:8]}" if repo.commit else f"{repo.folder.name}-{place}"
        return saving_path.expanduser().resolve() / name
    return repo.folder.parent.parent / SHARDS_FOLDER / repo.commit if repo.commit else repo.folder / SHARDS_FOLDER


def variant(dtype: torch.dtype, gguf_file: str | None = None) -> str:
    """The folder of one split among those of a checkpoint: its dtype, behind the name of a GGUF file."""
    return "-".join(filter(None, [Path(gguf_file).stem if gguf_file else None, str(dtype).removeprefix("torch.")]))


def _deleted_dtype(root: Path) -> torch.dtype | None:
    """The dtype of a split below `root`, finished or not, whose originals are gone: it is what the model is now."""
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        try:
            manifest, journal = read_manifest(folder), read_journal(folder)
        except DamagedShardError:  # said, or mended, where this split is asked for
            continue
        if (manifest and manifest.source["deleted"]) or (journal and journal.deleted):
            return getattr(torch, folder.name, None)
    return None


def _own_dtype(repo: Repo, config: PretrainedConfig, gguf_file: str | None, source: SourceConfig, root: Path) -> torch.dtype:
    """The checkpoint's own dtype as transformers finds it: the config's, else that of its first floating-point tensor."""
    if config.dtype is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    if gguf_file is not None:
        return gguf_dtype(repo.folder / gguf_file)
    deleted = _deleted_dtype(root)
    if deleted is not None:
        return deleted
    files = _weight_files(repo, None)
    fetch_weights(repo, files.names, source)
    check_present(repo.folder, files)
    return first_floating_dtype(open_tensors(repo.folder, files))


def _weight_files(repo: Repo, gguf_file: str | None) -> WeightFiles:
    return find_weight_files(repo.names, repo.read_text, gguf_file, str(repo.folder if repo.commit is None else repo.name))


def _usable(request: _Request, repair: bool) -> Manifest | None:
    """The manifest of a whole split of this very source, or None. Raises DamagedShardError, unless it is to be repaired."""
    try:
        manifest = read_manifest(request.folder)
        if manifest is None or _source_changed(request, manifest):
            return None
        read_entries(request.folder, manifest)
    except DamagedShardError as error:
        if not repair:
            raise
        logger.warning("%s", error)
        return None
    return manifest


def _source_changed(request: _Request, manifest: Manifest) -> bool:
    changed = changed_files(request.repo.folder, manifest.source)
    others = _other_names(request, manifest.source)
    if not changed and not others and manifest.source["commit"] == request.repo.commit:
        return False
    what = ", ".join(changed or others) or f"commit {request.repo.commit}"
    if manifest.source["deleted"]:
        raise ShardError(
            f"{request.folder} was made from another source ({what} differs) whose originals were deleted: "
            "it may be the only copy; give another layer_shards_saving_path, or delete it yourself"
        )
    logger.warning("the source of %s has changed (%s): splitting again", request.folder, what)
    return True


def _other_names(request: _Request, source: Mapping[str, Any]) -> list[str]:
    """Weight files that are here now and were not part of the split; what lies beside deleted originals is no news."""
    if source.get("deleted"):
        return []
    try:
        names = _weight_files(request.repo, request.gguf_file).names
    except CheckpointNotFoundError:  # all originals are gone: the split is what there is
        return []
    known = {row["name"] for row in source["files"]}
    return [name for name in names if name not in known]


def _make(request: _Request, repair: bool) -> Manifest:
    make_folder(request.folder)
    with only_one_process(request.folder):
        manifest = _usable(request, repair)  # another process may have made it meanwhile
        if manifest is not None:
            return manifest
        journal = _usable_journal(request)
        files = _present_files(request, journal)
        split = _open_split(request, files, journal)
        return split.run()


def _usable_journal(request: _Request) -> Journal | None:
    """The journal of an interrupted split of this very source."""
    journal = read_journal(request.folder)
    if journal is None:
        return None
    changed = (
        changed_files(request.repo.folder, journal.source)
        or (not journal.deleted and _other_names(request, journal.source))
        or journal.source["commit"] != request.repo.commit
    )
    if changed and journal.deleted:
        raise ShardError(
            f"{request.folder} is half a split of another source whose originals are deleted: "
            "give another layer_shards_saving_path, or delete it yourself"
        )
    return None if changed else journal


def _present_files(request: _Request, journal: Journal | None) -> WeightFiles:
    files = _weight_files(request.repo, request.gguf_file)
    deleted = journal.deleted if journal else []
    remaining = replace(files, names=tuple(name for name in files.names if name not in deleted))
    fetch_weights(request.repo, remaining.names, request.source)
    check_present(request.repo.folder, remaining)
    return remaining


def _open_split(request: _Request, files: WeightFiles, journal: Journal | None) -> Split:
    folder = request.repo.folder
    tensors, skeleton, conversion = _open(request, files, journal)
    return Split(
        folder=request.folder,
        originals=folder,
        source=journal.source if journal else fingerprint(folder, files, request.repo.commit),
        tensors=tensors,
        skeleton=skeleton,
        conversion=conversion,
        dtype=request.dtype,
        journal=journal,
        delete=(lambda path: delete_original(path, request.repo)) if request.delete_original else None,
        progress=request.progress,
    )


def _open(request: _Request, files: WeightFiles, journal: Journal | None) -> tuple[TensorSource, PreTrainedModel, Conversion]:
    cls, config, dtype = request.cls, request.config, request.dtype
    if files.format == "gguf":
        path = request.repo.folder / files.names[0]
        skeleton = build_for(cls, config, dtype, {})
        conversion = open_gguf_conversion(skeleton, path, dtype)
        named: dict[str, LazyTensor] = {key: GgufTensor(tensor, path) for key, tensor in conversion.tensors.items()}
        return TensorSource(named), skeleton, conversion
    tensors = open_tensors(request.repo.folder, files)
    if journal is not None:
        tensors = replace(tensors, tensors={**tensors.tensors, **journal_tensors(journal, request.repo.folder)})
    skeleton = build_for(cls, config, dtype, _stored_shapes(cls, config, dtype, tensors.tensors))
    return tensors, skeleton, open_conversion(skeleton, tensors.tensors, dtype)


def _stored_shapes(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, tensors: Mapping[str, LazyTensor]
) -> dict[str, tuple[int, ...]]:
    """The model's weight names to stored shapes, for the weights that are stored as they are."""
    targets = open_conversion(build_for(cls, config, dtype, {}), tensors, dtype).targets()
    return {target.name: tuple(tensors[key].shape) for key, target in targets.items() if target and not target.converted}


def _originals(request: _Request, manifest: Manifest) -> list[Path]:
    """The originals that are there and that shards were made from."""
    paths = (request.repo.folder / name for name in manifest.source["used"])
    return [path for path in paths if path.is_file()]


def _delete_all(request: _Request, manifest: Manifest) -> Manifest:
    """The split was there already: verify all of it, say that the originals go, then delete them."""
    with only_one_process(request.folder):
        for record in manifest.shards:
            verify_shard(request.folder, record)
        manifest = replace(manifest, source={**manifest.source, "deleted": True})
        write_manifest(request.folder, manifest)
    for path in _originals(request, manifest):
        delete_original(path, request.repo)
    return manifest
