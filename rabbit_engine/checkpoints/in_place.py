"""Whether a checkpoint's own files hold the weights as the model has them, and where in them each one lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rabbit_engine.architectures import Architecture, Target, open_conversion, require_layers, warn_of_unused
from rabbit_engine.checkpoints.formats import LazyTensor, SafetensorsTensor, WeightFiles
from rabbit_engine.checkpoints.split_plan import settle_ties
from rabbit_engine.checkpoints.splitter import build_for, require_weights
from rabbit_engine.errors import DamagedCheckpointError, MismatchedWeightsError
from rabbit_engine.storage.tensorfiles import TensorEntry, gathered, same_bytes
from rabbit_engine.transformers_bridge.tied_weights import tied_weights

Equal = Callable[[TensorEntry, TensorEntry], bool]


class NotInPlaceError(Exception):
    """Why a checkpoint cannot be streamed from its own files."""


def require_plain(files: WeightFiles) -> None:
    """Raise NotInPlaceError for files that are no safetensors."""
    if files.format != "safetensors":
        raise NotInPlaceError(f"{files.names[0]} is no safetensors file and is converted")


def _equal_in_files(first: TensorEntry, second: TensorEntry) -> bool:
    return same_bytes(first, second, DamagedCheckpointError)


def original_entries(
    architecture: Architecture,
    dtype: torch.dtype,
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    equal: Equal = _equal_in_files,
) -> tuple[dict[str, TensorEntry], Mapping[str, str]]:
    """Where the model's weights lie in its original files, and the ties among them.

    `equal` tells whether two stored tensors that may be tied are. Raises NotInPlaceError with the first weight that would
    have to be converted, cast or reshaped, and MismatchedWeightsError where weights are missing.
    """
    skeleton = build_for(architecture, dtype, stored_shapes(architecture, dtype, tensors))
    conversion = open_conversion(architecture, skeleton, tensors, dtype)
    entries: dict[str, TensorEntry] = {}
    targets = conversion.targets()
    for entry in _stored_entries(targets, tensors):
        problem = conversion.differs(entry.name, entry)
        if problem or entry.name in entries:
            raise NotInPlaceError(f"{entry.name}: {problem or 'two tensors of this name'}")
        entries[entry.name] = entry
    tied = tied_weights(skeleton)
    ties = settle_ties(tied, frozenset(entries), lambda first, second: equal(entries[first], entries[second]))
    kept = {name: entry for name, entry in entries.items() if name not in ties.dropped}
    require_weights(skeleton, kept, ties, folder)
    warn_of_unused(conversion.unused(targets), type(skeleton))
    return kept, ties.shared


def _stored_entries(targets: Mapping[str, Target | None], tensors: Mapping[str, LazyTensor]) -> list[TensorEntry]:
    """Where each weight lies. Raises NotInPlaceError for one that is nowhere as it is."""
    found: list[TensorEntry] = []
    stacks: dict[str, tuple[list[TensorEntry], ...]] = {}
    for key, target in targets.items():
        tensor = tensors[key]
        if target is None or not isinstance(tensor, SafetensorsTensor):
            continue
        if target.stack is not None:
            which, count = target.stack
            stacks.setdefault(target.name, tuple([] for _ in range(count)))[which].append(tensor.entry)
        elif target.converted and not target.slices:
            raise NotInPlaceError(f"{key}: it is converted")
        else:
            found += _slices(tensor.entry, target)
    return found + [_stacked(name, lists) for name, lists in stacks.items()]


def _stacked(name: str, lists: Sequence[Sequence[TensorEntry]]) -> TensorEntry:
    """A stack of the tensors of one list, or of groups of one of each list laid row under row."""
    alike = {(entry.dtype, entry.shape[1:]) for entries in lists for entry in entries}
    rows = [{entry.shape[0] for entry in entries} for entries in lists]
    if len({len(entries) for entries in lists}) > 1 or len(alike) > 1 or any(len(counts) != 1 for counts in rows):
        raise NotInPlaceError(f"{name}: its parts differ in number, dtype or shape")
    parts = [entry for group in zip(*lists, strict=True) for entry in group]
    dtype, beside = alike.pop()
    return gathered(name, dtype, (len(lists[0]), sum(count.pop() for count in rows), *beside), parts)


def _slices(entry: TensorEntry, target: Target) -> list[TensorEntry]:
    """The stored tensor under the weight's name, or the rows of it that are several weights."""
    if not target.slices:
        return [replace(entry, name=target.name)]
    if sum(rows for _, rows in target.slices) != entry.shape[0]:
        wanted = ", ".join(f"{name} {rows}" for name, rows in target.slices)
        raise MismatchedWeightsError(f"{entry.path}: {entry.name} has {entry.shape[0]} rows, config.json says {wanted}")
    parts, first = [], 0
    for name, rows in target.slices:
        parts.append(replace(entry.rows(first, first + rows), name=name))
        first += rows
    return parts


def stored_shapes(
    architecture: Architecture, dtype: torch.dtype, tensors: Mapping[str, LazyTensor]
) -> dict[str, tuple[int, ...]]:
    """The model's weight names to stored shapes, for the weights that are stored as they are."""
    require_layers(architecture.config, tensors)
    targets = open_conversion(architecture, build_for(architecture, dtype, {}), tensors, dtype).targets()
    return {target.name: tuple(tensors[key].shape) for key, target in targets.items() if target and not target.converted}
