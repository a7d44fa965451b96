"""From the name of a model to a split that can be streamed: found where it is whole, made where it is not."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures import (
    Architecture,
    Conversion,
    Wishes,
    find_architecture,
    gguf_dtype,
    open_conversion,
    open_gguf_conversion,
    read_given_config,
    require_layers,
    stated_dtype,
    warn_of_unused,
)
from rabbit_engine.checkpoints.formats import (
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
    require_one_gguf,
)
from rabbit_engine.checkpoints.gguf import check_gguf
from rabbit_engine.checkpoints.hub import Repo, delete_original, fetch_weights, find_repo, weights_not_cached
from rabbit_engine.checkpoints.in_place import NotInPlaceError, original_entries, require_plain, stored_shapes
from rabbit_engine.checkpoints.names import read_name
from rabbit_engine.checkpoints.shards import (
    Journal,
    Manifest,
    make_folder,
    read_entries,
    read_journal,
    read_manifest,
    require_no_link,
    verify_shard,
    write_manifest,
)
from rabbit_engine.checkpoints.splitter import Split, build_for, journal_tensors, only_one_process, require_fit
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedShardError,
    HubUnreachableError,
    MismatchedWeightsError,
    ShardError,
)
from rabbit_engine.storage.directio import is_file
from rabbit_engine.storage.tensorfiles import TensorEntry

logger = logging.getLogger(__name__)

SHARDS_FOLDER = "rabbit_shards"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model ready to stream: its config and class, and where its weights lie (`entries`, and `ties` for those they share).

    `folder` holds the files they are read from: shards that `manifest` names, or the original files.
    """

    repo: Repo
    architecture: Architecture
    dtype: torch.dtype
    folder: Path
    entries: Mapping[str, TensorEntry]
    ties: Mapping[str, str]
    manifest: Manifest | None = None
    gguf_file: str | None = None
    source: SourceConfig = field(default_factory=SourceConfig)


def prepare(
    name: str | Path, source: SourceConfig, split: SplitConfig, *, progress: bool = True, repair: bool = False
) -> Prepared:
    """Find or make the split of `name` (a folder, a GGUF file or a repo id).

    `repair` makes shards anew whose size or header is wrong, where an error would name them. Raises CheckpointError and
    ShardError.
    """
    request = open_request(name, source, split, progress=progress)
    return _stream_in_place(request, repair) or _stream_from_shards(request, repair)


OpenTensors = Callable[[Repo, WeightFiles, SourceConfig], TensorSource]
"""How to get at the headers of a checkpoint's weight files."""


def _local_tensors(repo: Repo, files: WeightFiles, source: SourceConfig) -> TensorSource:
    """Fetch the files that are not here yet, and open them."""
    fetch_weights(repo, files.names, source)
    check_present(repo.folder, files)
    return open_tensors(repo.folder, files)


def open_request(
    name: str | Path,
    source: SourceConfig,
    split: SplitConfig,
    *,
    progress: bool = True,
    open_headers: OpenTensors = _local_tensors,
) -> Request:
    """Find the repo, the class and the dtype of `name`. `open_headers` is asked where the config names no dtype."""
    name, source = _resolve_name(name, source)
    repo = find_repo(name, source)
    root = shards_root(repo, split.saving_path)
    gguf_file = source.gguf_file or _only_gguf(repo, root, source)
    if gguf_file is not None:
        _open_gguf(repo, gguf_file, source, split)
    else:
        require_one_gguf(repo.names, str(repo.folder))
    if source.force_download and repo.commit is not None:  # once: what comes later finds the new files
        fetch_weights(repo, weight_files(repo, gguf_file, source).names, source)
        source = replace(source, force_download=False)
    architecture = find_architecture(repo.folder, _wishes(source), gguf_file=gguf_file)
    dtype = split.dtype or _own_dtype(repo, architecture.config, gguf_file, source, root, open_headers)
    folder = root / split_name(dtype, gguf_file, source, repo.names)
    return Request(repo, source, architecture, dtype, folder, gguf_file, split, progress)


