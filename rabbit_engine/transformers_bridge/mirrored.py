"""Layers of a cache whose states are on another device or machine: here they have the shapes, and say what is done to them."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, Self

import torch
from transformers import Cache
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from rabbit_engine.transformers_bridge.caches import copied_state, keep_in_layer, restore_layer, states_of_layer
from rabbit_engine.transformers_bridge.tiered import PlainLayer, as_plain
from rabbit_engine.transformers_bridge.tiered_layers import TIERED, plain_facts

_CHANGES = (
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "activate_past_recording",
)
"""Methods of layers that change states without those of a pass."""
_STATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer", "lazy_initialization")
"""Methods that add states, which only the stage has."""


class Relay(Protocol):
    """The text of a cache on the stage that has its states."""

    def note(self, index: int, change: str, args: tuple[Any, ...]) -> None:
        """Have this done to layer `index` before the next pass."""
        ...

    def read(self, first: int, stop: int, without: Collection[int]) -> Mapping[str, torch.Tensor]:
        """What `caches.states_between` finds there, in memory of the host."""
        ...

    def fork(self) -> Relay:
        """A copy of the text as it is now, changes included."""
        ...


NUMBERS = itertools.count()
"""Of what stages keep for texts."""


class MirroredStates:
    """A copy on the stage of what a layer has there, under a `number`; here its attributes."""

    def __init__(self, relay: Relay, index: int, facts: Mapping[str, Any]) -> None:
        self.number, self.facts = next(NUMBERS), facts
        relay.note(index, "save", (self.number,))
        weakref.finalize(self, relay.note, index, "drop", (self.number,)).atexit = False


_OWN = ("_relay", "_index", "_is_changing")
"""Attributes of a mirror that its layer does not have."""


class MirroredLayer:
    """What the mirror of a layer adds to its class, whose methods then run on tensors without memory."""

    mirrors: ClassVar[type]
    """The class of the layer."""
    _relay: Relay
    _index: int
    _is_changing: bool

    @property
    def relay(self) -> Relay:
        """Where its states are."""
        return self._relay

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_changing:
            if isinstance(value, torch.Tensor):
                raise RuntimeError(f"cannot replace {name!r} of a cache's layer {self._index}: its states are on another device")
            self._relay.note(self._index, "__setattr__", (name, value))
        object.__setattr__(self, name, value)

    def keep(self, past: int, offsets: Sequence[int]) -> None:
        """Keep the first `past` positions, and of those after them the ones at `offsets`."""
        self._relay.note(self._index, "keep", (past, list(offsets)))
        with _changing(self):
            keep_in_layer(self, past, offsets)

    def saved(self) -> MirroredStates:
        """What `restore` needs, which the stage keeps as long as this is referred to."""
        facts = {name: copied_state(value) for name, value in vars(self).items() if name not in _OWN}
        return MirroredStates(self._relay, self._index, facts)

    def restore(self, saved: MirroredStates) -> None:
        """Have what the layer had, once."""
        self._relay.note(self._index, "restore", (saved.number,))
        with _changing(self):
            vars(self).update(saved.facts)

    def take(self, facts: Mapping[str, Any]) -> None:
        """Have the attributes that `facts_of` the layer gave on the stage."""
        with _changing(self):
            vars(self).update(facts)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        """A layer of a copy of the text, which all layers of one deep copy share."""
        key = "fork", id(self._relay)
        if key not in memo:
            memo[key] = self._relay.fork()
        copied = copy.copy(self)
        vars(copied)["_relay"] = memo[key]
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"a cache whose layer {self._index} is on another device cannot be pickled")


@contextmanager
def _changing(layer: MirroredLayer) -> Iterator[None]:
    vars(layer)["_is_changing"] = True
    try:
        yield
    finally:
        vars(layer)["_is_changing"] = False


def _changes(name: str) -> Callable[..., None]:
    def change(self: MirroredLayer, *args: Any) -> None:
        native = functools.partial(getattr(super(MirroredLayer, self), name), *args)
        if self._is_changing:  # part of another change
            native()
            return
        self._relay.note(self._index, name, args)
        with _changing(self):
            native()

    return change


def _refusal(name: str) -> Callable[..., None]:
    def refuse(self: MirroredLayer, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{name} of a cache's layer {self._index} here: its states are on another device")

    return refuse


@functools.cache
def _mirror_of(kind: type) -> type:
    own: dict[str, Any] = {"mirrors": kind}
    own |= {name: _changes(name) for name in _CHANGES if hasattr(kind, name)}
    own |= {name: _refusal(name) for name in _STATES if hasattr(kind, name)}
    own |= {name: lambda *_, **__: None for name in ("offload", "prefetch") if hasattr(kind, name)}
    return type(f"Mirrored{kind.__name__}", (MirroredLayer, kind), own)


def facts_of(layer: Any) -> dict[str, Any]:
    """The attributes of a layer, with tensors on the meta device, but for lengths; of one in tiers, those of a plain one."""
    if isinstance(layer, TIERED):
        return plain_facts(layer)
    return {name: _without_memory(value) for name, value in vars(layer).items() if name != "_room"}


def _without_memory(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point():
        return value.cpu().clone()  # a length, which is asked for here
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, dict):
        return {key: _without_memory(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_memory(one) for one in value)
    return value


class ElsewhereLayer:
    """The place of a layer in the cache of a stage that does not have it."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"a layer of this stage uses layer {self.index} of the cache ({name}), which another stage has")


