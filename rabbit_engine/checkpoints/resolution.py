"""Decides where a model's weights come from: its own files, existing shards, or shards that must be made first.

Nothing is written here. Loading executes the resolution, `rabbit plan` prints it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rabbit_engine.architectures import Architecture, Conversion
from rabbit_engine.checkpoints.compression import warn_of_layout
from rabbit_engine.checkpoints.existing import Existing, find_existing, open_remaining
from rabbit_engine.checkpoints.formats import WeightFiles
from rabbit_engine.checkpoints.gguf_entries import map_gguf
from rabbit_engine.checkpoints.hub import Repo
from rabbit_engine.checkpoints.in_place import NotInPlaceError, not_plain, original_entries
from rabbit_engine.checkpoints.only_copies import advice_to_load
from rabbit_engine.checkpoints.packed import as_computed, with_own_linears
from rabbit_engine.checkpoints.reading import WHOLE_FILES, Reading
from rabbit_engine.checkpoints.request import ModelRequest, open_request
from rabbit_engine.checkpoints.shards import Journal, Manifest
from rabbit_engine.checkpoints.skeleton import Build, build_for_entries, build_plain, map_names, require_fit
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.errors import CheckpointNotFoundError, ConfigurationError, MismatchedWeightsError
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Resolved:
    """Properties that all sources share."""

    request: ModelRequest

    @property
    def repo(self) -> Repo:
        """The checkpoint's folder and files."""
        return self.request.repo

    @property
    def architecture(self) -> Architecture:
        """The class and its config."""
        return self.request.architecture

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return self.request.dtype


@dataclass(frozen=True, slots=True)
class InPlace(_Resolved):
    """The original files hold the weights in the model's form.

    `entries` are the stored weights by their names in the model, `ties` the weights that share them; `unused` are stored
    names that have no place in the model, and `download_bytes` the weights in files that are not on this machine.
    """

    entries: Mapping[str, TensorEntry] = field(repr=False)
    ties: Mapping[str, str]
    unused: tuple[str, ...] = ()
    download_bytes: int = 0

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.repo.folder

    @property
    def manifest(self) -> None:
        """None: nothing was split."""
        return

    def __str__(self) -> str:
        download = f", after a download of {format_bytes(self.download_bytes)}" if self.download_bytes else ""
        return f"streamed from the original files{download}"


@dataclass(frozen=True, slots=True)
class Shards(_Resolved):
    """A complete split of the checkpoint exists."""

    manifest: Manifest = field(repr=False)
    entries: Mapping[str, TensorEntry] = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        return self.request.folder

    @property
    def paths(self) -> tuple[Path, ...]:
        """All its files."""
        return tuple(folder / record.file for record in self.manifest.shards for folder in self.request.folders)

    @property
    def ties(self) -> Mapping[str, str]:
        """Weights to the stored ones that they share."""
        return self.manifest.ties

    @property
    def unused(self) -> tuple[str, ...]:
        """Stored names without a place in the model."""
        return self.manifest.unused_weights

    def __str__(self) -> str:
        return f"streamed from the shards in {' and '.join(map(str, self.request.folders))}"


@dataclass(frozen=True, slots=True)
class MustSplit(_Resolved):
    """Shards are made first, because of `reason`; with a `journal` the interrupted split that wrote it is resumed.

    `replaces` is the manifest of an existing split that does not fit the model.
    """

    reason: str
    journal: Journal | None = field(default=None, repr=False)
    replaces: Manifest | None = field(default=None, repr=False)

    @property
    def resumes(self) -> bool:
        """Whether an interrupted split is resumed."""
        return self.journal is not None

    @property
    def folder(self) -> Path:
        """The folder for the shards."""
        return self.request.folder

    def __str__(self) -> str:
        return f"split first, into {' and '.join(map(str, self.request.folders))} ({self.reason})"


Streamable = InPlace | Shards
Source = InPlace | Shards | MustSplit


@dataclass(frozen=True, slots=True)
class Resolution:
    """A source with the model on the meta device and the mapping of the checkpoint's names to it.

    A source that can be streamed has a `model`; one that must be split has both or neither, and `build` makes the model
    for its shards. A resolution from headers is for printing: its tensors cannot be read.
    """

    source: Source
    build: Build = field(repr=False)
    model: PreTrainedModel | None = field(default=None, repr=False)
    conversion: Conversion | None = field(default=None, repr=False)


