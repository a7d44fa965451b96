"""Caches whose keys and values do not fit where the model computes: where they may lie, and how many of their layers do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from rabbit_engine.caches import KNOWN_ATTENTION, attention_over_blocks
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning.demand import Demand, Ways, tier_bytes
from rabbit_engine.planning.texts import disk_room, texts_folder, why_no_disk
from rabbit_engine.streaming import PIECE_TOKENS, BlockHome, TextStates
from rabbit_engine.transformers_bridge.attention import wrap_attention
from rabbit_engine.transformers_bridge.forwards import cache_of
from rabbit_engine.transformers_bridge.generation import Asked, takes_cache_objects
from rabbit_engine.transformers_bridge.growing import growing_cache
from rabbit_engine.transformers_bridge.tiered import TieredCache, growing_indices, put_pair_in_tiers, spread, window_indices
from rabbit_engine.utils.platform import free_memory_bytes

_CPU = torch.device("cpu")

_KEPT_FREE = 0.1
"""The fraction of free host memory that caches leave."""


def ways_of(runtime: Runtime, *, parts: bool, tiers: bool) -> Ways:
    """How a text that does not fit may be computed, if its prompt may be in `parts` and its cache in `tiers`; caches of the dtype
    that the model was loaded with."""
    encoded = tiers and runtime.assembly.cache_dtype is not None
    return Ways(
        parts,
        tier_room(runtime) if tiers else 0,
        encoded,
        holds=encoded and runtime.device.type == "cpu",
        no_disk=why_no_disk() if tiers and _can_tier(runtime) else "",
        pieces=tiers and runtime.partition.probe.far_heads > 0 and runtime.attention in KNOWN_ATTENTION,
    )


def require_cache_dtype(runtime: Runtime) -> None:
    """Raise ConfigurationError for a `cache_dtype` that the model's caches cannot have."""
    wanted = runtime.assembly.cache_dtype
    if wanted is not None and (_has_encoder(runtime) or not runtime.partition.probe.growing_layers):
        raise ConfigurationError(
            f"cache_dtype={wanted!r} is for layers that keep the keys and values of all tokens of a decoder alone, and none is "
            f"known in the cache of {runtime.architecture.cls.__name__}: leave it out"
        )


def may_tier(given: Mapping[str, Any], asked: Asked) -> bool:
    """Whether `generate` with the keywords `given` and these settings makes a dynamic cache."""
    if cache_of(given) is not None or asked("use_cache") is False:
        return False
    return asked("cache_implementation") in (None, "dynamic")


