"""The model's files for machines that lack them: those of the driver, if it has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import xxhash

from rabbit_engine.batches.cluster.order import Order
from rabbit_engine.checkpoints import HEADERS_ONLY, Repo, Resolution, Shards, Source, checked_files, execute, find_repo, resolve
from rabbit_engine.cluster.description import FileRow, sum_of
from rabbit_engine.cluster.files import (
    FileExtent,
    FilesDescription,
    LocalModel,
    chunks_from,
    describe,
    ensure,
    extents_of,
    serve_files,
)
from rabbit_engine.errors import CheckpointNotFoundError, HubUnreachableError, RabbitError
from rabbit_engine.model import read_settings
from rabbit_engine.model.settings import LoadSettings

ABSENT = (CheckpointNotFoundError.__name__, HubUnreachableError.__name__)
"""The errors of a machine that does not have the model."""


@dataclass(frozen=True, slots=True)
class SentFiles:
    """The files of a model, what identifies them, and the actor on the driver's machine that reads them."""

    digest: str
    description: FilesDescription
    extents: tuple[FileExtent, ...]
    actor: Any

    def headers(self) -> LocalModel:
        """The model on this machine, without its weights, but with room for them on the disk."""
        return ensure(self.description, (), chunks_from(self.actor), later=self.extents)

    def whole(self) -> LocalModel:
        """The model on this machine."""
        return ensure(self.description, self.extents, chunks_from(self.actor))


def own_model(ray: ModuleType, order: Order) -> Resolution | None:
    """The model on the driver's machine; None if its files are not there, or if the driver is no machine of the cluster."""
    if ray.util.client.ray.is_connected():
        return None
    try:
        repo = find_repo(order.model, settings_of(order).source)
        settings = settings_of(order.pinned(repo.commit))
        return resolve(order.model, settings.source, settings.split)
    except RabbitError:  # the machines say what is wrong
        return None


def send_files(own: Resolution) -> SentFiles:
    """Start what sends the driver's files, which are split first if they must be."""
    identity = digest(own.source)
    source, _ = execute(own, progress=False)
    description = describe(source)
    return SentFiles(identity, description, extents_of(source, list(source.entries)), serve_files(description))


def located(order: Order, files: SentFiles | None) -> tuple[str, Mapping[str, Any]]:
    """What loads the model on this machine: a name and keywords. Its own files, or those that are fetched now."""
    if files is None or _is_here(order.pinned(files.description.commit)):
        return order.model, order.loading
    found = files.whole()
    return found.name, {**order.loading, **found.keywords()}


def settings_of(order: Order) -> LoadSettings:
    """The settings by which a worker loads the model, without a draft."""
    return read_settings({name: value for name, value in order.loading.items() if name != "speculate"})


def _is_here(order: Order) -> bool:
    settings = settings_of(order)
    try:
        resolve(order.model, settings.source, settings.split, reading=HEADERS_ONLY)
    except (CheckpointNotFoundError, HubUnreachableError):
        return False
    return True


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


def _sum(repo: Repo, name: str, *, is_weights: bool) -> str:
    path = repo.folder / name
    return sum_of(FileRow("model", name, str(path), 0, "", is_weights), path)
