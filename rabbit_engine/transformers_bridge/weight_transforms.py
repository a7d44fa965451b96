"""transformers' conversion of a checkpoint's tensors by name: all renamings in turn, then at most one converter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, WeightConverter
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform, dot_natural_key, rename_source_key

from rabbit_engine.transformers_bridge.quantizers import Quantizer, allow_smaller_blocks

__all__ = ["NameMap", "Place", "WeightRenaming", "WeightTransform", "as_values", "in_loading_order", "transforms_for"]


def transforms_for(
    model: PreTrainedModel, quantizer: Quantizer | None = None, first: Iterable[WeightTransform] = ()
) -> list[WeightTransform]:
    """Copies of the transforms `first`, then transformers' own for this model and its checkpoint's quantiser."""
    own = get_model_conversion_mapping(model, None, quantizer)
    if quantizer is not None:
        allow_smaller_blocks(own, quantizer)
    return [*copy.deepcopy(list(first)), *own]


def as_values(transform: WeightTransform) -> list[list[str]]:
    """A transform as plain values: its source patterns, its target patterns and its operations."""
    operations = [repr(operation) for operation in getattr(transform, "operations", ())]
    return [list(transform.source_patterns), list(transform.target_patterns), operations]


def in_loading_order(keys: Iterable[str]) -> list[str]:
    """A checkpoint's keys in transformers' order: numbers in names count, so layer 2 comes before layer 10."""
    return sorted(keys, key=dot_natural_key)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes: into `weight` unchanged, or through `converter`, as its source number `source`.

    `weight` is the first of the converter's weights.
    """

    weight: str
    converter: WeightConverter | None = None
    source: int = 0


class NameMap:
    """Maps the keys of a checkpoint to the names of `model`, with `transforms`."""

    def __init__(self, model: PreTrainedModel, transforms: Sequence[WeightTransform]) -> None:
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def place_of(self, key: str) -> Place | None:
        """The weight that the tensor `key` goes into; None if the model has no place for it."""
        name, pattern = self._rename(key, self._renamings, self._converters)
        if name not in self._state and key in self._state:
            name, pattern = self._rename(key, [], [])
        if name not in self._state:
            return None
        if pattern is None:
            return Place(name)
        converter = next(found for found in self._converters if pattern in found.source_patterns)
        return Place(name, converter, converter.source_patterns.index(pattern))

    def renamed(self, key: str) -> str:
        """`key` under the model's name, as far as it has one."""
        return self._rename(key, self._renamings, [])[0]

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        return rename_source_key(key, renamings, converters, self._prefix, self._state)
