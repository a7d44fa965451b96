"""A unit bound to its module: its weights are the module's parameters while it runs, and placeholders otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rabbit_engine.streaming.binding.placeholder import Placeholders
from rabbit_engine.streaming.binding.scratch import Scratch
from rabbit_engine.streaming.transfer.unit import Unit

_PLACES = 8
_NOTHING = nullcontext()


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
    """A unit, the refs of its weights, and their placeholders. One with encoded weights has the `scratch` to decode them to."""

    def __init__(
        self, unit: Unit, refs: Mapping[str, Sequence[WeightRef]], placeholders: Placeholders, scratch: Scratch | None = None
    ) -> None:
        self.unit = unit
        self._scratch = scratch
        self._decoded = scratch.views(unit) if scratch is not None else []
        self._refs = [refs[weight.entry.name] for weight in unit.weights]
        self._are_parameters = [refs[0].holds_parameter for refs in self._refs]
        pairs = zip(unit.weights, self._are_parameters, strict=True)
        self._placeholders = [placeholders.of(weight.entry, is_parameter) for weight, is_parameter in pairs]
        self._views: dict[int, list[torch.Tensor]] = {}
        self.set_placeholders()

    def set_weights(self, place: int, memory: torch.Tensor) -> None:
        """Set views of the ring, or of the scratch for encoded weights. They are cached for the places where a unit is often
        put: rebinding takes 0.1 microseconds, a new Parameter 8."""
        if place not in self._views:
            if len(self._views) == _PLACES:
                self._views.clear()
            self._views[place] = self._make_views(memory)
        self._set(self._views[place])

    def _make_views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        decoded = iter(self._decoded)
        found = (next(decoded) if weight.entry.is_encoded else weight.view(memory) for weight in self.unit.weights)
        kinds = zip(found, self._are_parameters, strict=True)
        return [nn.Parameter(view, requires_grad=False) if is_parameter else view for view, is_parameter in kinds]

    def decoded(self, memory: torch.Tensor) -> AbstractContextManager[None]:
        """Provide its decoded weights in the scratch within the block; the unit is in `memory`. Raises StreamingError."""
        return _NOTHING if self._scratch is None else self._scratch.holding(self.unit, memory, self._decoded)

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
        self._decoded.clear()


class ResidentUnit(BoundUnit):
    """One that stays in `memory`, uint8 [unit.nbytes], as it is stored."""

    def __init__(
        self,
        unit: Unit,
        refs: Mapping[str, Sequence[WeightRef]],
        placeholders: Placeholders,
        scratch: Scratch | None,
        memory: torch.Tensor,
    ) -> None:
        super().__init__(unit, refs, placeholders, scratch)
        self.memory = memory

    def forget(self) -> None:
        """Drop its memory as well."""
        super().forget()
        self.memory = self.memory[:0].clone()
