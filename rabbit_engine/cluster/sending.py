"""The driver's side of a copy: it reads chunks of the files that it described, and after its end its machine does. By Ray."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from rabbit_engine.cluster.connection import require_ray
from rabbit_engine.cluster.description import Area, FilesDescription, row_matches
from rabbit_engine.errors import ClusterError
from rabbit_engine.storage.directio import open_unchanged, read_into, stamp_of

IN_FLIGHT = 4
"""Chunks of a machine that are under way at once."""

_NAMESPACE = "rabbit_engine"


class Chunk(NamedTuple):
    """Bytes of a file, and their checksum where they were read."""

    data: bytes
    xxh3: str


ReadChunk = Callable[[Area, str, int, int], Chunk]
"""`read_chunk(area, name, offset, nbytes)` reads a part of one of the driver's files."""


class DriverFiles:
    """Reads the described files and no others; one that changes is refused from then on. Thread-safe."""

    def __init__(self, description: FilesDescription) -> None:
        self._rows = description.files
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

    def check(self) -> None:
        """Raise ClusterError for a file that is not as described: the machine that described it may have changed it since."""
        for row in self._rows:
            if not row_matches(row, Path(row.path)):
                raise ClusterError(f"{row.path} has changed")


def _stamp(path: Path) -> tuple[int, int]:
    with open_unchanged(path, None) as file:
        return stamp_of(file)


def checksum(data: bytes | bytearray) -> str:
    """The checksum of a chunk."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, slots=True)
class Sender:
    """Who reads described files for machines that may ask late: the actor `name` while it lives, and then another one on the
    same machine, whose Ray id is `node_id`."""

    name: str
    node_id: str


def serve_files(description: FilesDescription, sender: Sender | None = None) -> Any:
    """Start a Ray actor on this machine that reads the described files, and return its handle. It ends with the handle.

    With a `sender` the actor has that name, for others to find.
    """
    ray = require_ray()
    named = {} if sender is None else {"name": sender.name, "namespace": _NAMESPACE}
    return _start(description, ray.get_runtime_context().get_node_id(), **named)


def _start(description: FilesDescription, node_id: str, **named: str) -> Any:
    ray = require_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=IN_FLIGHT)(DriverFiles)
    return actor.options(scheduling_strategy=there, **named).remote(description)


def chunks_from(actor: Any) -> ReadChunk:
    """A function that asks the actor of `serve_files` for chunks."""
    ray = require_ray()

    def read_chunk(area: Area, name: str, offset: int, nbytes: int) -> Chunk:
        return Chunk(*ray.get(actor.read.remote(area, name, offset, nbytes)))

    return read_chunk


class LateChunks:
    """A `ReadChunk` that works as long as the driver's machine is in the cluster. An actor that it starts there ends with it."""

    def __init__(self, description: FilesDescription, sender: Sender) -> None:
        self._description, self._sender = description, sender
        self._actor: Any = None
        self._finding = threading.Lock()

    def __call__(self, area: Area, name: str, offset: int, nbytes: int) -> Chunk:
        """Read a part of a file. Raises ClusterError if the driver's machine is gone, or its files are not those described."""
        ray = require_ray()
        try:
            return Chunk(*ray.get(self._found().read.remote(area, name, offset, nbytes)))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise self._unsent("it left the cluster, or its files are gone" if cause is None else str(cause)) from error

    def _found(self) -> Any:
        """The actor of the driver, if it lives, or one of our own."""
        ray = require_ray()
        with self._finding:
            if self._actor is None:
                try:
                    self._actor = ray.get_actor(self._sender.name, namespace=_NAMESPACE)
                except ValueError:
                    self._actor = _start(self._description, self._sender.node_id)
                    ray.get(self._actor.check.remote())
            return self._actor

    def _unsent(self, why: str) -> ClusterError:
        here, model = socket.gethostname(), self._description
        return ClusterError(
            f"{here} does not have {model.name}, and {model.driver} sends it no more ({why}): put the model at the same place on "
            f"{here}, or give the command again on a machine that has it"
        )
