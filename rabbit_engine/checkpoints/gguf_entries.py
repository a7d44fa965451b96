"""Where in a GGUF file each weight of a model lies, as transformers' reader would make it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rabbit_engine.architectures import Conversion, gguf_sources, open_conversion, open_gguf
from rabbit_engine.checkpoints.formats import SafetensorsTensor
from rabbit_engine.checkpoints.gguf import GgufHeader, StoredTensor
from rabbit_engine.checkpoints.in_place import NotInPlaceError
from rabbit_engine.checkpoints.request import ModelRequest
from rabbit_engine.checkpoints.skeleton import Build
from rabbit_engine.quantization import Cast
from rabbit_engine.quantization.gguf import (
    PLAIN,
    ArrangedColumns,
    ComputedValues,
    GgufBlocks,
    OrderedRows,
    RowOrder,
    blocks_entry,
)
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded, gathered
from rabbit_engine.transformers_bridge.gguf import GgufFile
from rabbit_engine.transformers_bridge.gguf_weights import MOST_COMPUTED, Computed, Rows
from rabbit_engine.transformers_bridge.loading import weight_dtypes


def map_gguf(request: ModelRequest, build: Build) -> Conversion:
    """The conversion of a GGUF file whose tensors are entries by the model's names; it builds and holds the model.

    Raises NotInPlaceError and DamagedCheckpointError as `gguf_entries`.
    """
    assert request.gguf is not None  # noqa: S101 - checked by the caller
    model = build(request.architecture, request.dtype)
    entries = gguf_entries(open_gguf(request.gguf.path), request.gguf, model, request.dtype)
    tensors = {name: SafetensorsTensor(entry) for name, entry in entries.items()}
    return open_conversion(request.architecture, model, tensors, request.dtype)


def gguf_entries(file: GgufFile, header: GgufHeader, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, TensorEntry]:
    """The entries of the weights of `model`, loaded as `dtype`, by their names.

    Raises NotInPlaceError with the first weight that cannot be decoded from the file while the model runs, and
    DamagedCheckpointError if the header's numbers do not match the tensors.
    """
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    dtypes = weight_dtypes(model, dtype)
    found = {}
    sources = gguf_sources(file, model, header.values["general.architecture"], header.config, shapes)
    for name, source in sources.items():
        if name not in dtypes:
            continue
        weight = _Weight(name, dtypes[name], dtype, header, file.rounds_each_step)
        if isinstance(source, Rows):
            found[name] = weight.of_rows(source)
        elif isinstance(source, Computed):
            found[name] = weight.computed(source)
        else:
            raise NotInPlaceError(f"{name}: it is computed from several tensors")
    return found


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight of the model: `dtype` is its own, `rounded` the one that the reader gives it before."""

    name: str
    dtype: torch.dtype
    rounded: torch.dtype
    header: GgufHeader
    stepwise: bool

    def of_rows(self, rows: Rows) -> TensorEntry:
        """Rows of one tensor or of several. Raises NotInPlaceError."""
        tensors = [self.header.tensors[name] for name in rows.tensors]
        starts = np.cumsum([0, *map(_row_count, tensors)])
        if len(tensors) > 1 or len(rows.index) < starts[-1]:
            return self._joined(tensors, starts, rows)
        if self.dtype != self.rounded:
            shape = rows.shape if math.prod(rows.shape) <= MOST_COMPUTED else None
            return self.computed(Computed(tensors[0].name, partial(_rearranged, rows), shape))
        is_ordered = bool((np.diff(rows.index) != 1).any())
        if rows.columns is None and not rows.transposed:
            return self._matrix(tensors[0], rows.shape, RowOrder(torch.from_numpy(rows.index)) if is_ordered else None)
        if is_ordered:
            raise NotInPlaceError(f"{self.name}: its rows and its columns are stored in another order")
        whole = self._matrix(tensors[0], tensors[0].shape)
        order = None if rows.columns is None else RowOrder(torch.from_numpy(rows.columns))
        encoding = ArrangedColumns(whole.encoding or Cast(), order, rows.transposed)
        return encoded(self.name, self.dtype, rows.shape, encoding, whole.components or [whole])

    def _joined(self, tensors: Sequence[StoredTensor], starts: NDArray[np.int64], rows: Rows) -> TensorEntry:
        """Ranges of rows: of every expert the gate's and those of the other projection."""
        if rows.columns is not None or rows.transposed or self.dtype != self.rounded:
            raise NotInPlaceError(f"{self.name}: it is computed from several tensors")
        runs = _runs(rows.index, starts)
        if len(runs) > len(tensors) * math.prod(rows.shape[:-2]):
            raise NotInPlaceError(f"{self.name}: its rows are stored in {len(runs)} places")
        whole = [self._matrix(tensor, (_row_count(tensor), rows.shape[-1])) for tensor in tensors]
        parts = [whole[which].rows(first, stop) for which, first, stop in runs]
        return gathered(self.name, self.dtype, rows.shape, parts)

    def computed(self, source: Computed) -> TensorEntry:
        """A small weight of any values of one tensor. Raises NotInPlaceError for a large one."""
        tensor = self.header.tensors[source.tensor]
        if source.shape is None:
            raise NotInPlaceError(f"{self.name}: it is computed from {list(tensor.shape)} values")
        stored = self._stored(tensor)
        blocks = None if tensor.kind in PLAIN else GgufBlocks(tensor.kind, stepwise=self.stepwise)
        dtype = torch.float32 if not self.stepwise else stored.dtype if blocks is None else self.rounded
        encoding = ComputedValues(source.function, tensor.shape, dtype, self.rounded, blocks)
        return encoded(self.name, self.dtype, source.shape, encoding, [stored])

    def _matrix(self, tensor: StoredTensor, shape: tuple[int, ...], order: RowOrder | None = None) -> TensorEntry:
        """A tensor's rows, in `order` if there is one."""
        stored = self._stored(tensor)
        if tensor.kind not in PLAIN:
            entry = blocks_entry(stored, self.name, tensor.kind, self.dtype, shape, order=order, stepwise=self.stepwise)
            if isinstance(entry, str):
                raise NotInPlaceError(f"{tensor.name}: {entry}")
            return entry
        plain = replace(stored, name=self.name, shape=shape)
        if order is not None:
            return encoded(self.name, self.dtype, shape, OrderedRows(order), [plain])
        return plain if plain.dtype == self.dtype else encoded(self.name, self.dtype, shape, Cast(), [plain])

    def _stored(self, tensor: StoredTensor) -> TensorEntry:
        """The bytes of a tensor: its values, or rows of blocks."""
        dtype = PLAIN.get(tensor.kind, torch.uint8)
        rows = tensor.nbytes // _row_count(tensor)
        shape = tensor.shape if tensor.kind in PLAIN else (*tensor.shape[:-1], rows)
        header = self.header
        return TensorEntry(tensor.name, header.path, tensor.offset, tensor.nbytes, dtype, shape, header.stamp)


def _row_count(tensor: StoredTensor) -> int:
    """The rows of a tensor; one with a single dimension has rows of one value."""
    return math.prod(tensor.shape[:-1] if len(tensor.shape) > 1 else tensor.shape)


def _runs(index: NDArray[np.int64], starts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Consecutive rows of one tensor as (tensor, first row, end); tensors start at `starts` in the numbers of rows."""
    which = np.searchsorted(starts, index, "right") - 1
    breaks = np.flatnonzero((np.diff(index) != 1) | (np.diff(which) != 0)) + 1
    begins, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(index)]
    rows = index - starts[which]
    return [(int(which[begin]), int(rows[begin]), int(rows[end - 1]) + 1) for begin, end in zip(begins, ends, strict=True)]


def _rearranged(rows: Rows, values: torch.Tensor) -> torch.Tensor:
    """The values of one tensor as the weight that `rows` tells."""
    found = values.reshape(len(rows.index), -1)[torch.from_numpy(rows.index)]
    found = found if rows.columns is None else found[:, torch.from_numpy(rows.columns)]
    return (found.t() if rows.transposed else found).reshape(rows.shape)
