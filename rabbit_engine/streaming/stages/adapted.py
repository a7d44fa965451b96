"""Adapters in layers that run elsewhere: PEFT puts its modules around those of the layer here, and the stage gets copies of them.

The model here is the one to ask and to change. Before each request its layers are looked at: which modules stand around theirs,
with which tensors. What was not seen before is packed, without the layer's own modules, which the stage has itself.
"""

from __future__ import annotations

import io
import pickle
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rabbit_engine.errors import MissingExtraError, UnsupportedOperationError
from rabbit_engine.streaming.stages.stage import ActiveAdapters
from rabbit_engine.transformers_bridge.adapters import is_adapted, scaling_of, set_state, state_of, without_adapters

_Place = tuple[int, str]
"""A layer's number, and the name of a module in it."""


class _TakesModules(Protocol):
    """What this needs of a stage."""

    @property
    def name(self) -> str: ...

    def adapt(self, name: str, modules: bytes) -> None: ...

    def withdraw(self, name: str) -> None: ...


class LoadedModules:
    """The modules of layers as they were loaded."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self.at: dict[_Place, nn.Module] = {
            (number, path): module for number, layer in layers.items() for path, module in layer.named_modules()
        }
        self.place = {module: place for place, module in self.at.items()}
        self._children = {place: dict(module._modules) for place, module in self.at.items()}

    def replaced(self, numbers: Iterable[int]) -> dict[_Place, nn.Module]:
        """What stands now where the layers had another module. Raises UnsupportedOperationError if one has other children."""
        found: dict[_Place, nn.Module] = {}
        for number in numbers:
            found.update(self._replaced_in((number, "")))
        return found

    def _replaced_in(self, place: _Place) -> Iterator[tuple[_Place, nn.Module]]:
        number, path = place
        loaded, now = self._children[place], self.at[place]._modules
        if loaded.keys() != now.keys():
            raise UnsupportedOperationError(f"modules were added to layer {number}, or removed: {_ONE_DEVICE}")
        for name, child in now.items():
            inner = number, f"{path}.{name}" if path else name
            if child is not None:
                child = without_adapters(child)
            if child is not None and child is not loaded[name]:
                yield inner, child
            elif child is not None and self.at.get(inner) is child:  # one that stands in two places is seen in one
                yield from self._replaced_in(inner)

    def put(self, modules: Mapping[_Place, nn.Module]) -> None:
        """Have these modules stand where they were."""
        for (number, path), module in modules.items():
            parent, _, name = path.rpartition(".")
            self.at[number, parent]._modules[name] = module


_ONE_DEVICE = "load the model on one device"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a layer was made of: compared by identity, and held so that no other object gets the same."""

    parts: tuple[nn.Module, ...]
    tensors: tuple[torch.Tensor, ...] = ()
    facts: tuple[Any, ...] = ()
    """What may change in them: the versions of tensors, and scales."""

    def is_as(self, other: _Seen) -> bool:
        return (
            _same(self.parts, other.parts)
            and (not self.tensors or _same(self.tensors, other.tensors))
            and self.facts == other.facts
        )