def _only_gguf(repo: Repo, root: Path, source: SourceConfig) -> str | None:
    prefix = _split_prefix(None, source, repo.names)
    return None if source.variant is not None or _deleted_dtype(root, prefix) else only_gguf(repo.names)


def _wishes(source: SourceConfig) -> Wishes:
    """What the caller wants of the config and its class; a config that is given by name is read."""
    config = source.config
    if config is not None and not isinstance(config, PretrainedConfig):
        config = read_given_config(_config_place(config, source), source.trust_remote_code)
    return Wishes(
        config=config,
        overrides=source.overrides,
        key_mapping=source.key_mapping,
        code_revision=source.code_revision,
        trust_remote_code=source.trust_remote_code,
    )


def _config_place(name: Any, source: SourceConfig) -> Path:
    """The file or folder of a config that is given by path or repo id."""
    if not isinstance(name, str | PathLike):
        raise ConfigurationError(f"config={name!r} is no config: give a config object, a folder, a file or a repo id")
    path = Path(name).expanduser()
    other = replace(source, config=None, subfolder="", variant=None, gguf_file=None, revision=None)
    return path if path.is_file() else find_repo(str(name), other).folder


def _open_gguf(repo: Repo, gguf_file: str, source: SourceConfig, split: SplitConfig) -> None:
    """Fetch the file and check its header. Raises ConfigurationError and what CheckpointError fits."""
    if split.delete_original:
        raise ConfigurationError(
            f"delete_original: {gguf_file} also holds the config and the tokenizer; delete it yourself if you must"
        )
    if not any(name.lower().endswith(".gguf") for name in repo.names):
        if repo.only_cached:
            raise weights_not_cached(repo)
        raise CheckpointNotFoundError(f"{repo.name} has no GGUF files: leave out gguf_file={gguf_file!r}")
    weight_files(repo, gguf_file, source)
    fetch_weights(repo, [gguf_file], source)
    check_gguf(repo.folder / gguf_file)


def _stream_from_shards(request: Request, repair: bool) -> Prepared:
    """Find or make the split."""
    manifest = usable(request, repair) or _make(request, repair)
    if request.split.delete_original and _originals(request, manifest):
        manifest = _delete_all(request, manifest)
    entries = read_entries(request.folder, manifest)
    warn_of_unused(manifest.unused_weights, request.architecture.cls)
    return _prepared(request, request.folder, entries, manifest.ties, manifest)


def _prepared(
    request: Request,
    folder: Path,
    entries: Mapping[str, TensorEntry],
    ties: Mapping[str, str],
    manifest: Manifest | None = None,
) -> Prepared:
    require_layers(request.architecture.config, entries)
    found = (request.repo, request.architecture, request.dtype, folder)
    return Prepared(*found, entries, ties, manifest, request.gguf_file, request.source)


def loading_info(prepared: Prepared) -> dict[str, Any]:
    """What transformers tells of a load, under its keys: weights that are missing or do not fit are errors here."""
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    repo, architecture, dtype = prepared.repo, prepared.architecture, prepared.dtype
    made_from = {} if prepared.manifest is None else prepared.manifest.source
    if prepared.manifest is not None and ("unused_weights" in made_from or made_from["deleted"]):
        return {**info, "unexpected_keys": set(prepared.manifest.unused_weights)}
    if prepared.gguf_file is not None:
        return info
    tensors = open_tensors(repo.folder, weight_files(repo, None, prepared.source)).tensors
    skeleton = build_for(architecture, dtype, stored_shapes(architecture, dtype, tensors))
    conversion = open_conversion(architecture, skeleton, tensors, dtype)
    return {**info, "unexpected_keys": set(conversion.unused(conversion.targets()))}


