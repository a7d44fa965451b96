"""What a machine says of itself before it gets a worker."""

from __future__ import annotations

import json
from typing import Any

import xxhash

from rabbit_engine.batches.cluster.order import Failure, Order
from rabbit_engine.checkpoints import HEADERS_ONLY, Repo, Shards, Source, checked_files, resolve
from rabbit_engine.cluster import require_ray
from rabbit_engine.cluster.description import FileRow, sum_of
from rabbit_engine.model import read_settings
from rabbit_engine.planning.forecast import forecast


def probe(order: Order) -> str | Failure:
    """What identifies the model's files on this machine, or why it cannot run the model."""
    try:
        settings = read_settings({name: value for name, value in order.loading.items() if name != "speculate"})
        forecast(order.model, settings.source, settings.split, settings.stream)
        return _digest(resolve(order.model, settings.source, settings.split, reading=HEADERS_ONLY).source)
    except Exception as error:  # noqa: BLE001 - the driver says it
        return Failure(type(error).__name__, str(error), require_ray().util.get_node_ip_address())


def _digest(source: Source) -> str:
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
