"""Decides whether a checkpoint can be streamed from its own files, and where in them each weight lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rabbit_engine.architectures import Conversion, Target
from rabbit_engine.checkpoints.formats import SafetensorsTensor, WeightFiles
from rabbit_engine.checkpoints.skeleton import require_weights
from rabbit_engine.checkpoints.split_plan import settle_ties
from rabbit_engine.errors import MismatchedWeightsError
from rabbit_engine.quantization import Cast, decoded_entry
from rabbit_engine.storage.tensorfiles import TensorEntry, decoded_as, encoded, gathered
from rabbit_engine.transformers_bridge.tied_weights import tied_weights


class NotInPlaceError(Exception):
    """Why a checkpoint cannot be streamed from its own files."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor, under its stored name, and how it goes into a weight of the model."""

    entry: TensorEntry
    target: Target


def not_plain(files: WeightFiles) -> str:
    """Why these files cannot be streamed in place; empty for safetensors and GGUF."""
    return "" if files.format != "bin" else f"{files.names[0]} is not a safetensors file and is converted"


def original_entries(
    conversion: Conversion, files: Path, equal: Callable[[TensorEntry, TensorEntry], bool]
) -> tuple[dict[str, TensorEntry], Mapping[str, str]]:
    """The locations of the model's weights in its original files, and their ties.

    `equal` compares two stored tensors that may be tied. Raises NotInPlaceError with the first weight that would have to
    be converted, cast or reshaped, and MismatchedWeightsError if weights are missing.
    """
    entries: dict[str, TensorEntry] = {}
    for entry in _all_entries(conversion):
        problem = conversion.differs(entry.name, entry)
        if problem or entry.name in entries:
            raise NotInPlaceError(f"{entry.name}: {problem or 'two tensors of this name'}")
        entries[entry.name] = entry
    tied = tied_weights(conversion.skeleton)
    ties = settle_ties(tied, frozenset(entries), lambda first, second: equal(entries[first], entries[second]))
    kept = {name: entry for name, entry in entries.items() if name not in ties.dropped}
    require_weights(conversion.skeleton, kept, ties, files)
    return kept, ties.shared


def _all_entries(conversion: Conversion) -> Iterator[TensorEntry]:
    for name, parts in _parts_of(conversion).items():
        for entry in weight_entries(name, decoded_parts(parts, conversion.dtype_of(name))):
            yield _cast(entry, conversion.dtype_of(entry.name)) if conversion.quantised else entry


def _cast(entry: TensorEntry, dtype: torch.dtype) -> TensorEntry:
    """The entry, decoded or rounded to `dtype` if it is another floating-point one."""
    if entry.dtype == dtype or not entry.dtype.is_floating_point:
        return entry
    return decoded_as(entry, dtype) if entry.is_encoded else encoded(entry.name, dtype, entry.shape, Cast(), [entry])


def _parts_of(conversion: Conversion) -> dict[str, list[Part]]:
    """The stored tensors that go into each weight of the model."""
    found: dict[str, list[Part]] = {}
    for key, target in conversion.targets.items():
        tensor = conversion.tensors[key]
        if target is not None and isinstance(tensor, SafetensorsTensor):
            found.setdefault(target.name, []).append(Part(tensor.entry, target))
    return found


def weight_entries(name: str, parts: Sequence[Part]) -> list[TensorEntry]:
    """The entries of weight `name` and of weights that are other rows of its `parts`: unchanged, by rows, or stacked.

    Raises NotInPlaceError if the weight cannot be streamed from them.
    """
    stacked = [part for part in parts if part.target.stack is not None]
    found = [_stacked(name, stacked)] if stacked else []
    for part in parts:
        if part.target.slices or not part.target.converted:
            found += _slices(part.entry, part.target)
        elif part.target.stack is None:
            raise NotInPlaceError(f"{part.entry.name}: it is converted")
    return found


def decoded_parts(parts: Sequence[Part], dtype: torch.dtype) -> list[Part]:
    """`parts` with the tensors that are stored for each quantised weight joined to one entry, which decodes to `dtype`.

    Raises NotInPlaceError for an unsupported encoding.
    """
    found = [part for part in parts if part.target.quantised is None]
    weights: dict[tuple[tuple[int, int] | None, str], dict[str, Part]] = {}
    for part in parts:
        if part.target.quantised is not None:
            stored = weights.setdefault((part.target.stack, part.entry.name.rpartition(".")[0]), {})
            if stored.setdefault(part.target.quantised.role, part) is not part:
                raise NotInPlaceError(f"{part.entry.name}: two tensors for the {part.target.quantised.role} of one weight")
    return found + [_decoded(stored, dtype) for stored in weights.values()]


def _decoded(stored: Mapping[str, Part], dtype: torch.dtype) -> Part:
    """One weight of the tensors that are stored for it, by their roles."""
    part = next(iter(stored.values()))
    assert part.target.quantised is not None  # noqa: S101 - the caller has looked
    method, block = part.target.quantised.method, part.target.quantised.block
    entry = decoded_entry(method, part.entry.name, dtype, {role: part.entry for role, part in stored.items()}, block)
    if isinstance(entry, str):
        raise NotInPlaceError(f"{part.entry.name}: {entry}")
    return Part(entry, replace(part.target, quantised=None, converted=part.target.stack is not None))


def _stacked(name: str, parts: Sequence[Part]) -> TensorEntry:
    """The entry of stacked parts: those of one list, or groups of one part per list, concatenated along rows."""
    _, count = parts[0].target.stack or (0, 1)
    lists = [[part.entry for part in parts if part.target.stack == (which, count)] for which in range(count)]
    alike = {(entry.dtype, entry.shape[1:]) for entries in lists for entry in entries}
    rows = [{entry.shape[0] for entry in entries} for entries in lists]
    if len({len(entries) for entries in lists}) > 1 or len(alike) > 1 or any(len(counts) != 1 for counts in rows):
        raise NotInPlaceError(f"{name}: its parts differ in number, dtype or shape")
    entries = [entry for group in zip(*lists, strict=True) for entry in group]
    dtype, rest = alike.pop()
    return gathered(name, dtype, (len(lists[0]), sum(count.pop() for count in rows), *rest), entries)


def _slices(entry: TensorEntry, target: Target) -> list[TensorEntry]:
    """The entry of the stored tensor under the weight's name, or of the row ranges that are several weights."""
    if not target.slices:
        return [replace(entry, name=target.name)]
    if sum(rows for _, rows in target.slices) != entry.shape[0]:
        wanted = ", ".join(f"{name} {rows}" for name, rows in target.slices)
        raise MismatchedWeightsError(f"{entry.path}: {entry.name} has {entry.shape[0]} rows, config.json requires {wanted}")
    parts, first = [], 0
    for name, rows in target.slices:
        parts.append(replace(entry.rows(first, first + rows), name=name))
        first += rows
    return parts
