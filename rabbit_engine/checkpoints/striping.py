"""A split over several folders: each shard is a file in every one of them, and a large tensor lies in them by turns.

So reads of one weight keep all disks busy. Stripes are whole pages, as long as one read. A folder's manifest names its own
files alone and says which of the folders it is: a path is never read from a file, and the folders are those that the caller
names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rabbit_engine.checkpoints.shard_encodings import Weight, flattened, weights_in
from rabbit_engine.checkpoints.shards import (
    MANIFEST_NAME,
    Manifest,
    Stripe,
    checked_header,
    join_entries,
    read_entries,
    read_manifest,
)
from rabbit_engine.errors import DamagedShardError
from rabbit_engine.storage.directio import CHUNK_BYTES, aligned_up
from rabbit_engine.storage.jsonvalues import Fields, counts, parse
from rabbit_engine.storage.tensorfiles import PAD_PREFIX, Header, TensorEntry, gathered

LEAST_BYTES = 256 * 2**10
"""The smallest stripe: less than that is read as fast from one disk."""

_KEY = "stripes"
"""Of a file's metadata: a JSON object, tensor -> its shape, and the bytes of a stripe."""


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The folders of a split in their order, and the manifest of each."""

    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]

    @property
    def manifest(self) -> Manifest:
        """The first folder's; the originals are deleted if any of them says so."""
        first, deleted = self.manifests[0], any(manifest.source["deleted"] for manifest in self.manifests)
        return first if first.source["deleted"] == deleted else replace(first, source={**first.source, "deleted": deleted})

    def entries(self) -> dict[str, TensorEntry]:
        """Every weight, from the files' headers. Raises DamagedShardError."""
        if len(self.folders) == 1:
            return read_entries(self.folders[0], self.manifests[0])
        by_name = [{record.name: record for record in manifest.shards} for manifest in self.manifests]
        advice = self.manifest.advice(self.folders[0])
        found: list[tuple[Path, list[TensorEntry]]] = []
        for name, first in by_name[0].items():
            records = (records[name] for records in by_name)
            headers = [checked_header(*place, advice) for place in zip(self.folders, records, strict=True)]
            try:
                found.append((self.folders[0] / first.file, list(weights_in(_joined(headers)))))
            except ValueError as cause:
                raise DamagedShardError(
                    f"{headers[0].path} does not fit those of the other folders: {cause}; {advice}"
                ) from cause
        return join_entries(found, self.folders[0], self.manifests[0])


def read_set(folders: Sequence[Path]) -> ShardSet | None:
    """The split in these folders, in any order; None if one of them holds no manifest. Raises DamagedShardError."""
    read = ((read_manifest(folder), folder) for folder in folders)
    rows = [(manifest.stripe or Stripe(0, 1), manifest, folder) for manifest, folder in read if manifest is not None]
    found = sorted(rows, key=lambda row: row[0].index)
    if len(found) < len(folders):
        return None
    split = ShardSet(tuple(folder for *_, folder in found), tuple(manifest for _, manifest, _ in found))
    if [stripe for stripe, *_ in found] != [Stripe(index, len(folders)) for index in range(len(folders))]:
        said = ", ".join(f"{folder} is number {stripe.index + 1} of {stripe.count}" for stripe, _, folder in found)
        raise DamagedShardError(f"the folders are not those of one split ({said}): name all of its folders")
    alike = [_common(manifest) for manifest in split.manifests]
    strange = next((folder for folder, common in zip(split.folders, alike, strict=True) if common != alike[0]), None)
    if strange is not None:
        raise DamagedShardError(f"{strange / MANIFEST_NAME} is of another split than {split.folders[0] / MANIFEST_NAME}")
    return split


def _common(manifest: Manifest) -> tuple[object, ...]:
    """What the manifests of one split have in common."""
    source = {**manifest.source, "deleted": None}
    return manifest.dtype, source, dict(manifest.ties), [record.name for record in manifest.shards]


