"""What a machine says of itself before it gets a worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from rabbit_engine.batches.cluster.order import Failure, Order
from rabbit_engine.checkpoints import HEADERS_ONLY, Shards, Source, resolve
from rabbit_engine.checkpoints.formats import fingerprint
from rabbit_engine.cluster import require_ray
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
    """A checksum of names, sizes, headers and the commit: what does not depend on when files were copied."""
    return xxhash.xxh3_128_hexdigest(json.dumps(_files(source), sort_keys=True, default=str).encode())


def _files(source: Source) -> Mapping[str, Any]:
    if source.repo.commit is not None:
        return {"commit": source.repo.commit}
    if isinstance(source, Shards) and source.manifest.source["deleted"]:
        rows = source.manifest.source["files"]
    else:
        rows = fingerprint(source.repo.folder, source.request.weight_files(), None)["files"]
    return {"files": [{name: value for name, value in row.items() if name != "mtime_ns"} for row in rows]}
