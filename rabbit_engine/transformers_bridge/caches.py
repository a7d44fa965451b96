"""Caches of keys and values, beyond growing: which positions they can drop, how they go back, what their layers can see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from transformers import Cache, PretrainedConfig, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from rabbit_engine.transformers_bridge.growing import GrowingLayer
from rabbit_engine.transformers_bridge.tiered import TieredCache, growing_indices, growing_pairs, part_of, window_indices
from rabbit_engine.transformers_bridge.tiered_layers import TIERED, Pair, TieredLayer, TieredWindowLayer

Ability = Literal["select", "crop", "restore", "none"]
"""Of the newest positions, a cache can keep any ("select"), drop the last ("crop"), or go back to a copy of its states."""

_PLAIN = (DynamicCache, TieredCache)
"""Caches that hold what their layers hold: other classes may hold states of their own."""

_INDEXED: Any = getattr(cache_utils, "DynamicIndexedLayer", None)
"""Chooses the keys that a token sees by keys of an indexer, which it keeps too."""
_WITH_STATES = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", LinearAttentionLayer),
)
_ATTENDING = (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer, *TIERED, _INDEXED)
_GROWING = {"keys": -2, "values": -2, "indexer_keys": -2, "indexer_position_ids": -1}
"""States of such layers that get longer with the text, and in which dimension."""
_EMPTY: Any = getattr(cache_utils, "DummyLayer", ())
"""Holds nothing: the place of a layer that uses another's keys and values."""


def ability_of(cache: Cache) -> Ability:
    """What the cache can do after at least one pass. Static, quantised and offloaded ones can do nothing of it."""
    layers = [layer for layer in cache.layers if not isinstance(layer, _EMPTY)]
    if not is_dynamic(cache) or not layers:
        return "none"
    if not all(getattr(layer, "is_initialized", True) for layer in layers):  # a module keeps states of its own
        return "none"
    if all(_kind(layer) in _ATTENDING for layer in layers):
        return "select"
    if not all(_is_recurrent(layer) or _can_crop(layer) for layer in layers):
        return "none"
    if any(_is_recurrent(layer) for layer in layers):
        return "restore"
    return "crop"


def _kind(layer: object) -> Any:
    """The class of a layer, also of one that is mirrored: its states are on another device."""
    return getattr(layer, "mirrors", type(layer))


def is_dynamic(cache: object) -> bool:
    """Whether it is one that `generate` makes by default, or one of its kind in tiers."""
    return type(cache) in _PLAIN and not getattr(cache, "offloading", False)


def _can_crop(layer: Any) -> bool:
    """Whether `crop` restores the layer: one that grows, not one that is allocated whole or stored quantised.

    A layer for states that holds none after a pass means that a module keeps them itself.
    """
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return any(state is not None for state in layer.conv_states.values())
    if isinstance(layer, (*TIERED, GrowingLayer)):
        return True
    return isinstance(layer, DynamicLayer) and _kind(layer).update is _update_of(_kind(layer))


def _update_of(kind: type[DynamicLayer]) -> object:
    """The `update` of a layer that stores states as they are."""
    return DynamicSlidingWindowLayer.update if issubclass(kind, DynamicSlidingWindowLayer) else DynamicLayer.update


