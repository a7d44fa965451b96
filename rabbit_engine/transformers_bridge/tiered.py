"""A dynamic cache of which some layers keep their keys and values elsewhere, and have them whole only while they run."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from rabbit_engine.transformers_bridge.tiered_layers import (
    TIERED,
    GrowingStates,
    LayerInStates,
    Pair,
    TextLayers,
    TieredLayer,
    TieredWindowLayer,
)


class TieredCache(DynamicCache):
    """The cache of `generate`, with the layers at `tiered` in `text`, if they have keys and values and nothing else. Others are
    what they are by default. `recipe` is what a text is made of elsewhere that has some of the layers."""

    def __init__(self, config: PretrainedConfig, tiered: Collection[int], text: TextLayers, recipe: object = None) -> None:
        super().__init__(config=config)
        self.text, self.recipe = text, recipe
        for index in sorted(set(tiered) & {*growing_indices(self.layers), *window_indices(self.layers)}):
            self.layers[index] = _in_tiers(self.layers[index], text)

    @classmethod
    def of(cls, cache: DynamicCache, states: Mapping[int, GrowingStates], text: TextLayers) -> Self:
        """`cache`, which is new, with the layers at the indices of `states` there."""
        made = object.__new__(cls)
        vars(made).update(vars(cache), text=text, recipe=None)
        made.layers = [TieredLayer(states[index]) if index in states else layer for index, layer in enumerate(cache.layers)]
        return made

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """transformers' `update`, with which the turn of the layer before ends."""
        layer = self.layers[layer_idx]
        self.text.end_turn_before(layer.states if isinstance(layer, LayerInStates) else None)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __copy__(self) -> Self:
        """The same text, of the same layers."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain DynamicCache of the same tokens, all of them in memory."""
        plain = object.__new__(DynamicCache)
        vars(plain).update({name: value for name, value in vars(self).items() if name not in ("text", "recipe")})
        plain.layers = [layer.as_plain() if isinstance(layer, TIERED) else layer for layer in self.layers]
        del protocol
        return copy.copy, (plain,)  # of which the other side needs no more than transformers

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A text that continues the same tokens: what lies elsewhere is shared, not copied."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update({name: value for name, value in vars(self).items() if name not in ("layers", "text")})
        copied.text, states = _fork_once(self.text, memo)
        copied.layers = [_copy_layer(layer, states, memo) for layer in self.layers]
        return copied


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """A layer in tiers on its way to where it will be in tiers: transformers' own, with the same tokens."""

    layer: Any


def as_plain(cache: Any, index: int) -> Any:
    """A layer of a cache as it can travel: one in tiers whose text can be made elsewhere as a `PlainLayer`."""
    layer = cache.layers[index]
    if not isinstance(layer, TIERED):
        return layer
    return PlainLayer(layer.as_plain()) if getattr(cache, "recipe", None) is not None else layer.as_plain()


def put_back_in_tiers(cache: DynamicCache, text: TextLayers) -> TieredCache:
    """A cache whose plain layers are in tiers of `text`, with what they hold."""
    made = object.__new__(TieredCache)
    vars(made).update(vars(cache), text=text, recipe=None)
    made.layers = [_refilled(layer.layer, text) if isinstance(layer, PlainLayer) else layer for layer in cache.layers]
    return made


def end_turns(cache: object) -> None:
    """Put away the layer that is whole: no other of the cache may run before it does again."""
    if isinstance(cache, TieredCache):
        cache.text.end_turn_before(None)


def _refilled(plain: Any, text: TextLayers) -> TieredLayer | TieredWindowLayer:
    layer = _in_tiers(plain, text)
    if plain.is_initialized:
        layer.lazy_initialization(plain.keys, plain.values)
        layer.states.extend(plain.keys, plain.values)
    if isinstance(layer, TieredWindowLayer):
        layer.cumulative_length, layer.record_past = plain.cumulative_length, plain.record_past
    return layer


def _fork_once(text: TextLayers, memo: dict[Any, Any]) -> tuple[TextLayers, Mapping[Any, GrowingStates]]:
    """The fork of a text in one deep copy: the caches of a decoder and of its encoder are of the same."""
    key = "fork", id(text)
    if key not in memo:
        memo[key] = text.fork()
    forked: tuple[TextLayers, Mapping[Any, GrowingStates]] = memo[key]
    return forked


def _copy_layer(layer: Any, states: Mapping[Any, GrowingStates], memo: dict[int, Any]) -> Any:
    if not isinstance(layer, TIERED):
        return copy.deepcopy(layer, memo)
    copied = copy.copy(layer)
    copied.states, copied._given = states[layer.states], list(layer._given)
    return copied


def _in_tiers(layer: Any, text: TextLayers) -> TieredLayer | TieredWindowLayer:
    """The layer in place of a new one."""
    if type(layer) is DynamicSlidingWindowLayer:
        return TieredWindowLayer(text.new_window(), layer.sliding_window)
    return TieredLayer(text.new_layer())


def put_pair_in_tiers(cache: EncoderDecoderCache, count: int, text: TextLayers, read_tokens: int) -> None:
    """Let `count` layers of a new cache have the decoder's own keys and values in `text`, and those of the `read_tokens` that
    its encoder read, of which none come later; spread over the depth."""
    own, read = cache.self_attention_cache, cache.cross_attention_cache
    states: tuple[dict[int, GrowingStates], dict[int, GrowingStates]] = {}, {}
    for index in spread(growing_pairs(cache), count):
        states[0][index], states[1][index] = text.new_layer(), text.new_layer(read_tokens)  # in the order of a pass
    cache.self_attention_cache, cache.cross_attention_cache = (
        TieredCache.of(each, some, text) for each, some in zip((own, read), states, strict=True)
    )


def growing_pairs(cache: EncoderDecoderCache) -> list[int]:
    """The layers of which both caches are dynamic, and hold all tokens' keys and values and nothing else."""
    caches = cache.self_attention_cache, cache.cross_attention_cache
    if any(type(each) is not DynamicCache or each.offloading for each in caches):
        return []
    own, read = (growing_indices(each.layers) for each in caches)
    return sorted(set(own) & set(read))


def spread(indices: Sequence[int], count: int) -> list[int]:
    """`count` of them, all if they are fewer, evenly."""
    count = min(count, len(indices))
    return [indices[at * len(indices) // count] for at in range(count)]


def part_of(layer: DynamicLayer, first: int, stop: int) -> Pair:
    """Keys and values of tokens `first` to `stop` of a layer that holds all."""
    if isinstance(layer, LayerInStates):
        return layer.states.part(first, stop)
    assert layer.keys is not None  # noqa: S101 - it holds all
    assert layer.values is not None  # noqa: S101
    return layer.keys[:, :, first:stop], layer.values[:, :, first:stop]


def growing_indices(layers: Sequence[Any]) -> list[int]:
    """The layers that only add keys and values, and never forget any."""
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def window_indices(layers: Sequence[Any]) -> list[int]:
    """The layers that keep the keys and values of a window, and nothing else."""
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1]