def _stream_in_place(request: Request, repair: bool) -> Prepared | None:
    """The original files as they are, where that is wanted and can be. Raises ConfigurationError where it must be and cannot."""
    mode = request.split.mode
    if mode == "always" or request.split.delete_original or request.split.saving_path is not None:
        return None
    if mode == "auto" and (read_journal(request.folder) is not None or usable(request, repair) is not None):
        return None
    try:
        entries, ties = _original_entries(request)
    except NotInPlaceError as reason:
        if mode == "never":
            raise ConfigurationError(f'split="never", but {request.repo.name} must be split: {reason}') from reason
        logger.info("%s cannot be streamed as it is: %s", request.repo.name, reason)
        return None
    logger.info("%s is streamed from its original files", request.repo.name)
    return _prepared(request, request.repo.folder, entries, ties)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, found: the model's repo, class and dtype, and the folder that its split lies in or would."""

    repo: Repo
    source: SourceConfig
    architecture: Architecture
    dtype: torch.dtype
    folder: Path
    gguf_file: str | None
    split: SplitConfig
    progress: bool


def _resolve_name(name: str | Path, source: SourceConfig) -> tuple[str, SourceConfig]:
    """A repo id or a folder, and `source` with what the name says of the part. Raises ConfigurationError where they disagree."""
    address = read_name(name)
    said = {key: value for key, value in asdict(address).items() if key != "name" and value is not None}
    for key, value in said.items():
        asked = getattr(source, key)
        if asked not in (None, "", value):
            raise ConfigurationError(f"{name} says {key}={value!r}, and {key}={asked!r} is given: leave out one of them")
    return address.name, replace(source, **said)


def shards_root(repo: Repo, saving_path: Path | None) -> Path:
    """Where the splits of `repo` lie: below `saving_path`, else beside the checkpoint (in the repo's cache).

    Below `saving_path` each repo at a commit, and each folder on this machine, has a place of its own.
    """
    part = f"--{repo.subfolder.replace('/', '--')}" if repo.subfolder else ""
    if saving_path is not None:
        place = digest({"folder": str(repo.folder)})[:8]
        name = f"{repo.name.replace('/', '--')}-{repo.commit[:8]}{part}" if repo.commit else f"{repo.folder.name}-{place}"
        return saving_path.expanduser().resolve() / name
    return repo.cache / SHARDS_FOLDER / f"{repo.commit}{part}" if repo.commit else repo.folder / SHARDS_FOLDER


def split_name(dtype: torch.dtype, gguf_file: str | None, source: SourceConfig, names: Sequence[str]) -> str:
    """The folder of one split among those of a checkpoint: its dtype, behind what tells the files it was made from."""
    return _split_prefix(gguf_file, source, names) + str(dtype).removeprefix("torch.")


def _split_prefix(gguf_file: str | None, source: SourceConfig, names: Sequence[str]) -> str:
    if gguf_file is not None:
        return f"{Path(gguf_file).stem}-"
    pickled = source.use_safetensors is False and any(name.endswith(".safetensors") for name in names)
    variant = [] if source.variant is None else [f"variant.{source.variant}"]
    return "".join(f"{part}-" for part in (*variant, *(["pickles"] if pickled else [])))


def _deleted_dtype(root: Path, prefix: str) -> torch.dtype | None:
    """The dtype of a split below `root`, finished or not, whose originals are gone: it is what the model is now."""
    for folder in sorted(path for path in root.glob(f"{glob.escape(prefix)}*") if path.is_dir()):
        try:
            manifest, journal = read_manifest(folder), read_journal(folder)
        except DamagedShardError:  # said, or mended, where this split is asked for
            continue
        if (manifest and manifest.source["deleted"]) or (journal and journal.deleted):
            return getattr(torch, folder.name.removeprefix(prefix), None)
    return None