def _is_recurrent(layer: Any) -> bool:
    """Whether the layer has a state that each token changes as a whole."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return False
    return any(state is not None for state in layer.recurrent_states.values())


def tokens_in(cache: Cache) -> int | None:
    """The number of tokens that the cache holds; None if all its layers have recurrent states alone, which do not tell."""
    layers = getattr(cache, "layers", ())  # that of an encoder and a decoder consists of two caches
    if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return None
    return int(cache.get_seq_length())


def windows_of(cache: Cache) -> dict[int, int | None]:
    """How many tokens each layer that holds keys sees, itself included; None: all. By index, of a dynamic cache."""
    return {
        index: layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, CacheLayerMixin) and not isinstance(layer, _EMPTY)
    }


def shows_its_keys(cache: Cache) -> bool:
    """Whether every layer of a new cache shows a pass the keys of all tokens before it, or those of its window."""
    layers = [layer for layer in cache.layers if not isinstance(layer, _EMPTY)]
    return bool(layers) and all(type(layer) in _ATTENDING[:-1] for layer in layers)


def state_layers(cache: Cache) -> list[int]:
    """The layers with states of the whole text, alone or beside keys."""
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]


def shows_its_states(cache: Cache) -> bool:
    """Whether every layer of a new cache shows its keys as above, or has states that it shows, or both."""
    layers = [layer for layer in cache.layers if not isinstance(layer, _EMPTY)]
    return bool(layers) and all(type(layer) in (*_ATTENDING[:-1], *_WITH_STATES) for layer in layers)


def states_between(cache: Cache, first: int, stop: int, without: Collection[int] = ()) -> dict[str, torch.Tensor] | None:
    """Keys and values [1, heads, tokens, width] of tokens `first` to `stop` of each layer that has any, but those `without`, by
    name; None once a layer has forgotten a token. Those of mirrored layers are copies."""
    states: dict[str, torch.Tensor] = {}
    if not remembers_all(cache, without):
        return None
    elsewhere: dict[int, Any] = {}
    for index, layer in _layers_with_keys(cache, without):
        if (relay := getattr(layer, "relay", None)) is not None:
            elsewhere[id(relay)] = relay
        else:
            keys, values = part_of(layer, first, stop)
            states |= {f"{index}.keys": keys, f"{index}.values": values}
    for relay in elsewhere.values():
        states |= relay.read(first, stop, without)
    return states


def remembers_all(cache: Cache, without: Collection[int] = ()) -> bool:
    """Whether no layer of keys has forgotten a token, but those `without`."""
    return all(_held_tokens(layer) == layer.get_seq_length() for _, layer in _layers_with_keys(cache, without))


def _layers_with_keys(cache: Cache, without: Collection[int]) -> list[tuple[int, Any]]:
    return [(index, layer) for index, layer in enumerate(cache.layers) if index not in without and _has_keys(layer)]


def _held_tokens(layer: Any) -> int:
    return int(layer.states.tokens if isinstance(layer, TIERED) else layer.keys.shape[-2])


def _has_keys(layer: object) -> bool:
    return isinstance(layer, CacheLayerMixin) and not isinstance(layer, _EMPTY) and layer.is_initialized


def adds_in_place(cache: Cache) -> bool:
    """Whether a layer takes few tokens at a time as cheaply as many: all keys and values may be more than fits in memory."""
    return any(isinstance(layer, (*TIERED, GrowingLayer)) for layer in cache.layers)


def put_states(cache: Cache, states: Mapping[str, torch.Tensor]) -> None:
    """Add such states to a cache that `shows_its_keys`, as if a pass had. Layers of a new cache that see all keys do not copy
    them."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        keys, values = (states.get(f"{index}.{kind}") for kind in ("keys", "values"))
        if keys is None or values is None:
            continue
        if isinstance(layer, TieredLayer):
            layer.extend(keys, values)
        elif type(layer) is DynamicLayer and not layer.get_seq_length():
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        else:
            layer.update(keys, values)


def growing_states(cache: object) -> list[list[Pair]]:
    """Keys and values of each layer of a dynamic cache that holds those of all tokens and nothing else; with an encoder, the
    decoder's own and those of what was read."""
    if isinstance(cache, EncoderDecoderCache):
        both = [cache.self_attention_cache.layers, cache.cross_attention_cache.layers]
        found: list[list[Any]] = [[layers[index] for layers in both] for index in growing_pairs(cache)]
    elif type(cache) is DynamicCache:
        found = [[cache.layers[index]] for index in growing_indices(cache.layers)]
    else:
        return []
    return [[(one.keys, one.values) for one in layer] for layer in found if all(one.get_seq_length() for one in layer)]


