"""The weights of a unit in the form that modules use: views of its memory, decoded in a scratch, or packed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from rabbit_engine.streaming.binding.packed import PackedWeight
from rabbit_engine.streaming.binding.scratch import Scratch
from rabbit_engine.streaming.transfer.unit import Unit, UnitWeight

_NOTHING = nullcontext()


class UnitWeights:
    """The weights of `unit`, wherever it lies.

    Encoded ones are decoded to the `scratch`: when a block begins to use the unit, or, for those named in `packed`, only if
    their product needs it.
    """

    def __init__(self, unit: Unit, scratch: Scratch | None = None, packed: Collection[str] = ()) -> None:
        self._unit, self._scratch, self._packed = unit, scratch, frozenset(packed)
        self._is_decoded_first = any(weight.entry.name not in self._packed for weight in unit.encoded)

    def using(self, memory: torch.Tensor) -> AbstractContextManager[None]:
        """A block in which `views` of the unit in `memory` (uint8 [unit.nbytes]) can be used. Raises StreamingError."""
        if self._scratch is None or not self._is_decoded_first:
            return _NOTHING
        return self._scratch.holding(self._unit, memory)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Every weight of the unit in `memory`, without a copy."""
        found, index = [], 0
        decoded = self._scratch.views(self._unit) if self._scratch is not None else []
        for weight in self._unit.weights:
            if not weight.entry.is_encoded:
                found.append(weight.view(memory))
                continue
            packed = weight.entry.name in self._packed
            found.append(self._packed_weight(weight, index, memory) if packed else decoded[index])
            index += 1
        return found

    def _packed_weight(self, weight: UnitWeight, index: int, memory: torch.Tensor) -> PackedWeight:
        shape = weight.entry.shape[-2:]
        extra = len(weight.entry.shape) - len(shape)

        @contextmanager
        def decoded() -> Iterator[torch.Tensor]:
            assert self._scratch is not None  # noqa: S101 - every unit with encoded weights has one
            with self._scratch.holding(self._unit, memory):
                yield self._scratch.views(self._unit)[index].view(shape)

        stored = [part.view(part.shape[extra:]) for part in weight.stored_views(memory)]
        return PackedWeight(weight.entry, memory.device, shape, stored, decoded)
