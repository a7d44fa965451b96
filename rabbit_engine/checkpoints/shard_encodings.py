"""Encoded weights in a shard file: their components are ordinary tensors, and the file's metadata says what they encode."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch

from rabbit_engine.quantization.stored import Compressed, restored
from rabbit_engine.storage.jsonvalues import Fields, parse
from rabbit_engine.storage.tensorfiles import PAD_PREFIX, Header, TensorEntry

_KEY = "encodings"
"""Of the metadata: a JSON object, weight -> what encodes it."""

Weight = torch.Tensor | Compressed


def flattened(weights: Mapping[str, Weight]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file that holds `weights`, and the metadata that describes the encoded ones."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        tensors.update(weight.tensors(name) if isinstance(weight, Compressed) else {name: weight})
    rows = {name: weight.description() for name, weight in weights.items() if isinstance(weight, Compressed)}
    return tensors, {_KEY: json.dumps(rows, separators=(",", ":"))} if rows else {}


def weights_in(header: Header) -> Iterator[TensorEntry]:
    """The entries of the weights that a file holds. Raises ValueError for encodings that do not match its tensors."""
    stored = {entry.name: entry for entry in header.tensors if not entry.name.startswith(PAD_PREFIX)}
    described = Fields.of(parse(header.metadata.get(_KEY, "{}")), _KEY)
    found = [restored(name, described.fields(name), stored) for name in described.values]
    components = {component.name for entry in found for component in entry.components}
    yield from found
    yield from (entry for name, entry in stored.items() if name not in components)