def _own_dtype(
    repo: Repo,
    config: PretrainedConfig,
    gguf_file: str | None,
    source: SourceConfig,
    root: Path,
    open_headers: OpenTensors,
) -> torch.dtype:
    """The checkpoint's own dtype as transformers finds it: the config's, else that of its first floating-point tensor."""
    said = stated_dtype(config)
    if said is not None:
        return said
    if gguf_file is not None:
        return gguf_dtype(repo.folder / gguf_file)
    deleted = _deleted_dtype(root, _split_prefix(None, source, repo.names))
    if deleted is not None:
        return deleted
    files = weight_files(repo, None, source)
    found = first_floating_dtype(open_headers(repo, files, source), files, repo.folder)
    if not found.is_floating_point or found.itemsize == 1:
        raise ConfigurationError(f"{repo.name}: the config names no dtype, and its first weights are {found}: say dtype=")
    return found


def weight_files(repo: Repo, gguf_file: str | None, source: SourceConfig) -> WeightFiles:
    """The weight files of a repo that `source` asks for.

    Raises CheckpointNotFoundError, or HubUnreachableError where only the cache was looked at.
    """
    where = str(repo.folder) if repo.commit is None else "/".join(filter(None, (repo.name, repo.subfolder)))
    try:
        return find_weight_files(
            repo.names, repo.read_text, gguf_file, where, variant=source.variant, use_safetensors=source.use_safetensors
        )
    except CheckpointNotFoundError as error:
        if (
            repo.only_cached
            and gguf_file is None
            and not any(name.endswith((".gguf", "adapter_config.json")) for name in repo.names)
        ):
            raise weights_not_cached(repo) from error
        raise


def usable(request: Request, repair: bool) -> Manifest | None:
    """The manifest of a whole split of this very source, or None. Raises DamagedShardError, unless it is to be repaired."""
    try:
        manifest = read_manifest(request.folder)
        if manifest is None or _source_changed(request, manifest):
            return None
        entries = read_entries(request.folder, manifest)
        if repair:
            require_fit(_skeleton(request, entries), entries, manifest.ties)
    except (DamagedShardError, MismatchedWeightsError) as error:
        if not repair:
            raise
        logger.warning("%s", error)
        return None
    return manifest


def _skeleton(request: Request, entries: Mapping[str, TensorEntry]) -> PreTrainedModel:
    return build_for(request.architecture, request.dtype, {name: entry.shape for name, entry in entries.items()})


def _source_changed(request: Request, manifest: Manifest) -> bool:
    changed = changed_files(request.repo.folder, manifest.source)
    others = _other_names(request, manifest.source)
    converted_so = manifest.source.get("conversion") == _conversion(request)
    if not changed and not others and converted_so and manifest.source["commit"] == request.repo.commit:
        return False
    what = ", ".join(changed or others) or (f"commit {request.repo.commit}" if converted_so else "how it is converted")
    if manifest.source["deleted"]:
        raise ShardError(
            f"{request.folder} was made from another source ({what} differs) whose originals were deleted: "
            "it may be the only copy; give another layer_shards_saving_path, or delete it yourself"
        )
    logger.warning("the source of %s has changed (%s): splitting again", request.folder, what)
    return True


def _other_names(request: Request, source: Mapping[str, Any]) -> list[str]:
    """Weight files that are here now and were not part of the split; what lies beside deleted originals is no news."""
    if source.get("deleted"):
        return []
    try:
        names = weight_files(request.repo, request.gguf_file, request.source).names
    except (CheckpointNotFoundError, HubUnreachableError):  # all originals are gone: the split is what there is
        return []
    known = {row["name"] for row in source["files"]}
    return [name for name in names if name not in known]


def _make(request: Request, repair: bool) -> Manifest:
    make_folder(request.folder)
    with only_one_process(request.folder):
        manifest = usable(request, repair)  # another process may have made it meanwhile
        if manifest is not None:
            return manifest
        journal = _usable_journal(request)
        files = _present_files(request, journal)
        logger.info("converting %s once, into %s", request.repo.name, request.folder)
        split = _open_split(request, files, journal)
        return split.run()