def window_states(cache: object) -> list[tuple[Pair, int]]:
    """Keys and values of each layer of a dynamic cache that holds those of a window and nothing else, and its tokens."""
    if type(cache) is not DynamicCache:
        return []
    layers: list[Any] = [cache.layers[index] for index in window_indices(cache.layers)]
    return [((layer.keys, layer.values), layer.sliding_window) for layer in layers if layer.get_seq_length()]


def is_recording(cache: Cache) -> bool:
    """Whether a layer keeps what it no longer sees."""
    return any(getattr(layer, "record_past", False) for layer in cache.layers)


_BY_DEFAULT: dict[type, type] = {
    TieredLayer: DynamicLayer,
    GrowingLayer: DynamicLayer,
    TieredWindowLayer: DynamicSlidingWindowLayer,
}


def is_made_for(cache: Cache, config: PretrainedConfig) -> bool:
    """Whether the layers are those that `generate` would make for the config. A caller's `DynamicCache()` has no sliding ones."""
    kinds = [_BY_DEFAULT.get(_kind(layer), _kind(layer)) for layer in cache.layers]
    return kinds == [type(layer) for layer in DynamicCache(config=config).layers]


class Watcher(Protocol):
    """Is told what parts of a prompt add to a cache, before the next part changes it."""

    def take_keys(self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A layer has these keys and values [1, heads, tokens, width] from token `first` on."""

    def take_state(self, layer: int, kind: str, number: int, tokens: int) -> None:
        """A state of a layer, "conv" or "recurrent", is that after `tokens`."""


class PartCache(DynamicCache):
    """A cache as it was after `tokens` tokens, for the forward over a part of a prompt that begins there and ends at `stop`.

    The layers are those of `cache`: when one runs, the parts before have updated it.
    """

    def __init__(self, cache: Cache, tokens: int, stop: int, watcher: Watcher | None = None) -> None:
        Cache.__init__(self, layers=cache.layers)
        self._tokens, self._stop, self.watcher = tokens, stop, watcher
        self.recipe = getattr(cache, "recipe", None)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the same for all layers
        """The tokens before the part."""
        return self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of keys that a layer shows to the part, and the position of the first."""
        window = windows_of(self).get(layer_idx)
        kept = self._tokens if window is None else min(self._tokens, window - 1)
        return kept + query_length, self._tokens - kept

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """transformers' `update`, of which the watcher is told. Raises RuntimeError if the parts before were not here."""
        layer: Any = self.layers[layer_idx]
        if (held := layer.get_seq_length()) != self._tokens:
            raise RuntimeError(f"layer {layer_idx} has {held} tokens when the part from token {self._tokens} on comes to it")
        shown: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.watcher is not None:
            self.watcher.take_keys(layer_idx, self._tokens, key_states, value_states)
        return shown

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """transformers' `update_conv_state`, of which the watcher is told."""
        return self._told("conv", layer_idx, state_idx, super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """transformers' `update_recurrent_state`, of which the watcher is told."""
        shown = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        return self._told("recurrent", layer_idx, state_idx, shown)

    def _told(self, kind: str, layer: int, number: int, shown: torch.Tensor) -> torch.Tensor:
        if self.watcher is not None:
            self.watcher.take_state(layer, kind, number, self._stop)
        return shown


def record_past(cache: Cache) -> Callable[[], None]:
    """Let layers that forget keep what they could not restore, until the next `keep` or `crop`.

    The returned function ends that, but for layers that did so before: the cache's owner may want it.
    """
    started: list[Any] = [layer for layer in cache.layers if not getattr(layer, "record_past", True)]
    for layer in _filled(cache):
        if getattr(layer, "record_past", False):
            layer.crop(0)  # some releases show all that such a layer has recorded, not its window
    cache.activate_past_recording()

    def stop() -> None:
        for layer in started:
            layer.record_past = False

    return stop


def keep(cache: Cache, past: int, offsets: Sequence[int]) -> None:
    """Keep the first `past` positions of a cache that can "select", and of those after them the ones at `offsets`, ascending."""
    for layer in _filled(cache):
        layer.keep(past, offsets) if hasattr(layer, "keep") else keep_in_layer(layer, past, offsets)


def _filled(cache: Cache) -> list[Any]:
    """The layers that hold anything."""
    return [layer for layer in cache.layers if not isinstance(layer, _EMPTY) and getattr(layer, "is_initialized", True)]


def keep_in_layer(layer: Any, past: int, offsets: Sequence[int]) -> None:
    """`keep` in one layer."""
    if isinstance(layer, TIERED):
        layer.choose(past, offsets)
        return
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    added = (layer.cumulative_length if sliding else layer.keys.shape[-2]) - past
    start = layer.keys.shape[-2] - added
    first = max(0, start + len(offsets) - layer.sliding_window + 1) if sliding else 0
    for name, dim in _GROWING.items():
        if (states := getattr(layer, name, None)) is not None:
            setattr(layer, name, _chosen(states, dim, start, offsets).narrow(dim, first, start + len(offsets) - first))
    if sliding:
        layer.cumulative_length = past + len(offsets)


def _chosen(states: torch.Tensor, dim: int, start: int, offsets: Sequence[int]) -> torch.Tensor:
    """The states with those at `offsets` from `start` moved to `start`."""
    if list(offsets) != list(range(len(offsets))):
        chosen = torch.tensor(offsets, device=states.device) + start
        states.narrow(dim, start, len(offsets)).copy_(states.index_select(dim, chosen))
    return states


def crop(cache: Cache, count: int) -> None:
    """Drop the last `count` positions, of which each layer has recorded the past."""
    for layer in _filled(cache):
        layer.crop(-count)


@dataclass(frozen=True, slots=True)
class States:
    """What each layer of a cache held at one moment."""

    layers: tuple[Mapping[str, Any], ...]


def copy_states(cache: Cache) -> States:
    """What `restore_states` needs to undo the passes that follow. Keys and values are not copied: passes replace them."""
    return States(tuple(states_of_layer(layer) for layer in cache.layers))


def copy_to_continue(cache: DynamicCache, expected_tokens: int) -> DynamicCache:
    """A cache of the same tokens, for a text of `expected_tokens`. Passes over it leave `cache` as it is: layers of all tokens
    replace their keys and values, which are shared, and others are copied."""
    if isinstance(cache, TieredCache):
        copied = copy.deepcopy(cache)
        copied.text.expected_tokens = expected_tokens
        return copied
    layers: list[Any] = cache.layers
    shared = [layer for layer in layers if type(layer) in (DynamicLayer, GrowingLayer) and layer.is_initialized]
    tensors = [states for layer in shared for states in (layer.keys, layer.values)]
    return copy.deepcopy(cache, {id(states): states for states in tensors})


_SAVED = "saved"
"""What a layer saved itself: it adds tokens to memory that shows those before."""


def states_of_layer(layer: Any) -> Mapping[str, Any]:
    """`copy_states` of one layer."""
    if isinstance(layer, (*TIERED, GrowingLayer)) or _kind(layer) is not type(layer):
        return {_SAVED: layer.saved()}
    return {name: copied_state(value) for name, value in vars(layer).items()}


def copied_state(value: Any) -> Any:
    """Recurrent states are kept in dicts and updated in place."""
    if not isinstance(value, dict):
        return value
    return {key: state.clone() if isinstance(state, torch.Tensor) else state for key, state in value.items()}


def restore_states(cache: Cache, states: States) -> None:
    """Have what each layer held at `copy_states`, before or after passes that were undone; once: later passes update the copy."""
    layers: list[Any] = cache.layers
    for layer, saved in zip(layers, states.layers, strict=True):
        restore_layer(layer, saved)


def restore_layer(layer: Any, saved: Mapping[str, Any]) -> None:
    """`restore_states` of one layer."""
    if _SAVED in saved:
        layer.restore(saved[_SAVED])
    else:
        vars(layer).update(saved)
