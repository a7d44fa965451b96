"""Outputs of modules inside layers that run elsewhere, for a forward that returns them: attentions, logits of routers.

transformers takes them by hooks on the modules. The stage sends the outputs of those that have such hooks here, for the hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from rabbit_engine.transformers_bridge.forwards import capturing_hooks

_Place = tuple[int, str]
"""A layer's number, and the name of a module in it."""

_Found = list[tuple[_Place, Any]]

_TAKING: ContextVar[tuple[Collection[_Place], _Found] | None] = ContextVar("taking", default=None)
"""What the request of the running fiber wants, and what of it there is."""


class ShownHere:
    """The modules inside `layers` here, of which transformers' hooks get the outputs."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._modules = {number: dict(layer.named_modules()) for number, layer in layers.items()}

    def wanted(self, numbers: Collection[int]) -> frozenset[_Place]:
        """Those of the layers `numbers` that have hooks, but the layers themselves."""
        places = ((number, path, module) for number in numbers for path, module in self._modules[number].items())
        return frozenset((number, path) for number, path, module in places if path and capturing_hooks(module))

    def give(self, found: Collection[tuple[_Place, Any]]) -> None:
        """Call the hooks with these outputs."""
        for (number, path), output in found:
            module = self._modules[number][path]
            for hook in capturing_hooks(module):
                hook(module, (), output)


class ShownThere:
    """The modules inside the layers of a stage, whose outputs requests may want."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._modules = {(number, path): part for number, layer in layers.items() for path, part in layer.named_modules()}
        self._watched: set[_Place] = set()

    @contextmanager
    def taking(self, places: Collection[_Place]) -> Iterator[_Found]:
        """The outputs of these modules in the calls of this fiber while the block runs."""
        for place in set(places) - self._watched:
            self._modules[place].register_forward_hook(functools.partial(_take, place))
            self._watched.add(place)
        found: _Found = []
        token = _TAKING.set((places, found) if places else None)
        try:
            yield found
        finally:
            _TAKING.reset(token)


def _take(place: _Place, _: nn.Module, __: Any, output: Any) -> None:
    taking = _TAKING.get()
    if taking is not None and place in taking[0]:
        taking[1].append((place, output))