def _original_entries(request: Request) -> tuple[dict[str, TensorEntry], Mapping[str, str]]:
    """Where the model's weights lie in the original files, and the ties. Raises NotInPlaceError, MismatchedWeightsError."""
    files = weight_files(request.repo, request.gguf_file, request.source)
    require_plain(files)
    tensors = _local_tensors(request.repo, files, request.source)
    return original_entries(request.architecture, request.dtype, tensors.tensors, request.repo.folder)


def _usable_journal(request: Request) -> Journal | None:
    """The journal of an interrupted split of this very source."""
    journal = read_journal(request.folder)
    if journal is None:
        return None
    changed = (
        changed_files(request.repo.folder, journal.source)
        or (not journal.deleted and _other_names(request, journal.source))
        or journal.source["commit"] != request.repo.commit
        or journal.source.get("conversion") != _conversion(request)
    )
    if changed and journal.deleted:
        raise ShardError(
            f"{request.folder} is half a split of another source whose originals are deleted: "
            "give another layer_shards_saving_path, or delete it yourself"
        )
    return None if changed else journal


def _present_files(request: Request, journal: Journal | None) -> WeightFiles:
    files = weight_files(request.repo, request.gguf_file, request.source)
    deleted = journal.deleted if journal else []
    remaining = replace(files, names=tuple(name for name in files.names if name not in deleted))
    fetch_weights(request.repo, remaining.names, request.source)
    check_present(request.repo.folder, remaining)
    return remaining


def _open_split(request: Request, files: WeightFiles, journal: Journal | None) -> Split:
    folder = request.repo.folder
    tensors, skeleton, conversion = _open(request, files, journal)
    return Split(
        folder=request.folder,
        originals=folder,
        source=journal.source if journal else _fingerprint(request, files),
        tensors=tensors,
        skeleton=skeleton,
        conversion=conversion,
        dtype=request.dtype,
        journal=journal,
        delete=(lambda path: delete_original(path, request.repo)) if request.split.delete_original else None,
        progress=request.progress,
    )


def _fingerprint(request: Request, files: WeightFiles) -> dict[str, Any]:
    """The source's fingerprint, with the conversion that makes shards of it where there is one."""
    found = fingerprint(request.repo.folder, files, request.repo.commit)
    conversion = _conversion(request)
    return found if conversion is None else {**found, "conversion": conversion}


def _conversion(request: Request) -> str | None:
    conversion = request.architecture.conversion()
    return None if conversion is None else digest({"conversion": conversion})


def _open(request: Request, files: WeightFiles, journal: Journal | None) -> tuple[TensorSource, PreTrainedModel, Conversion]:
    architecture, dtype = request.architecture, request.dtype
    if files.format == "gguf":
        path = request.repo.folder / files.names[0]
        skeleton = build_for(architecture, dtype, {})
        conversion = open_gguf_conversion(skeleton, path, dtype)
        named: dict[str, LazyTensor] = {key: GgufTensor(tensor, path) for key, tensor in conversion.tensors.items()}
        return TensorSource(named), skeleton, conversion
    tensors = open_tensors(request.repo.folder, files)
    if journal is not None:
        tensors = replace(tensors, tensors={**tensors.tensors, **journal_tensors(journal, request.repo.folder)})
    skeleton = build_for(architecture, dtype, stored_shapes(architecture, dtype, tensors.tensors))
    return tensors, skeleton, open_conversion(architecture, skeleton, tensors.tensors, dtype)


def _originals(request: Request, manifest: Manifest) -> list[Path]:
    """The originals that are there and that shards were made from."""
    paths = (request.repo.folder / name for name in manifest.source["used"])
    return [path for path in paths if is_file(path)]


def _delete_all(request: Request, manifest: Manifest) -> Manifest:
    """The split was there already: verify all of it, say that the originals go, then delete them."""
    require_no_link(request.folder)
    with only_one_process(request.folder):
        for record in manifest.shards:
            verify_shard(request.folder, record)
        manifest = replace(manifest, source={**manifest.source, "deleted": True})
        write_manifest(request.folder, manifest)
    for path in _originals(request, manifest):
        delete_original(path, request.repo)
    return manifest