def striped(weights: Mapping[str, Weight], count: int) -> Iterator[tuple[Mapping[str, Weight], dict[str, str]]]:
    """What each of `count` folders stores of a shard, and the metadata that says so."""
    if count == 1:
        yield weights, {}
        return
    tensors, encodings = flattened(weights)
    stripes = {name: _stripe_bytes(tensor, count) for name, tensor in tensors.items()}
    whole = _by_turns({name: tensor.nbytes for name, tensor in tensors.items() if not stripes[name]}, count)
    rows = {name: {"shape": list(tensors[name].shape), "bytes": nbytes} for name, nbytes in stripes.items() if nbytes}
    for index in range(count):
        part = {
            name: _stripes_of(tensor, stripes[name], index, count) if stripes[name] else tensor
            for name, tensor in tensors.items()
            if stripes[name] or whole[name] == index
        }
        yield part, {**encodings, _KEY: json.dumps({"index": index, "count": count, "tensors": rows}, separators=(",", ":"))}


def _stripe_bytes(tensor: torch.Tensor, count: int) -> int:
    """The bytes of a stripe, so that all folders have as many; 0 for a tensor that is stored in one piece."""
    if tensor.nbytes < count * LEAST_BYTES:
        return 0
    turns = -(-tensor.nbytes // (count * CHUNK_BYTES))
    stripe = aligned_up(-(-tensor.nbytes // (count * turns)))
    return stripe if stripe * (count - 1) < tensor.nbytes else 0


def _by_turns(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The folder of each small tensor: the one that has least of them."""
    total, found = [0] * count, {}
    for name, nbytes in sizes.items():
        found[name] = total.index(min(total))
        total[found[name]] += max(1, nbytes)
    return found


def _stripes_of(tensor: torch.Tensor, nbytes: int, index: int, count: int) -> torch.Tensor:
    """The stripes number `index`, `index + count` ... of a tensor, one behind another: [n] in its dtype."""
    return torch.cat(tensor.contiguous().reshape(-1).split(nbytes // tensor.itemsize)[index::count])


def _joined(headers: Sequence[Header]) -> Header:
    """The files of one shard as if they were one. Raises ValueError if they do not fit together."""
    stored = [{entry.name: entry for entry in header.tensors if not entry.name.startswith(PAD_PREFIX)} for header in headers]
    said = [Fields.of(parse(header.metadata.get(_KEY, "{}")), _KEY) for header in headers]
    rows = said[0].fields("tensors")
    for index, fields in enumerate(said):
        if (fields.count("index"), fields.count("count"), fields.take("tensors")) != (index, len(headers), rows.values):
            raise ValueError(f"{headers[index].path} is not its part {index + 1} of {len(headers)}")
    tensors = {name: _gathered(name, rows.fields(name), stored) for name in rows.values}
    for entries in stored:
        for name, entry in entries.items():
            if name not in rows.values and tensors.setdefault(name, entry) is not entry:
                raise ValueError(f"{name} is stored twice")
    return replace(headers[0], tensors=tuple(tensors.values()))


def _gathered(name: str, row: Fields, stored: Sequence[Mapping[str, TensorEntry]]) -> TensorEntry:
    """The entry of a tensor that lies in all files by turns."""
    files = [entries.get(name) for entries in stored]
    shape, nbytes = counts(row.take("shape"), f"{row.where}.shape"), row.count("bytes")
    places: list[TensorEntry] = []
    first, left, number = files[0], 0, 0
    if first is not None and nbytes and nbytes % first.dtype.itemsize == 0:
        left = math.prod(shape) * first.dtype.itemsize
    while left > 0:
        file, offset = files[number % len(files)], number // len(files) * nbytes
        size = min(nbytes, left)
        if file is None or first is None or file.dtype != first.dtype or offset + size > file.nbytes:
            raise ValueError(f"{name} is not stored in all of its files")
        places.append(replace(file, offset=file.offset + offset, nbytes=size, shape=(size // file.dtype.itemsize,)))
        left, number = left - size, number + 1
    if first is None or not places or sum(place.nbytes for place in places) != sum(file.nbytes for file in files if file):
        raise ValueError(f"{name} is not stored in all of its files")
    return gathered(name, first.dtype, shape, places)
