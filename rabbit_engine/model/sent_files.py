"""The files of a model that this machine has, for machines that lack it: each loads its own, or fetches these."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from rabbit_engine.checkpoints import (
    HEADERS_ONLY,
    InPlace,
    Repo,
    Resolution,
    Shards,
    Source,
    checked_files,
    execute,
    find_repo,
    resolve,
)
from rabbit_engine.cluster.description import FileRow, sum_of
from rabbit_engine.cluster.files import (
    FileExtent,
    FilesDescription,
    LocalModel,
    ReadChunk,
    chunks_from,
    describe,
    ensure,
    extents_of,
    serve_files,
)
from rabbit_engine.cluster.sending import LateChunks, Sender
from rabbit_engine.errors import CheckpointNotFoundError, HubUnreachableError, MachinesDifferError, RabbitError
from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.settings import LoadSettings

ABSENT = (CheckpointNotFoundError, HubUnreachableError)
"""The errors of a machine that does not have the model."""

Keywords = Mapping[str, Any]
"""Those of `AutoModel.from_pretrained`."""


@dataclass(frozen=True, slots=True)
class SentFiles:
    """The files of a model, what identifies them, and what opens the way by which a machine gets chunks of them. It travels."""

    digest: str
    description: FilesDescription
    extents: tuple[FileExtent, ...]
    opening: Callable[[], ReadChunk]

    def headers(self) -> LocalModel:
        """The model on this machine, without its weights, but with room for them on the disk."""
        return ensure(self.description, (), self.opening(), later=self.extents)

    def whole(self) -> LocalModel:
        """The model on this machine."""
        return ensure(self.description, self.extents, self.opening())


def own_model(model: str, loading: Keywords) -> Resolution | None:
    """The model on this machine; None if its files are not here, or wrong: the machines that load it say so."""
    try:
        commit = None if Path(model).exists() else find_repo(model, settings_for(loading).source).commit
        settings = settings_for(pinned(loading, commit))
        return resolve(model, settings.source, settings.split)
    except RabbitError:
        return None


def send_files(own: Resolution) -> SentFiles:
    """Start what sends this machine's files until this process ends; they are split first if they must be."""
    identity, description, extents = _described(own)
    return SentFiles(identity, description, extents, partial(chunks_from, serve_files(description)))


def keep_files(own: Resolution, sender: Sender) -> SentFiles:
    """The same for machines that may ask after this process has ended. Starts nothing."""
    identity, description, extents = _described(own)
    return SentFiles(identity, description, extents, partial(LateChunks, description, sender))


def find_here(model: str, loading: Keywords, commit: str | None) -> Source | None:
    """The model on this machine, of that commit if it is a repo of the Hub, from headers; None if it is absent."""
    settings = settings_for(pinned(loading, commit))
    try:
        return resolve(model, settings.source, settings.split, reading=HEADERS_ONLY).source
    except ABSENT:
        return None


def located(model: str, loading: Keywords, files: SentFiles) -> tuple[str, Keywords]:
    """What loads the model on this machine: a name, and keywords to give besides. Its own files, or those that are fetched now.

    Raises MachinesDifferError for other files than those of the driver, and as `ensure`.
    """
    commit = files.description.commit
    here = find_here(model, loading, commit)
    if here is None:
        found = files.whole()
        return found.name, found.keywords()
    if digest(here) != files.digest:
        machine, driver = socket.gethostname(), files.description.driver
        if machine == driver:
            raise MachinesDifferError(f"{model} on {machine} has changed since the command was given: give it again")
        raise MachinesDifferError(
            f"{model} on {machine} is not that of {driver}: copy the model anew to one of them, or delete its folder there and "
            "it is fetched"
        )
    return model, {} if commit is None else {"revision": commit, "local_files_only": True}


def pinned(loading: Keywords, commit: str | None) -> dict[str, Any]:
    """The same, for the files that a machine has: of this commit, if the model is a repo of the Hub."""
    revision = {} if commit is None else {"revision": commit}
    return {**loading, **revision, "local_files_only": True}


def settings_for(loading: Keywords) -> LoadSettings:
    """The settings by which a machine loads the model, without a draft."""
    return read_settings({name: value for name, value in loading.items() if name != "speculate"})


def digest(source: Source) -> str:
    """A checksum of the commit, or of the files in a folder: of small ones all bytes, of weights headers and samples."""
    repo = source.repo
    if repo.commit is not None:
        return repo.commit
    found: dict[str, Any] = {name: _sum(repo, name, is_weights=False) for name in checked_files(repo) if name.endswith(".json")}
    if isinstance(source, Shards) and source.manifest.source["deleted"]:
        found |= {row["name"]: row["bytes"] for row in source.manifest.source["files"]}
    else:
        found |= {name: _sum(repo, name, is_weights=True) for name in source.request.weight_files().names}
    return xxhash.xxh3_128_hexdigest(json.dumps(found, sort_keys=True).encode())


def _described(own: Resolution) -> tuple[str, FilesDescription, tuple[FileExtent, ...]]:
    identity = digest(own.source)
    source = own.source if isinstance(own.source, InPlace) else execute(own, progress=False)[0]
    return identity, describe(source), extents_of(source, list(source.entries))


def _sum(repo: Repo, name: str, *, is_weights: bool) -> str:
    path = repo.folder / name
    return sum_of(FileRow("model", name, str(path), 0, "", is_weights), path)
