"""Which rows of a GGUF file's tensors the weights of a model are, found by letting transformers' readers convert row numbers.

The readers rename tensors, reorder and join their rows, and compute a few small ones. Their own functions are called with numbers
in place of a tensor's values: what comes out says where each row of a weight comes from. A weight that does not come out as rows
is left to the functions themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping

from rabbit_engine.transformers_bridge.weight_transforms import NameMap

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight of `shape` whose rows (along all dimensions but the last) are rows of stored tensors, of one length.

    Row r is row `index[r]` of the rows of `tensors`, counted one tensor after another; of a tensor with one dimension each value
    is a row. Then column c is column `columns[c]`, if there are any; last, a `transposed` weight is turned to `shape`.
    """

    tensors: tuple[str, ...]
    index: NDArray[np.int64]
    shape: Shape
    columns: NDArray[np.int64] | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Computed:
    """A weight of `shape` that `function` computes from the values of the stored tensor `tensor`. The shape of a large one is not
    known: None."""

    tensor: str
    function: Callable[[torch.Tensor], torch.Tensor]
    shape: Shape | None


Source = Rows | Computed | None
"""None: the weight is computed from several tensors."""


def sources_of_older_reader(
    model: PreTrainedModel, architecture: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> dict[str, Source]:
    """Weight -> what it is of the file's tensors, of `shapes` in torch's order. `config` is what the reader made of the header.

    Computed weights are functions of float32 values. May raise anything if the header's numbers do not match the tensors.
    """
    reader: Any = modeling_gguf_pytorch_utils
    processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=dict(config))
    names = reader.get_gguf_hf_weights_map(model, processor)
    groups: dict[str, list[str]] = {}
    for tensor in shapes:
        groups.setdefault(names.get(tensor, names.get(tensor.removesuffix(".weight"), tensor)), []).append(tensor)
    found: dict[str, Source] = {}
    for group in groups.values():
        processing = _Processing(processor, names)
        found |= _trace(processing, {name: shapes[name] for name in group})
    return found


def sources_of_newer_reader(model: PreTrainedModel, architecture: str, shapes: Mapping[str, Shape]) -> dict[str, Source]:
    """The same for the architectures of the newer reader. Computed weights are functions of values in the stored dtype, of
    decoded ones in the model's."""
    names = NameMap(model, copy.deepcopy(get_gguf_conversion_mapping(architecture, model.config)))
    groups: dict[str, list[tuple[int, str]]] = {}
    converters: dict[str, Any] = {}
    for tensor in shapes:
        place = names.place_of(tensor)
        if place is not None:
            groups.setdefault(place.weight, []).append((place.source, tensor))
            converters[place.weight] = place.converter
    found: dict[str, Source] = {}
    for weight, group in groups.items():
        conversion = _Operations(weight, converters[weight], model)
        found |= _trace(conversion, {name: shapes[name] for _, name in sorted(group)}, conversion.columns)
    return found