def resolve(
    name: str | Path,
    source: SourceConfig,
    split: SplitConfig,
    *,
    reading: Reading = WHOLE_FILES,
    build: Build = build_plain,
    repair: bool = False,
) -> Resolution:
    """Decide where the weights of `name` (a folder, a GGUF file or a repo id) come from.

    `repair` ignores a damaged split. Raises ConfigurationError if `split="never"` and shards must be made, CheckpointError
    and ShardError.
    """
    request = open_request(name, source, split, reading)
    if request.split.mode == "never":
        return _without_shards(request, reading, build)
    existing = find_existing(request, repair=repair)
    if existing.problem:
        logger.warning("%s", existing.problem)
    found = _from_shards(request, existing, build, repair)
    if found is not None:
        return found
    if existing.journal is None:
        _require_originals(request)
    return _from_originals(request, existing, reading, build)


def _require_originals(request: ModelRequest) -> None:
    """Raise CheckpointNotFoundError if the original files were deleted after a split with other keywords: it names that."""
    for copy in request.only_copies() if request.lacks_weights() else ():
        compressed = request.split.compression is not None
        dtype, count = str(request.dtype).removeprefix("torch."), len(request.folders)
        keywords = copy.keywords(dtype, compressed=compressed, folders=count)
        if keywords and copy.folder != request.folder:
            raise CheckpointNotFoundError(advice_to_load(copy, request.repo.name, keywords, request.split.saving_path))


def _without_shards(request: ModelRequest, reading: Reading, build: Build) -> Resolution:
    """In place, whether shards exist or not. Raises ConfigurationError if that cannot be."""
    resolution = _from_originals(request, Existing(), reading, build)
    if isinstance(resolution.source, MustSplit):
        raise ConfigurationError(f'split="never", but {request.repo.name} must be split: {resolution.source.reason}')
    return resolution


def _from_shards(request: ModelRequest, existing: Existing, build: Build, repair: bool) -> Resolution | None:
    if existing.manifest is None:
        return None
    shards, model = with_model(Shards(request, existing.manifest, existing.entries), build)
    if repair:
        try:
            require_fit(model, shards.entries, shards.ties)
        except MismatchedWeightsError as error:
            logger.warning("%s", error)
            return None
    return Resolution(shards, build, model)


def with_model(shards: Shards, build: Build) -> tuple[Shards, PreTrainedModel]:
    """The model of some shards, and the shards with the entries that it computes with."""
    warn_of_layout(shards.manifest.source.get("compression"), shards.request.split.compression)
    model = build_for_entries(shards.architecture, shards.dtype, shards.entries, build)
    return replace(shards, entries=as_computed(model, shards.entries, shards.request.split.compression)), model


def _from_originals(request: ModelRequest, existing: Existing, reading: Reading, build: Build) -> Resolution:
    """In place if the files allow it and no split is requested; else the split to make, with the reason."""
    files = request.weight_files()
    begun, problem = _begun(existing), not_plain(files)
    asked = "as asked" if request.asks_for_split else ""
    if problem or ((begun or asked) and not reading.headers_only):  # do not download before the folder is known to be writable
        return Resolution(_must_split(request, existing, begun or problem or asked), build)
    try:
        conversion = _map(request, files, existing, reading, build)
    except NotInPlaceError as error:
        return Resolution(_must_split(request, existing, begun or asked or str(error)), build)
    streamed = conversion if begun or asked else with_own_linears(conversion, request.architecture)
    source: Source
    try:
        source = _in_place(request, streamed, reading)
    except NotInPlaceError as error:
        problem = str(error)
    if begun or problem or asked:
        source = _must_split(request, existing, begun or problem or asked)
        if streamed is not conversion:
            return Resolution(source, build)
    return Resolution(source, build, streamed.skeleton, streamed)


def _map(request: ModelRequest, files: WeightFiles, existing: Existing, reading: Reading, build: Build) -> Conversion:
    """The mapping of the files' names. Raises NotInPlaceError for a GGUF file that only transformers decodes."""
    if files.format == "gguf":
        return map_gguf(request, build)
    tensors = open_remaining(request, files, existing.journal, reading).tensors
    return map_names(request.architecture, request.dtype, tensors, build)


def _begun(existing: Existing) -> str:
    if existing.journal is not None:
        return "an interrupted split is resumed"
    return "an interrupted split of other files is there" if existing.interrupted else ""


def _must_split(request: ModelRequest, existing: Existing, reason: str) -> MustSplit:
    return MustSplit(request, reason, existing.journal, existing.manifest)


def _in_place(request: ModelRequest, conversion: Conversion, reading: Reading) -> InPlace:
    files = request.repo.folder if request.gguf is None else request.gguf.path
    entries, ties = original_entries(conversion, files, reading.equal)
    away = {path for path in {entry.path for entry in entries.values()} if not path.is_file()}
    download_bytes = sum(entry.nbytes for entry in entries.values() if entry.path in away)
    return InPlace(request, entries, ties, tuple(conversion.unused()), download_bytes)