class AdaptersHere:
    """The adapters in the `layers` here, whose stage has them too."""

    def __init__(self, stage: _TakesModules, layers: Mapping[int, nn.Module]) -> None:
        self._stage, self._layers, self._loaded = stage, layers, LoadedModules(layers)
        self._seen = {number: self._look(number) for number in layers}
        self._adapted: list[nn.Module] = []
        self._name: str | None = None
        self._lock = threading.Lock()

    def parts(self, number: int) -> tuple[nn.Module, ...]:
        """The modules that the layer is made of now."""
        return tuple(self._layers[number].modules())

    def active(self, numbers: Iterable[int]) -> ActiveAdapters | None:
        """What a pass through the layers `numbers` computes with, which the stage then has. Raises UnsupportedOperationError if
        modules of a layer were replaced otherwise."""
        with self._lock:
            if not all(self._look(number).is_as(self._seen[number]) for number in numbers):
                self._send()
            if self._name is None:
                return None
            states = [state_of(module) for module in self._adapted]
            alike = all(state == states[0] for state in states)
            return ActiveAdapters(self._name, tuple(states[:1] if alike else states))

    def _look(self, number: int) -> _Seen:
        parts = self.parts(number)
        added = [module for module in parts if module not in self._loaded.place]
        tensors = tuple(
            tensor
            for module in added
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        return _Seen(parts, tensors, (versions, *(scaling_of(module) for module in added if is_adapted(module))))

    def _send(self) -> None:
        replaced = self._loaded.replaced(self._layers)
        for (number, path), module in replaced.items():
            if not is_adapted(module):
                raise UnsupportedOperationError(
                    f"{path} of layer {number} was replaced by {type(module).__name__}, but runs on {self._stage.name}, "
                    f"which takes adapters of PEFT around modules of the layer only: {_ONE_DEVICE}"
                )
        name = uuid.uuid4().hex if replaced else None
        if name is not None:
            self._stage.adapt(name, pack(replaced, self._loaded))
        if self._name is not None:
            self._stage.withdraw(self._name)
        self._name, self._adapted = name, list(_adapted_in(replaced, self._loaded))
        self._seen = {number: self._look(number) for number in self._layers}


class AdaptersThere:
    """The adapters of a stage with these `layers`, of which those of the running pass stand in the layers. One thread."""

    def __init__(self, layers: Mapping[int, nn.Module], device: torch.device) -> None:
        self._loaded, self._device = LoadedModules(layers), device
        self._known: dict[str, dict[_Place, nn.Module]] = {}
        self._used: ActiveAdapters | None = None
        self._placed: dict[_Place, nn.Module] = {}

    def add(self, name: str, modules: bytes) -> None:
        """Have these modules."""
        self._known[name] = unpack(modules, self._loaded, self._device)

    def drop(self, name: str) -> None:
        """Drop modules. Those that stand in the layers stay until the next pass, as one may be under way."""
        self._known.pop(name, None)

    def use(self, adapters: ActiveAdapters | None) -> None:
        """Have the layers compute with these adapters. Raises KeyError if they are not known."""
        if adapters == self._used:
            return
        modules = {} if adapters is None else self._known[adapters.modules]
        self._loaded.put({place: self._loaded.at[place] for place in self._placed})
        self._used, self._placed = None, {}
        if adapters is not None:
            adapted = list(_adapted_in(modules, self._loaded))
            states = adapters.active * len(adapted) if len(adapters.active) == 1 else adapters.active
            for module, state in zip(adapted, states, strict=True):
                set_state(module, state)
            self._loaded.put(modules)
        self._used, self._placed = adapters, modules


class _Packer(pickle.Pickler):
    """Pickles what stands around the modules of layers, with their places for these, and tensors as CPU has them."""

    def __init__(self, file: io.BytesIO, loaded: LoadedModules) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._loaded = loaded

    def persistent_id(self, value: Any) -> _Place | None:
        return self._loaded.place.get(value) if isinstance(value, nn.Module) else None

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        tensor = value.detach().cpu()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        return (tensor if whole else tensor.clone()).__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _Unpacker(pickle.Unpickler):
    """Puts the modules of the layers here into what `_Packer` made."""

    def __init__(self, file: io.BytesIO, loaded: LoadedModules) -> None:
        super().__init__(file)
        self._loaded = loaded

    def persistent_load(self, place: Any) -> nn.Module:
        return self._loaded.at[place]


def pack(modules: Mapping[_Place, nn.Module], loaded: LoadedModules) -> bytes:
    """The modules without those that were loaded."""
    file = io.BytesIO()
    _Packer(file, loaded).dump(dict(modules))
    return file.getvalue()


def unpack(modules: bytes, loaded: LoadedModules, device: torch.device) -> dict[_Place, nn.Module]:
    """The modules around those that were loaded here, with tensors on `device`. Raises MissingExtraError without peft."""
    try:
        found: dict[_Place, nn.Module] = _Unpacker(io.BytesIO(modules), loaded).load()
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"an adapter needs a package that is missing where a stage of the model runs: {error}") from error
    for module in _added_in(found, loaded):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensor.data = tensor.data.to(device)
    return found


def _added_in(modules: Mapping[_Place, nn.Module], loaded: LoadedModules) -> Iterator[nn.Module]:
    """All that is not of the layers, in one order here and there."""
    for _, module in sorted(modules.items()):
        yield from (part for part in module.modules() if part not in loaded.place)


def _adapted_in(modules: Mapping[_Place, nn.Module], loaded: LoadedModules) -> Iterator[nn.Module]:
    return filter(is_adapted, _added_in(modules, loaded))


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))
