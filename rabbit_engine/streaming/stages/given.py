"""The arguments of calls on the stage that runs them: what stands in them for something that the stage has, and all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rabbit_engine.streaming.stages.hops import bring
from rabbit_engine.streaming.stages.stage import KeptTensor, LayerCall, MaskOfPart, Stands


def no_masks(kind: str) -> torch.Tensor:
    """For a forward that is no part of a prompt. Raises ValueError."""
    raise ValueError(f"a mask for layers of kind {kind!r}, but no part of a prompt runs")


class GivenArguments:
    """Those of the calls of one forward, in order. `kept` has the tensors of earlier requests, by number."""

    def __init__(
        self, device: torch.device, cache: Any, kept: dict[int, Any], masks: Callable[[str], torch.Tensor] = no_masks
    ) -> None:
        self._device, self._cache, self._kept, self._masks = device, cache, kept, masks
        self._here: dict[int, Any] = {}
        """What was brought to the device, by the identity of what the request has: calls share it."""
        self._states: Any = None

    def of(self, call: LayerCall) -> tuple[list[Any], Mapping[str, Any]]:
        """Positional ones, and keywords."""
        return [self._given(value) for value in call.args], {name: self._given(value) for name, value in call.kwargs.items()}

    def go_on(self, output: Any) -> None:
        """A layer returned this, of which the next one gets the states."""
        self._states = output[0] if isinstance(output, tuple | list) else output

    def _given(self, value: Any) -> Any:
        match value:
            case Stands.CACHE:
                return self._cache
            case Stands.OUTPUT:
                return self._states
            case MaskOfPart(kind=kind):
                return self._masks(kind)
            case KeptTensor(number=number, tensor=tensor):
                if tensor is not None and number not in self._kept:
                    self._kept[number] = bring(tensor, self._device)
                return self._kept[number]
        if id(value) not in self._here:
            self._here[id(value)] = bring(value, self._device)
        return self._here[id(value)]
