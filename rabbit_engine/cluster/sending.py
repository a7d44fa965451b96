"""The driver's side of a copy: it reads chunks of the files that it described. Ray carries them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from rabbit_engine.cluster.connection import require_ray
from rabbit_engine.cluster.description import Area, FilesDescription
from rabbit_engine.errors import ClusterError
from rabbit_engine.storage.directio import open_unchanged, read_into, stamp_of

IN_FLIGHT = 4
"""Chunks of a machine that are under way at once."""


class Chunk(NamedTuple):
    """Bytes of a file, and their checksum where they were read."""

    data: bytes
    xxh3: str


ReadChunk = Callable[[Area, str, int, int], Chunk]
"""`read_chunk(area, name, offset, nbytes)` reads a part of one of the driver's files."""


class DriverFiles:
    """Reads the described files and no others; one that changes is refused from then on. Thread-safe."""

    def __init__(self, description: FilesDescription) -> None:
        self._files = {(row.area, row.name): (Path(row.path), _stamp(Path(row.path))) for row in description.files}

    def read(self, area: Area, name: str, offset: int, nbytes: int) -> Chunk:
        """Read `nbytes` at `offset`. Raises ClusterError for another file, DamagedFileError for one that has changed."""
        if (area, name) not in self._files:
            raise ClusterError(f"{name!r} is not among the model's files: machines with one version of this library never ask")
        path, stamp = self._files[area, name]
        data = bytearray(nbytes)
        with open_unchanged(path, stamp) as file:
            file.seek(offset)
            read_into(file, memoryview(data), path)
        return Chunk(bytes(data), checksum(data))


def _stamp(path: Path) -> tuple[int, int]:
    with open_unchanged(path, None) as file:
        return stamp_of(file)


def checksum(data: bytes | bytearray) -> str:
    """The checksum of a chunk."""
    return xxhash.xxh3_128_hexdigest(data)


def serve_files(description: FilesDescription) -> Any:
    """Start a Ray actor on this machine that reads the described files, and return its handle. It ends with the handle."""
    ray = require_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=IN_FLIGHT)(DriverFiles)
    return actor.options(scheduling_strategy=here).remote(description)


def chunks_from(actor: Any) -> ReadChunk:
    """A function that asks the actor of `serve_files` for chunks."""
    ray = require_ray()

    def read_chunk(area: Area, name: str, offset: int, nbytes: int) -> Chunk:
        return Chunk(*ray.get(actor.read.remote(area, name, offset, nbytes)))

    return read_chunk