class _Processing:
    """The older reader's processor of tensors."""

    def __init__(self, processor: Any, names: Mapping[str, str]) -> None:
        self._processor, self._names = processor, names

    def weights(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The weights that it makes of `tensors`."""
        made: dict[str, Any] = {}
        for name, values in tensors.items():
            parsed = {"tensors": made}
            result = self._processor.process(weights=values, name=name, tensor_key_mapping=self._names, parsed_parameters=parsed)
            if result.name in self._names:
                made[self._names[result.name]] = result.weights
        return made

    def targets(self, tensors: Collection[str]) -> list[str]:
        """The names of the weights, where they cannot be made."""
        return [self._names[name] for name in tensors if name in self._names]


class _Operations:
    """The newer reader's operations for one weight, but those that decode and cast it."""

    def __init__(self, weight: str, converter: Any, model: PreTrainedModel) -> None:
        self._weight, self._converter, self._model = weight, converter, model
        operations = [] if converter is None else list(converter.operations)
        orders = [operation for operation in operations if hasattr(operation, "input_permutation")]
        self._operations = [operation for operation in operations if operation not in orders]
        self.columns = orders[0].permutation.numpy() if orders else None

    def weights(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The weight that they make of `tensors`, which are in the order of the converter's sources."""
        patterns = [self._weight] if self._converter is None else self._converter.source_patterns
        made: Any = {pattern: [torch.as_tensor(values)] for pattern, values in zip(patterns, tensors.values(), strict=True)}
        for operation in self._operations:
            made = operation.convert(
                made,
                source_patterns=self._converter.source_patterns,
                target_patterns=self._converter.target_patterns,
                full_layer_name=self._weight,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        (values,) = made.values()
        return {self._weight: values[0] if isinstance(values, list) else values}

    def targets(self, _: Collection[str]) -> list[str]:
        """The name of the weight."""
        return [self._weight]


_Conversion = _Processing | _Operations

MOST_COMPUTED = 2**20
"""Values of a tensor that a weight is computed from again and again, as its module runs."""

_MOST_NUMBERS = 2**24
"""Of a tensor whose every value is numbered, where a conversion does not take two columns."""


def _trace(
    conversion: _Conversion, shapes: Mapping[str, Shape], columns: NDArray[np.int64] | None = None
) -> Iterator[tuple[str, Source]]:
    """The weights that `conversion` makes of tensors, as rows of them; of a single tensor also as what it computes."""
    few, all_columns = _Numbered(shapes), _Numbered(shapes, all_columns=True)
    made = few.converted(conversion)
    if made is None and all_columns.count <= _MOST_NUMBERS:
        few, made = all_columns, all_columns.converted(conversion)
    for weight in conversion.targets(shapes) if made is None else made:
        rows = None if made is None else few.rows(made[weight])
        if rows is not None:
            yield weight, rows if columns is None else replace(rows, columns=columns)
        else:
            yield weight, _computed(conversion, weight, shapes)


def _computed(conversion: _Conversion, weight: str, shapes: Mapping[str, Shape]) -> Computed | None:
    """The weight as a function of one tensor; a small one is computed from ones, to see what it is."""
    tensor, *others = shapes
    if others:
        return None
    function, shape = partial(_compute, conversion, tensor, weight), shapes[tensor]
    is_small = np.prod(shape) <= MOST_COMPUTED
    return Computed(tensor, function, tuple(function(torch.ones(shape, device="cpu")).shape) if is_small else None)


def _compute(conversion: _Conversion, tensor: str, weight: str, values: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(
        conversion.weights({tensor: values.numpy() if isinstance(conversion, _Processing) else values})[weight]
    )


class _Numbered:
    """Arrays that hold a number for each row of some tensors, to be converted in place of their values.

    Row r holds `4r + 2` in its first column, and grows by less than 1 from column to column: of two columns, or of all. Neither 0
    nor a number that a conversion changed by 1 is one of these.
    """

    def __init__(self, shapes: Mapping[str, Shape], *, all_columns: bool = False) -> None:
        self._shapes = shapes
        self._columns = {name: shape[-1] if all_columns else 2 for name, shape in shapes.items() if len(shape) > 1}
        self.count = sum(_row_count(shape) * self._columns.get(name, 1) for name, shape in shapes.items())

    def converted(self, conversion: _Conversion) -> dict[str, Any] | None:
        """What `conversion` makes of the numbers; None if it does not take this many columns."""
        arrays, first = {}, 0
        for name, shape in self._shapes.items():
            arrays[name] = self._numbers(name, first, shape)
            first += _row_count(shape)
        try:
            with np.errstate(all="ignore"):
                return conversion.weights(arrays)
        except (ValueError, IndexError, RuntimeError):
            return None

    def _numbers(self, name: str, first: int, shape: Shape) -> NDArray[Any]:
        numbers: NDArray[Any] = 4.0 * np.arange(first, first + _row_count(shape)) + 2
        if len(shape) == 1:
            return numbers
        numbers = numbers[:, None] + _steps(self._columns[name])
        return numbers.reshape(*shape[:-1], -1)

    def rows(self, found: Any) -> Rows | None:
        """The weight of rows that `found` are the numbers of; None if it holds anything else."""
        numbers, shapes = np.asarray(found, np.float64), tuple(self._shapes.values())
        straight = self._straight(numbers)
        if straight is None and numbers.ndim == 2:
            turned = self._straight(numbers.T)
            return None if turned is None else Rows(tuple(self._shapes), turned, (shapes[0][-1], len(turned)), transposed=True)
        if straight is None:
            return None
        shape = numbers.shape if len(shapes[0]) == 1 else (*numbers.shape[:-1], shapes[0][-1])
        return Rows(tuple(self._shapes), straight, shape)

    def _straight(self, numbers: NDArray[np.float64]) -> NDArray[np.int64] | None:
        """The rows that the numbers stand for, if they are whole rows of tensors with one length of rows."""
        if len({(len(shape) > 1, shape[-1] if len(shape) > 1 else 1) for shape in self._shapes.values()}) != 1:
            return None
        first = numbers.reshape(-1)
        if self._columns:
            columns = next(iter(self._columns.values()))
            if numbers.ndim < 2 or numbers.shape[-1] != columns or not (numbers == numbers[..., :1] + _steps(columns)).all():
                return None
            first = numbers[..., 0].reshape(-1)
        index, count = (first - 2) / 4, sum(map(_row_count, self._shapes.values()))
        valid = len(index) and (index % 1 == 0).all() and (index >= 0).all() and (index < count).all()
        return index.astype(np.int64) if valid else None


def _row_count(shape: Shape) -> int:
    return int(np.prod(shape[:-1] if len(shape) > 1 else shape))


def _steps(columns: int) -> NDArray[np.float64]:
    return np.arange(columns, dtype=np.float64) / 2.0**20
