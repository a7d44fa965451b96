"""Caches of texts that have ended: cut to the tokens of another text, and continued by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from rabbit_engine.transformers_bridge.caches import is_dynamic
from rabbit_engine.transformers_bridge.growing import GrowingLayer
from rabbit_engine.transformers_bridge.tiered import TieredCache
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer

_WHOLE = (DynamicLayer, GrowingLayer, TieredLayer)
"""Layers that hold all tokens, the last of which they can drop."""


def cut_to(cache: object, tokens: int) -> bool:
    """Let every layer of `cache` hold the first `tokens` tokens, or as many as all do. False if a layer cannot: one that forgets
    tokens, or has a state that each of them changes, only holds what it has."""
    layers = _filled(cache)
    lengths = {layer.get_seq_length() for layer in layers}
    if lengths == {tokens}:
        return True
    if not layers or _has_states(cache) or not all(type(layer) in _WHOLE for layer in layers):
        return False
    kept: int = min(tokens, *lengths)
    for layer in layers:
        if (dropped := layer.get_seq_length() - kept) > 0:
            layer.crop(-dropped)
    return kept > 0


def tells_what_it_has(cache: object) -> bool:
    """Whether each layer knows its tokens even if a pass was interrupted: no TieredLayer, which may have met a fault of the disk,
    and no states, which do not tell whether they have the token of that pass."""
    return type(cache) is DynamicCache and not _has_states(cache)


def _has_states(cache: object) -> bool:
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in getattr(cache, "layers", ()))


def expect(cache: DynamicCache, prompt: int, most: int) -> None:
    """A text of `prompt` tokens continues the cache, with its answer of up to `most`."""
    if isinstance(cache, TieredCache):
        cache.text.expected_tokens = most
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.expect(prompt, most)


def _filled(cache: object) -> Sequence[Any]:
    """The layers with tokens, if all hold keys and values of a dynamic cache, and none what it would drop otherwise."""
    layers: list[Any] = cache.layers if isinstance(cache, DynamicCache) and is_dynamic(cache) else []
    filled = [layer for layer in layers if isinstance(layer, CacheLayerMixin) and getattr(layer, "is_initialized", False)]
    return [] if any(getattr(layer, "record_past", False) for layer in filled) else filled
