"""A unit bound to its module: its weights are the module's parameters while it runs, and placeholders otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rabbit_engine.streaming.binding.placeholder import Placeholders
from rabbit_engine.streaming.binding.unit_weights import UnitWeights
from rabbit_engine.streaming.transfer.unit import Unit

_PLACES = 8


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Where a weight belongs: an attribute of a module (the object: names change under adapters), in one of its tables."""

    module: nn.Module
    attribute: str

    @property
    def table(self) -> dict[str, Any]:
        """The module's parameters or buffers, whichever holds this weight."""
        module = self.module
        return module._buffers if self.attribute in module._buffers else module._parameters

    @property
    def holds_parameter(self) -> bool:
        """Whether it holds a parameter now, not a buffer."""
        return self.attribute in self.module._parameters

    def set(self, tensor: torch.Tensor) -> None:
        """Put `tensor` there."""
        self.table[self.attribute] = tensor


def weight_refs(model: nn.Module, names: Sequence[str]) -> dict[str, WeightRef]:
    """The ref of each weight of the model's state dict."""
    return {name: WeightRef(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}


class BoundUnit:
    """A unit, its `weights`, their refs and placeholders."""

    def __init__(
        self, unit: Unit, refs: Mapping[str, Sequence[WeightRef]], placeholders: Placeholders, weights: UnitWeights
    ) -> None:
        self.unit = unit
        self._weights = weights
        self._refs = [refs[weight.entry.name] for weight in unit.weights]
        self._are_parameters = [refs[0].holds_parameter for refs in self._refs]
        pairs = zip(unit.weights, self._are_parameters, strict=True)
        self._placeholders = [placeholders.of(weight.entry, is_parameter) for weight, is_parameter in pairs]
        self._views: dict[int, list[torch.Tensor]] = {}
        self.set_placeholders()

    def using(self, memory: torch.Tensor) -> AbstractContextManager[None]:
        """A block in which the weights of the unit in `memory` are used. Raises StreamingError."""
        return self._weights.using(memory)

    def set_weights(self, place: int, memory: torch.Tensor) -> None:
        """Set the weights of the unit in `memory`. They are cached for the places where a unit is often put: rebinding takes
        0.1 microseconds, a new Parameter 8."""
        if place not in self._views:
            if len(self._views) == _PLACES:
                self._views.clear()
            self._views[place] = self._make_views(memory)
        self._set(self._views[place])

    def _make_views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        kinds = zip(self._weights.views(memory), self._are_parameters, strict=True)
        return [nn.Parameter(view, requires_grad=False) if is_parameter else view for view, is_parameter in kinds]

    def set_placeholders(self) -> None:
        """Set the placeholders again."""
        self._set(self._placeholders)

    def _set(self, tensors: Sequence[torch.Tensor]) -> None:
        for refs, tensor in zip(self._refs, tensors, strict=True):
            for ref in refs:
                ref.set(tensor)

    def forget(self) -> None:
        """Drop the views, so that the ring's memory can be freed."""
        self.set_placeholders()
        self._views.clear()


class ResidentUnit(BoundUnit):
    """One that stays in `memory`, uint8 [unit.nbytes], as it is stored."""

    def __init__(
        self,
        unit: Unit,
        refs: Mapping[str, Sequence[WeightRef]],
        placeholders: Placeholders,
        weights: UnitWeights,
        memory: torch.Tensor,
    ) -> None:
        super().__init__(unit, refs, placeholders, weights)
        self.memory = memory

    def forget(self) -> None:
        """Drop its memory as well."""
        super().forget()
        self.memory = self.memory[:0].clone()
