"""Turns the name of a model into a request: its repo, class, dtype, and the folder for its split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from transformers import PretrainedConfig

from rabbit_engine.architectures import (
    Architecture,
    ConfigOverrides,
    find_architecture,
    gguf_dtype,
    read_given_config,
    stated_dtype,
)
from rabbit_engine.checkpoints.formats import (
    WeightFiles,
    digest,
    find_weight_files,
    first_floating_dtype,
    only_gguf,
    require_one_gguf,
)
from rabbit_engine.checkpoints.gguf import GgufHeader, read_gguf_header
from rabbit_engine.checkpoints.hub import Repo, fetch_weights, find_repo, weights_not_cached
from rabbit_engine.checkpoints.only_copies import OnlyCopy, find_only_copies
from rabbit_engine.checkpoints.reading import WHOLE_FILES, Reading
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig
from rabbit_engine.errors import CheckpointNotFoundError, CompressionUnavailableError, ConfigurationError, HubUnreachableError
from rabbit_engine.storage.directio import is_file
from rabbit_engine.transformers_bridge.quantizers import method_of
from rabbit_engine.utils.names import read_name

logger = logging.getLogger(__name__)

SHARDS_FOLDER = "rabbit_shards"


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A located model: its repo, class and dtype, and the folder for its split, which may not exist yet.

    `source` also has what the name selected, and the only GGUF file of the repo; `gguf` is that file's header.
    """

    repo: Repo
    source: SourceConfig = field(repr=False)
    architecture: Architecture = field(repr=False)
    dtype: torch.dtype
    folder: Path
    split: SplitConfig
    gguf: GgufHeader | None = field(default=None, repr=False)
    more_folders: tuple[Path, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders of its split: it is spread over them."""
        return self.folder, *self.more_folders

    @property
    def asks_for_split(self) -> bool:
        """Whether shards are requested even if the original files could be streamed."""
        split = self.split
        return split.mode == "always" or split.delete_original or split.saving_path is not None or split.compression is not None

    def only_copies(self) -> list[OnlyCopy]:
        """The splits of this model whose originals are deleted."""
        return list(find_only_copies(self.folder.parent, _split_prefix(self.source, self.repo.names)))

    def lacks_weights(self) -> bool:
        """Whether any original weight file is neither on this machine nor to be downloaded."""
        if self.repo.commit is not None and not self.repo.only_cached:
            return False
        try:
            return not all(is_file(self.repo.folder / name) for name in self.weight_files().names)
        except (CheckpointNotFoundError, HubUnreachableError):
            return True

    def weight_files(self) -> WeightFiles:
        """The weight files to load. Raises the errors of the function `weight_files`."""
        return weight_files(self.repo, self.source)


def open_request(name: str | Path, source: SourceConfig, split: SplitConfig, reading: Reading = WHOLE_FILES) -> ModelRequest:
    """Find the repo, the class and the dtype of `name`; weight files are read only if the config names no dtype."""
    name, source = _resolve_name(name, source)
    repo = find_repo(name, source)
    root = shards_root(repo, split.saving_path)
    source = replace(source, gguf_file=source.gguf_file or _only_gguf(repo, root, source))
    gguf = None if source.gguf_file is None else _open_gguf(repo, source.gguf_file, source, split)
    if gguf is None:
        require_one_gguf(repo.names, str(repo.folder))
    if source.force_download and repo.commit is not None:  # once: what comes later finds the new files
        if gguf is None:
            fetch_weights(repo, weight_files(repo, source).names, source)
        source = replace(source, force_download=False)
    architecture = find_architecture(repo.folder, _config_overrides(source), gguf=None if gguf is None else gguf.config)
    split = _allowed(split, architecture, repo)
    dtype = split.dtype or _own_dtype(repo, architecture.config, source, root, reading)
    name = split_name(dtype, source, repo.names, split.compression, len(split.saving_paths))
    more = tuple(shards_root(repo, path) / name for path in split.more_paths)
    return ModelRequest(repo, source, architecture, dtype, root / name, split, gguf, more)


def _allowed(split: SplitConfig, architecture: Architecture, repo: Repo) -> SplitConfig:
    """The split, as transformers treats a BitsAndBytesConfig for a quantised checkpoint: that of bitsandbytes keeps its own.

    Raises CompressionUnavailableError for another quantiser's.
    """
    if architecture.quantization is None or split.compression is None or split.compression.bitsandbytes is None:
        return split
    method = method_of(architecture.quantization)
    if method != "bitsandbytes":
        raise CompressionUnavailableError(
            f'{repo.name} is quantised with {method} already: leave out quantization_config, or pass compression="4bit"'
        )
    logger.warning("%s is quantised with bitsandbytes already: its own quantization_config is used", repo.name)
    return replace(split, compression=None)


def _only_gguf(repo: Repo, root: Path, source: SourceConfig) -> str | None:
    prefix = _split_prefix(source, repo.names)
    return None if source.variant is not None or _deleted_dtype(root, prefix) else only_gguf(repo.names)


def _config_overrides(source: SourceConfig) -> ConfigOverrides:
    """The caller's changes to the config; a config given by name is read."""
    config = source.config
    if config is not None and not isinstance(config, PretrainedConfig):
        config = read_given_config(_config_place(config, source), source.trust_remote_code)
    return ConfigOverrides(
        config=config,
        overrides=source.overrides,
        key_mapping=source.key_mapping,
        code_revision=source.code_revision,
        trust_remote_code=source.trust_remote_code,
        auto=source.auto,
    )


def _config_place(name: object, source: SourceConfig) -> Path:
    """The file or folder of a config given by path or repo id."""
    if not isinstance(name, str | PathLike):
        raise ConfigurationError(f"config={name!r} is not a config: pass a config object, a folder, a file or a repo id")
    path = Path(name).expanduser()
    other = replace(source, config=None, subfolder="", variant=None, gguf_file=None, revision=None)
    return path if path.is_file() else find_repo(str(name), other).folder


def _open_gguf(repo: Repo, gguf_file: str, source: SourceConfig, split: SplitConfig) -> GgufHeader:
    """Fetch the file, and read and check its header. Raises ConfigurationError and CheckpointError."""
    if split.delete_original:
        raise ConfigurationError(
            f"delete_original: {gguf_file} also holds the config and the tokenizer; delete it yourself if you must"
        )
    if not any(name.lower().endswith(".gguf") for name in repo.names):
        if repo.only_cached:
            raise weights_not_cached(repo)
        raise CheckpointNotFoundError(f"{repo.name} has no GGUF files: leave out gguf_file={gguf_file!r}")
    weight_files(repo, source)
    fetch_weights(repo, [gguf_file], source)
    return read_gguf_header(repo.folder / gguf_file)


def _resolve_name(name: str | Path, source: SourceConfig) -> tuple[str, SourceConfig]:
    """A repo id or a folder, and `source` with the part that the name selects. Raises ConfigurationError if they disagree."""
    address = read_name(name)
    said = {key: value for key, value in asdict(address).items() if key != "name" and value is not None}
    for key, value in said.items():
        asked = getattr(source, key)
        if asked not in (None, "", value):
            raise ConfigurationError(f"{name} selects {key}={value!r}, but {key}={asked!r} is given: leave out one of them")
    return address.name, replace(source, **said)


def shards_root(repo: Repo, saving_path: Path | None) -> Path:
    """The folder of the splits of `repo`: below `saving_path`, else next to the checkpoint (in the repo's cache).

    Below `saving_path`, each commit of a repo and each local folder has its own subfolder.
    """
    part = f"--{repo.subfolder.replace('/', '--')}" if repo.subfolder else ""
    if saving_path is not None:
        place = digest({"folder": str(repo.folder)})[:8]
        name = f"{repo.name.replace('/', '--')}-{repo.commit[:8]}{part}" if repo.commit else f"{repo.folder.name}-{place}"
        return saving_path.expanduser().resolve() / name
    return repo.cache / SHARDS_FOLDER / f"{repo.commit}{part}" if repo.commit else repo.folder / SHARDS_FOLDER


def split_name(
    dtype: torch.dtype,
    source: SourceConfig,
    names: Sequence[str],
    compression: CompressionConfig | None = None,
    folders: int = 1,
) -> str:
    """The folder name of one of a checkpoint's splits: it identifies the original files, the dtype, the compression, and over
    how many folders it is spread."""
    end = "" if compression is None else f"-{_compression_name(compression)}"
    end += f"-over{folders}" if folders > 1 else ""
    return _split_prefix(source, names) + str(dtype).removeprefix("torch.") + end


def _compression_name(compression: CompressionConfig) -> str:
    made = compression.bitsandbytes
    if made is None:
        return compression.method
    skip = "" if made.skip is None else f"-{digest({'skip': sorted(made.skip)})[:8]}"
    return f"{compression.method}-{made.kind}{'-nested' if made.nested else ''}{skip}"


def _split_prefix(source: SourceConfig, names: Sequence[str]) -> str:
    if source.gguf_file:
        return f"{Path(source.gguf_file).stem}-"
    pickled = source.use_safetensors is False and any(name.endswith(".safetensors") for name in names)
    variant = [] if source.variant is None else [f"variant.{source.variant}"]
    return "".join(f"{part}-" for part in (*variant, *(["pickles"] if pickled else [])))


def _deleted_dtype(root: Path, prefix: str) -> torch.dtype | None:
    """The dtype of a split below `root`, finished or not, whose originals are deleted: only this dtype is left."""
    found = next(find_only_copies(root, prefix), None)
    return None if found is None else getattr(torch, found.dtype, None)


def _own_dtype(repo: Repo, config: PretrainedConfig, source: SourceConfig, root: Path, reading: Reading) -> torch.dtype:
    """The checkpoint's own dtype, as transformers determines it: the config's, else that of the first floating-point tensor."""
    said = stated_dtype(config)
    if said is not None:
        return said
    if source.gguf_file is not None:
        return gguf_dtype(repo.folder / source.gguf_file)
    deleted = _deleted_dtype(root, _split_prefix(source, repo.names))
    if deleted is not None:
        return deleted
    files = weight_files(repo, source)
    found = first_floating_dtype(reading.open(repo, files, source), files, repo.folder)
    if not found.is_floating_point or found.itemsize == 1:
        raise ConfigurationError(f"{repo.name}: the config names no dtype, and its first weights are {found}: pass dtype=")
    return found


def weight_files(repo: Repo, source: SourceConfig) -> WeightFiles:
    """The weight files of a repo that `source` selects.

    Raises CheckpointNotFoundError, or HubUnreachableError if only the cache was searched.
    """
    where = str(repo.folder) if repo.commit is None else "/".join(filter(None, (repo.name, repo.subfolder)))
    try:
        return find_weight_files(
            repo.names, repo.read_text, source.gguf_file, where, variant=source.variant, use_safetensors=source.use_safetensors
        )
    except CheckpointNotFoundError as error:
        if (
            repo.only_cached
            and source.gguf_file is None
            and not any(name.endswith((".gguf", "adapter_config.json")) for name in repo.names)
        ):
            raise weights_not_cached(repo) from error
        raise