def is_cache(value: object) -> bool:
    """Whether it is a cache of transformers."""
    return isinstance(value, Cache | EncoderDecoderCache)


def has_layers(cache: object, layers: Collection[int]) -> bool:
    """Whether the cache is one whose layers can be on a stage: that of a decoder, with an encoder or without."""
    parts = _parts(cache) if is_cache(cache) else []
    return bool(parts) and all(isinstance(part, Cache) and bool(_indices(part, layers)) for part in parts)


def _parts(cache: Any) -> list[Any]:
    """The cache, or with an encoder the decoder's own and that of what was read."""
    both = isinstance(cache, EncoderDecoderCache)
    return [cache.self_attention_cache, cache.cross_attention_cache] if both else [cache]


def _indices(cache: Any, layers: Collection[int]) -> list[int]:
    """Those of `layers` that the cache has, or will: one that was made without a config adds them as they come."""
    replicated = getattr(cache, "layer_class_to_replicate", None)
    while replicated is not None and len(cache.layers) <= max(layers):
        cache.layers.append(replicated())
    return [index for index in sorted(layers) if index < len(cache.layers)]


def layer_at(cache: Any, number: int) -> Any:
    """A layer by what `own_layers` calls it: its index, or -1 less its index in the cache of what an encoder read."""
    parts = _parts(cache)
    return parts[0].layers[number] if number >= 0 else parts[1].layers[-1 - number]


def _first(cache: Any, layers: Collection[int]) -> Any:
    part = _parts(cache)[0]
    return part.layers[_indices(part, layers)[0]]


def is_mirrored(cache: Any, layers: Collection[int]) -> bool:
    """Whether the stage with `layers` has those of the cache already."""
    return isinstance(_first(cache, layers), MirroredLayer)


def relay_of(cache: Any, layers: Collection[int]) -> Any:
    """The relay of a mirrored cache to the stage with `layers`."""
    return _first(cache, layers)._relay


def move_layers(cache: Any, layers: Collection[int], relay: Relay) -> Any:
    """Mirror the `layers` of a cache. Returns the cache for the stage, with the layers themselves and no others."""
    parts = _parts(cache)
    moved: list[Any] = [DynamicCache() for _ in parts]
    for place, (part, there) in enumerate(zip(parts, moved, strict=True)):
        indices = _indices(part, layers)
        there.layers = [as_plain(part, at) if at in indices else ElsewhereLayer(at) for at in range(len(part.layers))]
        for at in indices:
            part.layers[at] = _mirrored(there.layers[at], relay, -1 - at if place else at)
    if len(parts) == 1:
        return moved[0]
    both: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    both.self_attention_cache, both.cross_attention_cache = moved
    both.is_updated = dict(cache.is_updated)
    return both


def _mirrored(layer: Any, relay: Relay, index: int) -> MirroredLayer:
    if isinstance(layer, PlainLayer):
        layer = layer.layer
    kind: type = type(layer)
    made: MirroredLayer = object.__new__(_mirror_of(kind))
    vars(made).update(facts_of(layer), _relay=relay, _index=index, _is_changing=False)
    return made


def move_states(cache: Any, device: torch.device) -> Any:
    """The stage's cache, with the states of its layers on `device`."""
    for index in own_layers(cache):
        layer = layer_at(cache, index)
        states = vars(layer.layer if isinstance(layer, PlainLayer) else layer)
        for name, value in states.items():
            states[name] = device if name.endswith("device") and value is not None else _on(value, device)
    return cache


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(one, device) for key, one in value.items()}
    return type(value)(_on(one, device) for one in value) if type(value) in (list, tuple) else value


def change_layer(cache: Any, number: int, change: str, args: tuple[Any, ...], saved: dict[int, Any]) -> None:
    """Do to a layer what was noted of its mirror. `saved` are copies of states of the text by number."""
    layer = layer_at(cache, number)
    if change == "keep":
        keep_in_layer(layer, *args)
    elif change == "save":
        saved[args[0]] = states_of_layer(layer)
    elif change == "restore":
        restore_layer(layer, saved.pop(args[0]))
    elif change == "drop":
        saved.pop(args[0], None)
    else:
        getattr(layer, change)(*args)
    if change == "reset" and number < 0:
        cache.is_updated[-1 - number] = False


def own_layers(cache: Any) -> list[int]:
    """The layers that a stage's cache has: see `layer_at`."""
    numbers = [
        (-1 - at if place else at, layer) for place, part in enumerate(_parts(cache)) for at, layer in enumerate(part.layers)
    ]
    return [number for number, layer in numbers if not isinstance(layer, ElsewhereLayer)]


def take_facts(cache: Any, facts: Mapping[int, Mapping[str, Any]]) -> None:
    """Have the mirrored layers know what the stage answered of them."""
    for number, found in facts.items():
        layer_at(cache, number).take(found)
        if number < 0:
            cache.is_updated[-1 - number] = bool(found.get("is_initialized"))