def tier_room(runtime: Runtime) -> int:
    """Bytes that caches may take beside the device: of host memory if the device has its own, and of disk; 0 for a model whose
    caches cannot lie there. Of a model in stages, those of the least of its devices or machines."""
    if not _can_tier(runtime):
        return 0
    assembly = runtime.assembly
    here = 1 + len(assembly.stages) - len(assembly.stages_elsewhere)  # on one disk
    return min([max(_host_room(runtime), disk_room()) // here, *(stage.tier_bytes() for stage in assembly.stages_elsewhere)])


def _can_tier(runtime: Runtime) -> bool:
    cls = runtime.architecture.cls
    probe = runtime.partition.probe
    keeps_keys = probe.growing_layers > 0 or probe.windows.layers > 0
    return keeps_keys and (not _has_encoder(runtime) or (takes_cache_objects(cls) and not runtime.in_stages))


def _has_encoder(runtime: Runtime) -> bool:
    return bool(runtime.architecture.config.is_encoder_decoder)


def make_cache(runtime: Runtime, demand: Demand) -> DynamicCache | None:
    """A cache with the layers of `demand` in tiers, spread over the model's depth; None if there are none, or the model has an
    encoder: see `making_pairs`. Raises CacheStorageError if its file cannot be made."""
    if not demand.in_tiers or _has_encoder(runtime):
        return None
    config, probe = runtime.architecture.config.get_text_config(), runtime.partition.probe
    layers = DynamicCache(config=config).layers
    growing, windows = growing_indices(layers), window_indices(layers)
    chosen = {*_chosen(growing, demand.tiered, probe.growing_layers), *_chosen(windows, demand.windows, probe.windows.layers)}
    recipe = _recipe_of(runtime, demand)
    return TieredCache(config, chosen, make_text_states(runtime, recipe), recipe)


def _chosen(indices: Sequence[int], count: int, known: int) -> list[int]:
    """`count` of the layers for every `known` ones, which are all, or those in the memory of one device in a row of them."""
    return spread(indices, -(-count * len(indices) // max(1, known)))


def make_growing_cache(runtime: Runtime, demand: Demand) -> DynamicCache | None:
    """A cache in memory with room for the tokens of `demand`, so that none is copied for another; None for a model whose own
    caches have no layer that only grows. On a device with memory of its own, `generate` makes it: room would take that."""
    grows = runtime.partition.probe.growing_layers > 0 and not _has_encoder(runtime)
    if demand.in_tiers or runtime.device.type != "cpu" or not grows:
        return None
    config = runtime.architecture.config.get_text_config()
    return growing_cache(config, demand.prompt, demand.prompt + demand.answer)


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """How layers in tiers are made, here and in stages: in eight bits if they are `encoded`, in `pieces`, `held` in memory, else
    where `nbytes` of theirs have room, for `tokens` of a text."""

    encoded: bool
    pieces: bool
    held: bool
    nbytes: int
    tokens: int


def _recipe_of(runtime: Runtime, demand: Demand) -> TextRecipe:
    nbytes = tier_bytes(runtime.partition.probe, demand)
    return TextRecipe(demand.encoded, demand.pieces, demand.held, nbytes, demand.prompt + demand.answer)


def make_text_states(runtime: Runtime, recipe: TextRecipe) -> TextStates:
    """The states of a new text. Raises CacheStorageError if its file cannot be made."""
    return TextStates(_make_home(runtime, recipe), recipe.tokens)


def _make_home(runtime: Runtime, recipe: TextRecipe) -> BlockHome:
    in_memory = recipe.held or (runtime.device.type != "cpu" and recipe.nbytes <= _host_room(runtime))
    if recipe.pieces:
        wrap_attention(attention_over_blocks)
    return BlockHome(
        None if in_memory else texts_folder(), encoded=recipe.encoded, piece_tokens=PIECE_TOKENS if recipe.pieces else None
    )


_PAIRED: ContextVar[tuple[object, Demand] | None] = ContextVar("paired", default=None)


@contextmanager
def making_pairs(model: object, demand: Demand | None) -> Iterator[None]:
    """A block in which the caches that `generate` of a model with an encoder makes have `demand.tiered` layers in tiers: some
    classes make several, for parts of a sound. Without such layers, as before."""
    if demand is None or not demand.tiered or not _has_encoder(runtime_of(model)):
        yield
        return
    token = _PAIRED.set((model, demand))
    try:
        yield
    finally:
        _PAIRED.reset(token)


def put_in_tiers(model: object, cache: object) -> None:
    """Give a `cache` that `generate` of `model` has just made its layers in tiers, if it is one of a block of `making_pairs`.
    Raises CacheStorageError if its file cannot be made."""
    wanted = _PAIRED.get()
    if wanted is None or wanted[0] is not model or not isinstance(cache, EncoderDecoderCache):
        return
    runtime, demand = runtime_of(model), wanted[1]
    reads_text = not runtime.partition.probe.fixed_layer_bytes  # then the prompt is the encoder's
    own, read = (demand.answer, demand.prompt) if reads_text else (demand.prompt + demand.answer, 0)
    put_pair_in_tiers(cache, demand.tiered, TextStates(_make_home(runtime, _recipe_of(runtime, demand)), own), read)


def in_shared_blocks(runtime: Runtime, demand: Demand) -> Demand:
    """`demand` of a text that others are to continue. What fits on a CPU lies in blocks in memory, which its copies share: whole
    layers are copied with the first token that a copy adds. Other devices keep them whole: blocks would lie apart."""
    layers = runtime.partition.probe.growing_layers
    if demand.in_tiers or not layers or runtime.device.type != "cpu":
        return demand
    return replace(demand, tiered=layers, held=True)


def make_shared_cache(runtime: Runtime, demand: Demand) -> DynamicCache:
    """A cache for a text that others are to continue. Raises CacheStorageError if its file cannot be made."""
    return make_cache(runtime, demand) or DynamicCache(config=runtime.architecture.config.get_text_config())


def _host_room(runtime: Runtime) -> int:
    """Of the host's memory, for a device that has its own."""
    return 0 if runtime.device.type == "cpu" else int(free_memory_bytes(_CPU) * (1 - _KEPT_FREE))
